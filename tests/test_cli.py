"""Check the command line: only the answer on stdout, one line per error, and the exit status.

Most tests call `main` in this process with a random model in a folder. Only tests of signals, pipes
and devices start a process.
"""

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minimas import Sampling, __version__, latent_mas, load
from minimas.__main__ import main
from minimas.core.errors import ParameterError

from .models import TINY, write_folder
from .processes import Process
from .text import endless_folder, text_model

ROOT = TINY.parents[1]
TINY_EXAMPLE = (
    "Eva has 2 cards. She finds 7 more. She loses 3. She doubles the cards. "
    "How many cards does Eva have?"
)


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `main` with these arguments, and return (exit status, stdout, stderr)."""

    def call(*argv: Any) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model that never ends its turn. Its context is 100,000 tokens."""
    return endless_folder(tmp_path_factory.mktemp("cli") / "model", 100_000)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def assert_one_line(outcome: Outcome, status: int | tuple[int, ...], pattern: str) -> None:
    assert outcome.status in (status if isinstance(status, tuple) else (status,)), outcome
    assert outcome.out == ""
    assert re.fullmatch(rf"minimas: error: .*{pattern}.*\n", outcome.err), outcome.err


# -- answers --------------------------------------------------------------------------------------


def test_only_the_answer_is_on_stdout(run: Run, folder: Path) -> None:
    """`minimas ask … > answer.txt` must contain only the answer. Everything else goes to stderr."""
    status, out, err = run("ask", "-m", folder, "How many?", "-n", 9, "--latent-steps", 2)
    [result] = latent_mas(
        load(folder),
        ["How many?"],
        latent_steps=2,
        kind="free",
        sampling=Sampling(max_new_tokens=9),
    )
    assert (status, out) == (0, result.text + "\n")
    for trace in [*result.agents, result.usage]:
        name = getattr(trace, "name", "total")
        tokens = f"{trace.prompt_tokens:,} prompt tokens, {trace.latent_steps} latent steps, "
        counts = rf"{tokens}{trace.output_tokens} generated, \d+\.\d\d s, KV cache \d"
        assert re.search(rf"^ *{name}: .*{counts}", err, re.M), err
    assert "--max-new-tokens" in err, "an answer that was cut off says so"


@pytest.mark.parametrize("method", ["single", "text_mas", "latent_mas"])
def test_quiet_leaves_stderr_empty(run: Run, folder: Path, method: str) -> None:
    loud, quiet = (
        run("ask", "-m", folder, "hi", "-n", 5, "--method", method, *flags)
        for flags in ((), ("--quiet",))
    )
    assert quiet == (0, loud.out, "") and loud.err


