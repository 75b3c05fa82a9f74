"""Check that the tools lose no results and print no traceback if stdout or stderr fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..models import TINY
from ..processes import Process
from .test_evaluate import write_data

ROOT = TINY.parents[1]
pytestmark = pytest.mark.slow
CLOSING_READER = "import sys; sys.stdin.close()"


def shell(command: str, *values: Any, **variables: str) -> tuple[int, str, str]:
    """Run a bash command with `values` as "$@", and return its status, stdout and stderr."""
    argv = ["bash", "-o", "pipefail", "-c", command, sys.executable, *map(str, values)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = os.environ | {"CLOSING_READER": CLOSING_READER} | variables
    with Process(argv, cwd=ROOT, env=env, text=True, **pipes) as process:
        out, err = process.communicate()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the flags of a finished run, so that a command only prints."""
    folder = tmp_path_factory.mktemp("streams")
    data = write_data(folder / "rows.jsonl", 3)
    flags = ["--data", data, "--latent-steps", 1, "--max-new-tokens", 2, "--out", folder / "run"]
    status, out, err = shell('"$0" tools/evaluate.py "$@"', *flags)
    assert (status, out.startswith("| arm |")) == (0, True), err
    assert "evaluate: 1 of 1 units to do; a unit is one batch of questions" in err
    return flags


@pytest.mark.parametrize(
    ("redirection", "status"),
    [
        (">&-", 0),
        ("2>&-", 0),
        ("<&- >&- 2>&-", 0),
        ('| "$0" -c "$CLOSING_READER"', 0),
        ('2>&1 | "$0" -c "$CLOSING_READER"', 0),
        pytest.param(
            ">/dev/full", 1, marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="none")
        ),
        ("2>/dev/full", 0),
    ],
)
def test_evaluate_saves_its_files_with_any_streams(
    redirection: str, status: int, run: list[Any]
) -> None:
    """A run that failed at its last line because of a closed pipe would have no summary."""
    folder = run[-1]
    before = (folder / "results.jsonl").read_bytes()
    (folder / "summary.json").unlink()
    found, _, err = shell(f'"$0" tools/evaluate.py "$@" {redirection}', *run)
    assert (found, err.count("\n")) == (status, status), err
    assert "Traceback" not in err and ("No space left" in err) == (status == 1)
    assert json.loads((folder / "summary.json").read_text())["arms"]
    assert (folder / "results.jsonl").read_bytes() == before


def test_a_closed_stderr_pipe_does_not_stop_a_run(run: list[Any], tmp_path: Path) -> None:
    """`evaluate … 2>&1 | head` must compute all results."""
    flags = [*run[:-1], tmp_path / "run", "--batch-size", 1]
    status, _, _ = shell('"$0" tools/evaluate.py "$@" 2>&1 | "$0" -c "$CLOSING_READER"', *flags)
    assert status == 0
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_table_is_printed_in_any_encoding(encoding: str, run: list[Any]) -> None:
    """The name of an arm may have text in any language, here from a prefix."""
    folder = run[-1].parent / f"prefixed-{encoding}"
    flags = [*run[:-1], folder, "--prefix", "Zuerst → 计划", "--prefix", "b"]
    command = '"$0" tools/evaluate.py "$@"'
    status, out, err = shell(command, *flags, PYTHONIOENCODING=encoding)
    assert status == 0 and "Traceback" not in err, err
    assert r"prefix=Zuerst \u2192 \u8ba1\u5212 |" in out
    assert "prefix=Zuerst → 计划 |" in (folder / "summary.md").read_text(encoding="utf-8")


def test_results_and_benchmark_also_end_quietly(tmp_path: Path) -> None:
    assert shell('"$0" tools/results.py --help >&- 2>&-') == (0, "", "")
    assert shell('"$0" tools/results.py --check >&- 2>&-')[0] == 0
    status, _, err = shell('"$0" tools/results.py --help | "$0" -c "$CLOSING_READER"')
    assert (status, err) == (0, "")
    rows, out = tmp_path / "rows.jsonl", tmp_path / "page.md"
    row = {"id": 1, "question": "How many is two and three?", "answer": "5"}
    rows.write_text(json.dumps(row) + "\n")
    flags = ["--perplexity", TINY, "--text", rows, "--formats", "q8", "--threads", 1, "--out", out]
    for redirection in ('| "$0" -c "$CLOSING_READER"', ">&-"):
        status, _, err = shell(f'"$0" tools/benchmark.py "$@" {redirection}', *flags)
        assert status == 0 and "Traceback" not in err and "ignored" not in err, err
        assert "| q8 |" in out.read_text(encoding="utf-8")
        out.unlink()


def test_a_failure_of_results_gives_one_line(tmp_path: Path) -> None:
    status, out, err = shell(
        '"$0" -c "import sys; from pathlib import Path; from tools import results; '
        "results.PAGE = Path('nowhere.md'); sys.exit(results.main(['--check']))\""
    )
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("results: error: ") and "nowhere.md" in err
