"""Check the start of the command line and its streams: fast help, lazy imports, broken streams."""

import inspect
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import minimas
from minimas.agents import TRANSFERS
from minimas.answers import KINDS
from minimas.check import STEPS
from minimas.core.latent import ALIGNMENTS
from minimas.fast.quantize import FORMATS
from minimas.load import TINY as TINY_NAME
from minimas.parser import build_parser
from minimas.teams import LAYOUTS

from .models import TINY

ROOT = TINY.parents[1]
ASKED = "Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def python(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, env=ENV, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shell(redirect: str, *argv: Any, **env: str) -> "subprocess.CompletedProcess[bytes]":
    script = f'"$0" -m minimas "$@" {redirect}'
    command = ["sh", "-c", script, sys.executable, *map(str, argv)]
    return subprocess.run(command, env=ENV | env, capture_output=True, timeout=120, check=False)


# -- start ---------------------------------------------------------------------------------------


def test_help_and_version_do_not_import_torch() -> None:
    """Importing torch takes seconds, and --help does not need it."""
    said = python("""
import sys
from minimas.__main__ import main
for command in ("--version", "--help", "ask --help", "check --help", "info --help", "ask --what"):
    try:
        main(command.split())
    except SystemExit as stop:
        assert stop.code == (2 if command == "ask --what" else 0), command
print([name for name in ("torch", "tokenizers", "tqdm", "minimas.load") if name in sys.modules])
""")
    assert said.endswith("\n[]\n") and "minimas 0.1.0" in said


def choices(command: str, flag: str) -> Any:
    parser: Any = build_parser()
    [commands] = [action for action in parser._actions if action.dest == "command"]
    found = commands.choices[command]._option_string_actions[flag]
    return found.choices or found.default or found.help


def test_the_flags_have_the_same_names_as_the_library() -> None:
    """The parser has its own copy of the names, because the library's module imports torch."""
    methods = (minimas.latent_mas, minimas.text_mas, minimas.single)
    assert choices("ask", "--method") == [method.__name__ for method in methods]
    assert choices("ask", "--kind") == list(KINDS)
    assert choices("ask", "--transfer") == list(TRANSFERS)
    for command in ("ask", "check"):
        assert choices(command, "--quantize") == list(FORMATS)
        assert choices(command, "--layout") == list(LAYOUTS)
    assert choices("ask", "--align").startswith(", ".join(ALIGNMENTS))
    assert (
        choices("ask", "--model") == TINY_NAME and int(choices("check", "--latent-steps")) == STEPS
    )


def test_every_public_name_can_be_imported() -> None:
    """`load` must be the function, even after the module of that name was imported."""
    stub: dict[str, Any] = {}
    source = Path(minimas.__file__).with_name("__init__.pyi").read_text(encoding="utf-8")
    exec(source.replace("from .", "from minimas."), stub)
    assert set(stub["__all__"]) == set(minimas.__all__) <= set(dir(minimas))
    for name in minimas.__all__:
        assert getattr(minimas, name) is stub[name] and not inspect.ismodule(stub[name])
    said = python("""
import minimas.agents
from minimas import load
import minimas.load
from minimas import *
from minimas.load import LM as same
print(load.__name__, minimas.load is load, same is LM, minimas.__version__, sorted(dir(minimas))[0])
""")
    assert said == "load True True 0.1.0 Agent\n"
    with pytest.raises(AttributeError, match="'minimas' has no attribute 'laod'"):
        minimas.laod  # type: ignore[attr-defined]  # noqa: B018
    assert isinstance(minimas, types.ModuleType)


# -- streams -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_closed_stream_gives_no_traceback() -> None:
    """Cron and daemons close streams, which are then None in Python."""
    for redirect, status in ((">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0)):
        done = shell(redirect, "ask", ASKED)
        assert (done.returncode, b"Traceback" in done.stderr) == (status, False), redirect
        assert done.stdout.strip() == (b"6" if redirect == "2>&-" else b"")
    done = shell("<&-", "ask", "-")
    assert done.returncode == 2 and b"QUESTION: found ''" in done.stderr
    assert b"parameters" in shell("<&-", "info", TINY).stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_progress_that_cannot_be_printed_does_not_lose_the_answer() -> None:
    """The disk of the log is full, but the answer goes elsewhere."""
    done = shell("2>/dev/full", "ask", ASKED)
    assert (done.returncode, done.stdout.strip()) == (0, b"6")


@pytest.mark.slow
def test_a_closed_stderr_pipe_does_not_lose_the_answer(tmp_path: Path) -> None:
    """An example is `2> >(head -1)`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "minimas", "ask", ASKED]
    done = subprocess.run(
        command, env=ENV, stdout=subprocess.PIPE, stderr=write, timeout=120, check=False
    )
    os.close(write)
    assert (done.returncode, done.stdout.strip()) == (0, b"6")


@pytest.mark.slow
def test_a_closed_stdout_stops_a_run_over_a_file_without_an_error(tmp_path: Path) -> None:
    """`minimas ask --file … | head -1` ends after the first answers with status 0."""
    (tmp_path / "q.jsonl").write_text(f'{{"question": "{ASKED}"}}\n' * 40)
    command = [sys.executable, "-m", "minimas", "ask", "--file", str(tmp_path / "q.jsonl")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=ENV, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().strip() == "6"
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0 and "error" not in said and "Traceback" not in said
    assert "[40/40]" not in said


@pytest.mark.slow
def test_a_memory_that_a_closed_stdout_prevents_is_an_error(tmp_path: Path) -> None:
    """`ask --save-memory FILE | true` ended with status 0 and without the file."""
    read, write = os.pipe()
    os.close(read)
    saved = tmp_path / "m.safetensors"
    command = [sys.executable, "-m", "minimas", "ask", ASKED, "--quiet", "--save-memory", saved]
    done = subprocess.run(
        command, env=ENV, stdout=write, stderr=subprocess.PIPE, timeout=120, check=False
    )
    os.close(write)
    assert done.returncode == 1 and not saved.exists()
    assert done.stderr == b"minimas: error: stdout was closed: --save-memory wrote no file\n"


@pytest.mark.slow
def test_utf8_input_works_in_a_c_locale() -> None:
    """The bytes of the question became surrogates, and the error said that it was empty."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell("", "ask", "Müller 🙂?", "--json", "-n", 1, "--quiet", **plain)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "\\u00fcller" in done.stdout.decode("ascii")
    piped = 'printf "Müller?" | '
    command = ["sh", "-c", f'{piped}"$0" -m minimas ask - -n 1 --json --quiet', sys.executable]
    done = subprocess.run(command, env=ENV | plain, capture_output=True, timeout=120, check=False)
    assert "\\u00fcller" in done.stdout.decode("ascii"), done.stderr
    assert shell("", "info", TINY, PYTHONIOENCODING="cp1252").returncode == 0