def test_json_prints_one_object_per_question(run: Run, folder: Path, tmp_path: Path) -> None:
    """An object has all that is needed to replay the result: settings, prompts and token counts."""
    rows = jsonl(
        tmp_path / "q.jsonl",
        {"id": 7, "question": "one?"},
        {"question": "two? 🙂"},
        {"question": "three?"},
    )
    status, out, _ = run(
        "ask",
        "-m",
        folder,
        "--file",
        rows,
        "-n",
        4,
        "--json",
        "--latent-steps",
        1,
        "--seed",
        3,
        "--temp",
        2,
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [record["question"] for record in records] == [
        "one?",
        "two? 🙂",
        "three?",
    ]
    expected = latent_mas(
        load(folder),
        ["one?", "two? 🙂", "three?"],
        latent_steps=1,
        kind="free",
        seed=3,
        sampling=Sampling(2.0, max_new_tokens=4),
    )
    for record, result in zip(records, expected, strict=True):
        assert (record["text"], record["finish_reason"]) == (result.text, result.finish_reason)
        assert [agent["prompt"] for agent in record["agents"]] == [
            trace.prompt for trace in result.agents
        ]
        assert record["usage"]["prompt_tokens"] == result.usage.prompt_tokens
        assert (record["method"], record["seed"], record["latent_steps"]) == ("latent_mas", 3, 1)
    assert records[0]["id"] == 7


def test_a_question_may_contain_its_own_options(run: Run, folder: Path) -> None:
    """`--kind choice` was refused without `choices`, but the options are often in the question."""
    outcome = run(
        "ask", "Which is even? (A) 3 (B) 4", "--kind", "choice", "--json", "-m", folder, "-n", 4
    )
    assert outcome.status == 0
    assert json.loads(outcome.out)["finish_reason"] in ("stop", "length")


def test_the_fields_of_a_row_determine_its_kind(run: Run, folder: Path, tmp_path: Path) -> None:
    """`choices`: choice; `tests` or `entry_point`: code; a number as answer: math; else free."""
    rows = jsonl(
        tmp_path / "q.jsonl",
        {"question": "q", "choices": {"A": "blue", "B": "red"}, "answer": "A"},
        {"question": "q", "tests": "assert f() == 1"},
        {"question": "q", "entry_point": "f"},
        {"question": "q", "answer": "1,234.5"},
        {"question": "q", "answer": 7},
        {"question": "q", "answer": "the sky"},
        {"question": "q"},
    )

    def prompts(*flags: Any) -> list[str]:
        _, out, _ = run(
            "ask", "-m", folder, "--file", rows, "-n", 1, "--json", "--method", "single", *flags
        )
        return [json.loads(line)["agents"][-1]["prompt"] for line in out.splitlines()]

    choice, code, code_too, math, math_too, free, free_too = prompts()
    assert code == code_too and math == math_too and free == free_too
    assert len({choice, code, math, free}) == 4
    assert "(A) blue" in choice and "(B) red" in choice
    assert set(prompts("--kind", "math")) == {math}


@pytest.mark.parametrize("size", [2, 5])
def test_batches_change_neither_answers_nor_their_order(
    run: Run, folder: Path, tmp_path: Path, size: int
) -> None:
    rows = jsonl(tmp_path / "q.jsonl", *({"question": f"{'very ' * i}long?"} for i in range(5)))
    argv = ["ask", "-m", folder, "--file", rows, "-n", 4, "--latent-steps", 1, "--temperature", 1]
    one, many = run(*argv, "--json"), run(*argv, "--json", "--batch-size", size)
    texts = [
        [json.loads(line)["text"] for line in outcome.out.splitlines()] for outcome in (one, many)
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    apart = "\n".join(text + "\n" for text in texts[0])  # a blank line between two answers
    assert run(*argv, "--batch-size", size).out == run(*argv).out == apart


def test_shuffled_memories_need_a_file(run: Run, folder: Path, tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "q.jsonl", {"question": "one?"}, {"question": "two?"})
    status, out, _ = run(
        "ask", "-m", folder, "--file", rows, "-n", 2, "--json", "--transfer", "shuffled"
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert (
        status == 0
        and "two?" in records[0]["agents"][0]["prompt"]
        and "one?" in records[1]["agents"][0]["prompt"]
    )
    assert_one_line(
        run("ask", "-m", folder, "one?", "--transfer", "shuffled"),
        2,
        "--transfer: found 'shuffled' .*--file",
    )


def test_shuffled_with_one_question_of_a_kind_is_refused_before_any_answer(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    """Two answers were printed before the third question, of another kind, was refused."""
    rows = tmp_path / "mixed.jsonl"
    rows.write_text(
        '{"question": "one?"}\n{"question": "two?"}\n{"question": "three?", "answer": "3"}\n'
    )
    argv = ["ask", "-m", folder, "--file", rows, "-n", 2, "--transfer", "shuffled"]
    assert_one_line(run(*argv), 2, "--transfer: found 'shuffled' with one question")


def test_a_line_separator_in_a_question_does_not_split_its_row(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    """U+2028 and U+0085 are allowed in JSON, but `str.splitlines` splits at them."""
    question = "one\u2028two\u2029three\u0085four?"
    rows = jsonl(tmp_path / "q.jsonl", {"question": question})
    status, out, err = run("ask", "-m", folder, "--file", rows, "-n", 1, "--json")
    assert status == 0, err
    assert json.loads(out)["question"] == question


@pytest.mark.parametrize("question", ["-5 + 3?", "--what", "-", "-n"])
def test_a_question_may_start_with_a_dash_after_a_double_dash(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from standard input"))
    status, out, _ = run("ask", "-m", folder, "-n", 1, "--json", "--", question)
    assert status == 0
    assert json.loads(out)["question"] == ("from standard input" if question == "-" else question)


def test_a_dash_means_standard_input(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("How many\ncards 🙂?\n"))
    status, out, _ = run("ask", "-m", folder, "-n", 1, "--json", "-")
    assert status == 0 and json.loads(out)["question"].strip() == "How many\ncards 🙂?"
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert_one_line(run("ask", "-m", folder, "-"), 2, "QUESTION: found .*expected")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?"), encoding="utf-8"))
    assert_one_line(run("ask", "-m", folder, "-"), (1, 2), "(QUESTION|standard input)")


def test_a_question_of_ten_thousand_words_is_answered(run: Run, folder: Path) -> None:
    status, out, err = run(
        "ask", "-m", folder, "-n", 2, "--method", "single", "--dtype", "float32", "a b " * 5000
    )
    assert status == 0 and out.strip(), err


@pytest.mark.parametrize("models", ["small", "small=", "=folder"])
def test_a_model_without_a_name_or_a_folder_is_refused(run: Run, models: str) -> None:
    """The message was about a missing folder "small", and came after the first model was loaded."""
    outcome = run("ask", TINY_EXAMPLE, "-m", "missing", "--models", models)
    assert_one_line(outcome, 2, rf"--models: found \['{models}'\], expected NAME=FOLDER")


@pytest.mark.parametrize("words", [10_000, 100_000])
def test_a_question_longer_than_the_context_is_refused_within_seconds(
    run: Run, folder: Path, words: int
) -> None:
    """The error names what is too long, the limit, and the flags that count towards it."""
    start = time.monotonic()
    outcome = run("ask", "-m", folder, "word " * words + "?", "--latent-steps", 90_000)
    assert_one_line(outcome, 1, r"planner: .*--latent-steps.*--max-new-tokens.*expected .*100000")
    assert time.monotonic() - start < 20


def test_a_row_that_is_too_long_is_named(run: Run, tmp_path: Path) -> None:
    """The message named only the agent, and --quiet hides how many rows were done."""
    rows = [TINY_EXAMPLE, "word " * 20_000, TINY_EXAMPLE]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"question": row}) + "\n" for row in rows))
    outcome = run("ask", "--file", file, "-n", 8, "--quiet")
    assert outcome.status == 1 and outcome.out.count("\n") == 1
    assert outcome.err.startswith("minimas: error: [2/3] planner: 0 slots of working memory")


def test_the_default_model_says_what_it_can_answer(run: Run) -> None:
    """Its answers to other questions are meaningless, and a new user might blame the method."""
    known, unknown = run("ask", TINY_EXAMPLE, "-n", 8), run("ask", "Why is the sky blue?", "-n", 8)
    assert known.status == unknown.status == 0
    assert "Qwen/Qwen3-0.6B" not in known.err
    [line] = [line for line in unknown.err.splitlines() if "Qwen/Qwen3-0.6B" in line]
    assert TINY_EXAMPLE in line and "--model Qwen/Qwen3-0.6B" in line
    assert run("ask", "Why is the sky blue?", "-n", 8, "--quiet").err == ""


def test_a_progress_bar_is_shown_only_on_a_terminal(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stderr, drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert run("ask", "-m", folder, "hi", "-n", 2, "--latent-steps", 3).status == 0
        assert ("\r" in stderr.getvalue()) == drawn


@pytest.mark.parametrize("layout", ["turn", "chat"])
def test_the_layout_can_be_chosen_and_is_reported(
    run: Run, folder: Path, tmp_path: Path, layout: str
) -> None:
    """`--layout` replaces the team's own layout, and `--json` reports the one that was used."""
    team = {
        "layout": "turn",
        "agents": [{"name": "a", "prompt": "{question}"}, {"name": "b", "prompt": "{question}"}],
    }
    (tmp_path / "team.json").write_text(json.dumps(team))
    for options in (["--layout", layout], [] if layout == "turn" else ["--layout", "chat"]):
        done = run(
            "ask", "-m", folder, "hi", "-n", 2, "--json", "--team", tmp_path / "team.json", *options
        )
        [record] = map(json.loads, done.out.splitlines())
        assert record["layout"] == layout
        text = "".join(agent["prompt"] for agent in record["agents"])
        assert text.count("<|im_start|>assistant") == {"turn": 1, "chat": 2}[layout]


def test_an_agent_that_generates_text_in_mid_chain_is_refused_by_flag_and_by_file(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    """The one line names the agent and the field, and the flag or the file that is wrong."""
    agents = [
        {"name": "a", "prompt": "{question}", "writes": True},
        {"name": "b", "prompt": "{question}"},
    ]
    path = tmp_path / "team.json"
    path.write_text(json.dumps({"agents": agents}))
    wrong = "found 'turn' with agent 'a', writes: found true, expected 'chat'"
    assert_one_line(
        run("ask", "-m", folder, "hi", "--team", path, "--layout", "turn"), 2, f"--layout: {wrong}"
    )
    path.write_text(json.dumps({"agents": agents, "layout": "turn"}))
    assert_one_line(
        run("ask", "-m", folder, "hi", "--team", path), 1, f"team.json: layout.*: {wrong}"
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_an_answer_is_printed_in_any_encoding_of_stdout(
    folder: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """With an ASCII stdout, a generated "é" raised a UnicodeEncodeError and the text was lost."""
    argv = ["ask", "-m", str(folder), "naïve 🙂?", "-n", "40", "--quiet", "--latent-steps", "1"]
    text = {}
    for encoding in ("utf-8", "ascii"):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main([*argv, *(["--json"] if as_json else [])]) == 0
        text[encoding] = stdout.buffer.getvalue().decode(encoding)
    if as_json:
        found, expected = json.loads(text["ascii"]), json.loads(text["utf-8"])
        assert (found["question"], found["text"]) == ("naïve 🙂?", expected["text"])
    else:
        assert text["ascii"] == text["utf-8"].encode("ascii", "backslashreplace").decode()


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version") == (0, f"minimas {__version__}\n", "")


def test_help_fits_into_one_hundred_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command has a help text. An unescaped "%" would be an error in argparse."""
    monkeypatch.setenv("COLUMNS", "100")
    for command in ([], ["ask"], ["check"], ["info"]):
        status, out, err = run(*command, "--help")
        assert (status, err) == (0, "") and out.startswith("usage: minimas")
        assert max(map(len, out.splitlines())) <= 100


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        ([], "expected|required|ask"),
        (["aks", "q"], "aks"),
        (["ask"], "QUESTION"),
        (["ask", "q", "--file", "q.jsonl"], "--file"),
        (["ask", ""], "QUESTION: found '', expected"),
        (["ask", " \n"], r"QUESTION: found ' \\n', expected"),
        (["ask", "q", "r"], "r"),
        (["ask", "q", "--quantize", "q5"], "--quantize: .*q5.*q4.*nf4"),
        (
            ["ask", "q", "--quantize", "q4", "--dtype", "float64"],
            "--quantize: found 'q4' with float64",
        ),
        (["ask", "q", "--latentsteps", "3"], "--latentsteps"),
        (["ask", "q", "--latent-steps"], "--latent-steps"),
        *[
            (["ask", "q", "--method", "single", flag, value], rf"{flag}: .*--method")
            for flag, value in (
                ("--team", "sequential"),
                ("--latent-steps", "3"),
                ("--align", "ridge"),
                ("--transfer", "full"),
                ("--layout", "turn"),
            )
        ],
        (["check"], "model"),
        (["ask", "q", "--team", ""], "--team: found '', expected"),
        (["remember", "-", "--json"], "--json"),
        (["check", "m", "--layout", "both"], "--layout: .*both.*turn.*chat"),
        (
            ["check", "m", "--latent-steps", "0"],
            "--latent-steps: found '0', expected a whole number, 1 or more",
        ),
        (["ask", "q", "--method", "text_mas", "--latent-steps", "3"], "--latent-steps: .*--method"),
        (["info"], "model"),
    ],
)
def test_a_wrong_flag_gives_one_line_and_status_2(run: Run, argv: list[str], pattern: str) -> None:
    """The line names the flag, found and expected, without the usage text or a traceback."""
    assert_one_line(run(*argv), 2, f"({pattern})")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("--latent-steps", v) for v in ("-1", "x", "1.5", "nan", "1" * 5000)],
        *[("--temperature", v) for v in ("-1", "x", "nan", "inf")],
        *[("--top-p", v) for v in ("0", "-1", "1.1", "x", "nan")],
        *[("--top-k", v) for v in ("-1", "0.5", "x")],
        *[("--max-new-tokens", v) for v in ("0", "-1", "x", "1e3")],
        *[("--seed", v) for v in ("-1", "x", "1.5")],
        *[("--batch-size", v) for v in ("0", "x")],
        *[(flag, "x") for flag in ("--method", "--align", "--transfer", "--kind", "--layout")],
    ],
    ids=lambda text: text[:20],
)
def test_a_wrong_value_of_a_flag_says_what_was_expected(run: Run, flag: str, value: str) -> None:
    """'invalid number value: 1.5' does not say what is wrong with 1.5."""
    argparse_text = r"invalid (int|float) value: '|invalid choice: 'x' \(choose from"
    expected = rf"{flag}.*(found .*expected|{argparse_text})"
    assert_one_line(run("ask", "q", flag, value), (1, 2), expected)


def written(name: str, content: bytes, *arguments: str) -> Callable[[Path], list[Any]]:
    """Return a function that writes a file and returns `arguments`; "@" stands for its path."""

    def make(tmp: Path) -> list[Any]:
        path = tmp / name
        path.write_bytes(content)
        return [path if argument == "@" else argument for argument in arguments]

    return make


def rows_file(content: bytes) -> Callable[[Path], list[Any]]:
    return written("q.jsonl", content, "--file", "@")


def model_file(name: str, content: bytes) -> Callable[[Path], list[Any]]:
    return written(f"model/{name}", content, "q")


def team_file(content: bytes) -> Callable[[Path], list[Any]]:
    return written("t.json", content, "q", "--team", "@")


GOOD_ROW = b'{"question": "fine?"}\n'
# Name -> a function that writes files and returns arguments of `ask`, and the error's pattern.
BAD_INPUTS: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "no such file": (lambda tmp: ["--file", tmp / "none.jsonl"], r"none\.jsonl"),
    "a folder as file": (lambda tmp: ["--file", tmp], r".*"),
    "an empty file": (rows_file(b""), r"q\.jsonl: found .*expected"),
    "a file of blank lines": (rows_file(b"\n\n"), r"q\.jsonl: .*"),
    "no JSON": (rows_file(GOOD_ROW + b"{"), r"q\.jsonl: line 2: .*JSON"),
    "too deep JSON": (rows_file(GOOD_ROW + b"[" * 100_000), r"q\.jsonl: line 2: .*JSON"),
    "no UTF-8": (rows_file(GOOD_ROW + b'{"question": "\xff"}'), r"q\.jsonl: "),
    "no object": (rows_file(GOOD_ROW + b'"q"'), r"q\.jsonl: line 2: found str, expected an object"),
    "no question": (
        rows_file(GOOD_ROW + b'{"quesiton": "q"}'),
        r"q\.jsonl: line 2: question: found .*expected",
    ),
    "a number as question": (
        rows_file(GOOD_ROW + b'{"question": 5}'),
        r"q\.jsonl: line 2: question: found 5, expected",
    ),
    "an empty question": (
        rows_file(GOOD_ROW + b'{"question": ""}'),
        r"q\.jsonl: line 2: question: found '', expected",
    ),
    "a blank question": (
        rows_file(GOOD_ROW + b'{"question": " "}'),
        r"q\.jsonl: line 2: question: found ' ', expected",
    ),
    "half a character": (
        rows_file(GOOD_ROW + b'{"question": "\\ud800"}'),
        r"(q\.jsonl: line 2|question)",
    ),
    "choices as a list": (
        rows_file(GOOD_ROW + b'{"question": "q", "choices": ["a"]}'),
        r"line 2: choices: found .*expected",
    ),
    "no choices at all": (
        rows_file(GOOD_ROW + b'{"question": "q", "choices": {}}'),
        r"line 2: choices: found .*expected",
    ),
    "half a character as argument": (lambda tmp: ["\udcff?"], r"(question|QUESTION)"),
    "no such team": (lambda tmp: ["q", "--team", "trio"], r"--team: found 'trio', expected"),
    "no such team file": (
        lambda tmp: ["q", "--team", tmp / "t.json"],
        r"No such file or directory: .*t\.json",
    ),
    "a team without agents": (team_file(b'{"agents": []}'), r"t\.json: team: found no agents"),
    "a team with a typo": (
        team_file(b'{"agents": [{"name": "a", "prompt": "p", "write": true}]}'),
        r"t\.json: .*write",
    ),
    "no such map": (
        lambda tmp: ["q", "--align", tmp / "m.safetensors"],
        r"m\.safetensors: no such file",
    ),
    "a foreign map": (
        lambda tmp: ["q", "--align", tmp / "model/model.safetensors"],
        r"model\.safetensors: format: found .*, expected minimas-aligner-1",
    ),
    "a broken team": (team_file(b"{"), r"t\.json: not valid JSON"),
    "no such dtype": (
        lambda tmp: ["q", "--dtype", "float8"],
        r"--dtype: found 'float8', expected",
    ),
    "no such device": (
        lambda tmp: ["q", "--device", "tpu"],
        r"--device: found 'tpu', expected",
    ),
    "no such model": (lambda tmp: ["q", "--model", tmp / "none"], r"none: no such folder"),
    "a file as model": (
        lambda tmp: ["q", "--model", tmp / "model/config.json"],
        r"config\.json: found a file",
    ),
    "a request beyond the context": (
        lambda tmp: ["q", "-n", "1" + "0" * 400],
        r"--max-new-tokens.*expected",
    ),
    "thoughts beyond the context": (
        lambda tmp: ["q", "--latent-steps", 10**30],
        r"--latent-steps.*expected",
    ),
    "no tokenizer": (
        lambda tmp: (tmp / "model/tokenizer.json").unlink() or ["q"],
        r"tokenizer\.json is missing",
    ),
    "a broken tokenizer": (
        model_file("tokenizer.json", b"{}"),
        r"tokenizer\.json: not a readable tokenizer",
    ),
    "a broken template": (
        model_file("chat_template.jinja", b"{% if %}"),
        r"chat_template\.jinja: ",
    ),
    "broken settings": (
        model_file("generation_config.json", b"{"),
        r"generation_config\.json: not valid JSON",
    ),
    "a wrong setting": (
        model_file("generation_config.json", b'{"do_sample": true, "top_p": 5}'),
        r"generation_config\.json: top_p.*: found 5, expected",
    ),
    "a wrong end token": (
        model_file("generation_config.json", b'{"eos_token_id": "x"}'),
        r"eos_token_id: found 'x', expected",
    ),
    "a wrong teams.json": (
        model_file("teams.json", b'{"sequential": 5}'),
        r"teams\.json: sequential",
    ),
    "a broken config": (model_file("config.json", b"{"), r"config\.json: not valid JSON"),
    "truncated weights": (model_file("model.safetensors", b"\x00" * 7), r"model\.safetensors: "),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_a_wrong_input_gives_one_line_and_fails(run: Run, tmp_path: Path, case: str) -> None:
    """It names the file, line or flag, found and expected. No earlier question is answered."""
    write_folder(tmp_path / "model", text_model(), tokenizer=TINY)
    make, pattern = BAD_INPUTS[case]
    argv = make(tmp_path)
    assert_one_line(
        run("ask", *([] if "--model" in argv else ["-m", tmp_path / "model"]), *argv),
        (1, 2),
        pattern,
    )


def test_a_map_can_be_loaded_from_a_file(run: Run, tmp_path: Path) -> None:
    """The answer equals that of the saved kind. Another kind gives another answer."""
    lm, path = load(TINY), tmp_path / "map.safetensors"
    asked = "ask", TINY_EXAMPLE, "--quiet", "--json", "--device", "cpu"
    texts = {}
    for kind in ("ridge", "random"):
        lm.aligner(kind).save(path)
        status, out, err = run(*asked, "--align", path)
        assert (status, err) == (0, "")
        told = json.loads(out)
        assert told["align"] == str(path)
        texts[kind] = told["text"]
        assert texts[kind] == json.loads(run(*asked, "--align", kind).out)["text"]
    assert texts["ridge"] != texts["random"]


def test_a_map_of_another_model_is_refused_with_status_1(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    """The error is one line, before any question is prefilled. An unknown kind gives status 2."""
    load(TINY).aligner("identity").save(tmp_path / "m.safetensors")
    outcome = run("ask", "-m", folder, "q", "--align", tmp_path / "m.safetensors")
    assert_one_line(outcome, 1, r"m\.safetensors: model: found .*expected")
    expected = "expected one of ridge, identity, prenorm, random, none or FILE.safetensors"
    assert_one_line(run("ask", "q", "--align", "fitted"), 2, f"--align.*found 'fitted', {expected}")


def test_debug_raises_the_error_with_its_traceback(run: Run, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"team.*: found 'trio'"):
        run("ask", "-m", folder, "q", "--team", "trio", "--debug")


def test_temperature_0_on_the_command_line_is_greedy(run: Run, tmp_path: Path) -> None:
    """With a repetition penalty from generation_config.json, decoding is not greedy."""
    folder = write_folder(tmp_path, text_model(), tokenizer=TINY)
    plain = run("ask", "-m", folder, "q", "-n", 12, "--temperature", 0, "--quiet")
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 2.0, "repetition_penalty": 9.0}'
    )
    assert run("ask", "-m", folder, "q", "-n", 12, "--temperature", 0, "--quiet") == plain
    assert run("ask", "-m", folder, "q", "-n", 12, "--quiet").out != plain.out


# -- info -----------------------------------------------------------------------------------------


def test_info_needs_no_weights(run: Run, tmp_path: Path) -> None:
    """Users ask whether a model fits into a GPU before they download it."""
    folder = write_folder(tmp_path, text_model(), tokenizer=TINY)
    (folder / "model.safetensors").unlink()
    status, out, err = run("info", folder)
    count = sum(weight.numel() for weight in text_model().state_dict().values())
    assert (status, err) == (0, "")
    assert "qwen3" in out and f"{count:,}" in out and "untied" in out and "bfloat16" in out
    assert "q4 " in out and "nf4 " in out and "8 GB: bfloat16, float32, q4, q8, nf4, int8" in out
    assert f"{2 * 2 * 2 * 6 * 8 / 1024:,.1f} KiB per token" in out
    assert_one_line(run("info", tmp_path / "none"), 1, "none: no such folder")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert_one_line(run("info", folder), 1, r"config\.json: model_type: found 'gpt2', expected")


@pytest.mark.parametrize("name", ["q4", "q8"])
def test_a_quantized_model_answers(run: Run, name: str) -> None:
    status, out, _ = run("ask", TINY_EXAMPLE, "--quantize", name, "--quiet", "--device", "cpu")
    assert (status, out.strip()) == (0, "12")


def test_info_describes_the_default_model(run: Run) -> None:
    status, out, _ = run("info", "weights/tiny")
    assert status == 0 and "teams.json" in out


def test_a_parameter_error_names_its_flag_and_is_a_value_error(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 2 is for a flag of the command. A parameter without a flag gives status 1."""
    assert str(ParameterError("top_p", "found 5, expected 1")) == "top_p: found 5, expected 1"
    assert pickle.loads(pickle.dumps(ParameterError("a", "b"))).parameter == "a"
    for parameter, status, shown in (("top_p", 2, "--top-p"), ("close", 1, "close")):

        def fails(*_: Any, name: str = parameter) -> None:
            raise ParameterError(name, "found 5, expected 1")

        monkeypatch.setattr("minimas.commands.load", fails)
        assert run("ask", "q") == (status, "", f"minimas: error: {shown}: found 5, expected 1\n")


# -- processes ------------------------------------------------------------------------------------


def start(*argv: Any, **options: Any) -> Process:
    command = [sys.executable, "-m", "minimas", *map(str, argv)]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    options = {"text": True, "env": env, **pipes}
    return Process(command, **options)


def test_the_first_command_works_in_any_folder(tmp_path: Path) -> None:
    """The answer is on stdout, everything else on stderr, with no warning and status 0."""
    with start("ask", TINY_EXAMPLE, cwd=tmp_path) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.strip() and "\n" not in out.strip(), err
    assert len(err.splitlines()) == 6 and "total" in err and "arning" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_error_ends_a_process_with_status_1_and_one_line(tmp_path: Path) -> None:
    with start("ask", "q", "--model", tmp_path / "none") as process:
        out, err = process.communicate(timeout=60)
    assert_one_line(Outcome(process.returncode, out, err), 1, "none: no such folder")


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_prints_the_text_so_far(folder: Path, as_json: bool) -> None:
    """It gives status 130 and one line. With --json, the record says that it was interrupted."""
    argv = [
        "ask",
        "-m",
        folder,
        "hi",
        "-n",
        90_000,
        "--latent-steps",
        1,
        *(["--json"] if as_json else []),
    ]
    with start(*argv) as process:
        assert process.stderr is not None and process.stdout is not None
        while "refiner" not in (line := process.stderr.readline()):
            assert line, "it ended before the last agent began"
        first = "" if as_json else process.stdout.read(5)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "minimas: stopped"
    if as_json:
        record = json.loads(out)
        assert (
            record["finish_reason"] == "interrupted"
            and record["question"] == "hi"
            and len(record["text"]) > 5
        )
    else:
        assert len(first + out) > 5


@pytest.mark.slow
def test_ctrl_c_during_startup_ends_quietly() -> None:
    """Before `main` ran, Ctrl-C gave a traceback from the import of torch."""
    with start("ask", "q") as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert "Traceback" not in err and process.returncode == 130, (out, err)


@pytest.mark.slow
def test_a_closed_stdout_ends_ask_quietly(folder: Path) -> None:
    """A reader that closes the pipe has read enough, so this is not an error.

    `minimas ask … | head -1` gave two tracebacks, the second from the flush at exit.
    """
    with start("ask", "-m", folder, "hi", "-n", 90_000, "--latent-steps", 0, "--quiet") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["ask", "info"])
def test_a_warning_has_a_prefix_and_quiet_leaves_it_out(command: str, tmp_path: Path) -> None:
    """A field that is ignored was reported even with --quiet, and not as a line of minimas."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"foo_bar": 3}))
    said = f"minimas: {folder}/config.json: foo_bar is unknown and ignored\n"
    argv = ["ask", TINY_EXAMPLE, "-m", folder] if command == "ask" else ["info", folder]
    with start(*argv) as process:
        _, err = process.communicate(timeout=60)
    assert said in err
    if command == "ask":
        with start(*argv, "--quiet") as process:
            _, err = process.communicate(timeout=60)
        assert err == ""


@pytest.mark.slow
def test_ctrl_c_that_ends_the_reader_of_stdout_too_is_not_a_success(folder: Path) -> None:
    """`minimas … | tee file` ended with status 0: Ctrl-C ends `tee`, which closes the pipe."""
    argv = ["ask", "-m", folder, "hi", "-n", 90_000, "--latent-steps", 1, "--json"]
    with start(*argv) as process:
        assert process.stdout is not None and process.stderr is not None
        while "refiner" not in (line := process.stderr.readline()):
            assert line, "it ended before the last agent began"
        time.sleep(0.5)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert (process.returncode, err) == (130, "\nminimas: stopped\n")


def test_a_usage_error_is_one_short_line(run: Run) -> None:
    """An argument with a line break made two lines, and a long one was repeated as a whole."""
    outcome = run("ask", "one", "two\nthree " * 1000)
    assert outcome.status == 2 and outcome.out == ""
    assert outcome.err.count("\n") == 1 and len(outcome.err) < 600


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_gives_one_line(folder: Path) -> None:
    argv = ["ask", "-m", folder, "hi", "-n", 3, "--quiet"]
    with Path("/dev/full").open("w") as full, start(*argv, stdout=full) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(r"minimas: error: .*No space left on device.*\n", err), err
