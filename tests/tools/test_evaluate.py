"""Check that an evaluation loses no results and measures what its documentation says.

The tests use weights/tiny in float32 or float64.
"""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minimas import LM, Sampling, latent_mas, load
from minimas.lens import Lens
from minimas.text.tokenizer import PromptText
from tools.evaluation import ledger
from tools.evaluation.arms import Arm, grid
from tools.evaluation.bench import Bench, same_mark, vote
from tools.evaluation.command import Evaluation, main
from tools.evaluation.grading import gold_text, grader, option_texts, plain_grader, right_letter
from tools.evaluation.last_turn import PrefillOnce, latent_turn, slots, text_turn
from tools.evaluation.ledger import Key, Ledger, remove_incomplete_units, whole_units
from tools.evaluation.rows import read_rows
from tools.evaluation.summary import summarize
from tools.training.tiny_task import split_stories, split_team, story

from ..models import TINY, reference
from ..processes import LIMIT
from ..text import load_text_lm

ROOT = TINY.parents[1]
Record = dict[str, Any]
GRID = (
    "--method single,latent_mas --latent-steps 2 --transfer full,shuffled "
    "--metric accuracy,nll --max-new-tokens 6"
)
FIXED = f"{GRID} --dtype float32 --batch-size 3 --quiet".split()


def write_data(path: Path, count: int) -> Path:
    """Write questions that weights/tiny was not trained on."""
    rng, rows = random.Random("evaluate"), []
    for i in range(count):
        told = story(rng, rng.choice((3, 4, 5)), fresh=True)
        gold = str(told.totals[-1])
        rows.append(
            {"id": f"q-{i}", "question": told.question, "answer": gold, "solution": f" {gold}"}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "eight.jsonl", 8)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run. Tests must not change it."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert main(["--data", str(data), "--out", str(folder), *FIXED]) == 0
    return folder


def lines(folder: Path, name: str = "results.jsonl") -> list[Record]:
    """Return all records without the head and without measured times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k != "seconds"}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return [timeless(json.loads(line)) for line in (folder / name).read_text().splitlines()[1:]]


def copied(folder: Path, to: Path, edit: Callable[[bytes], bytes] = bytes) -> Path:
    """Return a copy of a run's folder with edited results."""
    to.mkdir()
    (to / "results.jsonl").write_bytes(edit((folder / "results.jsonl").read_bytes()))
    return to


# -- saving and resuming ---------------------------------------------------------------------------


def test_a_run_has_a_line_for_each_question_arm_and_seed(data: Path, finished: Path) -> None:
    """The file has exact prompts, token counts and settings, so that it can be read on its own."""
    found = lines(finished)
    assert len(found) == 8 * (2 + 4)
    assert len({(r["id"], r["arm"], r["seed"]) for r in found}) == len(found)
    head = json.loads((finished / "results.jsonl").read_text().splitlines()[0])
    assert "id" not in head
    assert {"settings", "torch", "python", "device", "model", "git", "math_verify"} <= head.keys()
    said = next(r for r in found if r["method"] == "latent_mas" and r["metric"] == "accuracy")
    assert [agent["name"] for agent in said["agents"]] == ["planner", "critic", "refiner", "judger"]
    [again] = latent_mas(
        load(TINY, device="cpu", dtype="float32"),
        [json.loads(data.read_text().splitlines()[0])["question"]],
        latent_steps=2, sampling=Sampling(max_new_tokens=6),
    )  # fmt: skip
    assert (said["text"], said["answer"]) == (again.text, again.answer)
    assert [agent["prompt"] for agent in said["agents"]] == [agent.prompt for agent in again.agents]
    assert (said["read"], said["thought"]) == (again.usage.prompt_tokens, 6)
    summary = json.loads((finished / "summary.json").read_text())
    assert len(summary["arms"]) == 6
    assert not [
        path
        for path in finished.iterdir()
        if path.name.startswith("results") and path.suffix != ".jsonl"
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer Pythons warn about any fork
def test_a_run_that_was_killed_ten_times_gives_the_same_file(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    """A run that is killed at any moment can be resumed.

    The head does not change, and no line is saved twice.
    """
    command, rng, unfinished = (
        ["--data", str(data), "--out", str(tmp_path), *FIXED],
        random.Random(0),
        0,
    )
    start = time.perf_counter()
    main(["--data", str(data), "--out", str(tmp_path / "timed"), *FIXED])
    whole = time.perf_counter() - start
    for _ in range(10):
        process = multiprocessing.get_context("fork").Process(target=main, args=(command,))
        process.start()
        time.sleep(rng.uniform(0.05, 0.4) * whole)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        unfinished += not (tmp_path / "summary.json").exists()
    assert unfinished > 1, "the kills came too late to say anything"
    assert main(command) == 0
    assert lines(tmp_path) == lines(finished)


@pytest.mark.parametrize("cut", range(6))
def test_a_run_with_a_truncated_file_is_completed(
    cut: int, finished: Path, data: Path, tmp_path: Path
) -> None:
    """The cut may be in the head, in a line, between two lines of a batch, or after a batch.

    An incomplete batch is computed again.
    """

    def cut_off(found: bytes) -> bytes:
        ends = [i + 1 for i, byte in enumerate(found) if byte == 10]
        return found[: [40, ends[0], ends[0] + 9, ends[1], ends[3], ends[25] + 200][cut]]

    folder = copied(finished, tmp_path / "run", cut_off)
    assert main(["--data", str(data), "--out", str(folder), *FIXED]) == 0
    assert lines(folder) == lines(finished)


def test_a_finished_run_computes_nothing_again(
    finished: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished / "results.jsonl").read_bytes()
    monkeypatch.setattr(Bench, "compute", None)
    assert main(["--data", str(data), "--out", str(finished), *FIXED]) == 0
    assert (finished / "results.jsonl").read_bytes() == before


def test_ctrl_c_keeps_finished_results(
    finished: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, compute, count = (
        ["--data", str(data), "--out", str(tmp_path), *FIXED],
        Bench.compute,
        0,
    )

    def interrupted(*args: Any) -> list[Record]:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return compute(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "compute", interrupted)
        assert main(command) == 130
    assert "keeps finished results" in capsys.readouterr().err
    assert len(lines(tmp_path)) == 9
    assert main(command) == 0
    assert lines(tmp_path) == lines(finished)


def test_a_full_disk_gives_one_line_and_the_run_can_be_resumed(
    finished: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The part of a unit that was written before the error is removed."""
    command, sync, count = ["--data", str(data), "--out", str(tmp_path), *FIXED], os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(ledger.os, "fsync", full)
        assert main(command) == 1
    said = capsys.readouterr().err
    assert "the disk is full; earlier results are kept" in said
    assert said.count("\n") == 1
    assert len(lines(tmp_path)) == 6
    assert main(command) == 0
    assert lines(tmp_path) == lines(finished)


@pytest.mark.slow
def test_two_ranks_give_the_same_answers_as_one(finished: Path, data: Path, tmp_path: Path) -> None:
    """Ranks take whole batches in turn, and write one file each and one table.

    Shuffled pairs may belong to different ranks.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += ["tools/evaluate.py", "--data", str(data), "--out", str(tmp_path), *FIXED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    ranks = [lines(tmp_path, f"results-rank{rank}.jsonl") for rank in (0, 1)]
    assert [{r["batch"] for r in found} for found in ranks] == [{0, 2}, {1}]
    assert sorted(map(json.dumps, ranks[0] + ranks[1])) == sorted(map(json.dumps, lines(finished)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: line["n"] for name, line in summary["arms"].items()} == dict.fromkeys(
        summary["arms"], 8
    )
    assert (
        main(["--data", str(data), "--out", str(tmp_path), *FIXED]) == 0
    )  # one process, nothing left to do
    assert not lines(tmp_path)


# -- refused runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--latent-steps", "3"], r"latent_steps (--latent-steps): found [2], expected [3]"),
        (["--temperature", "0.5"], "temperature (--temperature): found 0.0, expected 0.5"),
        (["--limit", "4"], "limit (--limit): found null, expected 4"),
        (["--seeds", "0,1"], "seeds (--seeds): found [0], expected [0, 1]"),
        (["--dtype", "float64"], 'dtype (--dtype): found "float32", expected "float64"'),
        (["--lens", "3"], "lens (--lens): found null, expected 3"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(
    flags: list[str], named: str, finished: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file must not mix results of two runs."""
    before = (finished / "results.jsonl").read_bytes()
    assert main(["--data", str(data), "--out", str(finished), *FIXED, *flags]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "results.jsonl: line 1: " in said
    assert named in said
    assert (finished / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("number", "edit", "said"),
    [
        (5, lambda line: line[:30], "line 5: not valid JSON"),
        (
            5,
            lambda line: line.replace(b'"q-0"', b'"q-9"'),
            "line 5: id: found 'q-9', expected 'q-0'",
        ),
        (
            3,
            lambda line: line.replace(b'"seed": 0', b'"seed": 7'),
            "line 3: id: found 'q-1', expected 'q-1'",
        ),
        (2, lambda line: line.replace(b'"batch": 0', b'"batch": 77'), "line 2: found (77, "),
        (1, lambda line: b"{}", "line 1: found b'{}"),
        (5, lambda line: b"[]", "line 5: found b'[]"),
    ],
)
def test_a_corrupt_line_in_the_middle_is_refused_with_its_number(
    number: int, edit: Callable[[bytes], bytes], said: str,
    finished: Path, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Cutting the file at the bad line would silently lose good results.

    Nothing may be cut before the whole file has been read.
    """

    def corrupt(found: bytes) -> bytes:
        parts = found.split(b"\n")
        parts[number - 1] = edit(parts[number - 1])
        return b"\n".join(parts)[:-50]

    folder = copied(finished, tmp_path / "run", corrupt)
    before = (folder / "results.jsonl").read_bytes()
    assert main(["--data", str(data), "--out", str(folder), *FIXED]) == 1
    error = capsys.readouterr().err
    assert f"results.jsonl: {said}" in error
    assert error.count("\n") == 1
    assert (folder / "results.jsonl").read_bytes() == before


def test_a_duplicate_unit_is_refused(tmp_path: Path) -> None:
    """The table would count it twice, in one file or in two."""
    units = {Key(0, "a", 0): ["x"], Key(1, "a", 0): ["y"]}
    unit = [{"id": "x", "batch": 0, "arm": "a", "seed": 0}]
    for name in ("results-rank0.jsonl", "results-rank1.jsonl"):
        book = Ledger(tmp_path / name, {"settings": {}})
        book.append(unit)
        book.close()
    with pytest.raises(ValueError, match=r"rank1.jsonl: found \(0, 'a', 0\), which another file"):
        remove_incomplete_units(tmp_path, {}, units)
    book = Ledger(tmp_path / "results-rank0.jsonl", {"settings": {}})
    book.append(unit)
    book.close()
    with pytest.raises(ValueError, match=r"line 3: found \(0, 'a', 0\) a second time"):
        whole_units(tmp_path / "results-rank0.jsonl", units)


def test_two_processes_cannot_write_to_one_file(tmp_path: Path) -> None:
    """The same command may be started a second time in another window."""
    book = Ledger(tmp_path / "results.jsonl", {"settings": {}})
    with pytest.raises(ValueError, match="another process is writing to it"):
        remove_incomplete_units(tmp_path, {}, {})
    book.close()


ONE = [{"id": "x", "batch": 0, "arm": "a", "seed": 0}]
ANOTHER = [{"id": "y", "batch": 1, "arm": "a", "seed": 0}]
TWO_UNITS = {Key(0, "a", 0): ["x"], Key(1, "a", 0): ["y"]}


def write_unit(path: Path, unit: list[Record]) -> None:
    book = Ledger(path, {"settings": {}})
    book.append(unit)
    book.close()


def test_a_unit_written_while_another_process_resumes_the_run_is_not_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length of the file was read before another process appended a unit.

    Then the file was cut to the old length. Now the other process cannot write at that time.
    """
    path = tmp_path / "results.jsonl"
    write_unit(path, ONE)

    def read_and_interrupted(path: Path, units: Any) -> Any:
        found = whole_units(path, units)
        with pytest.raises(ValueError, match="another process is writing to it"):
            write_unit(path, ANOTHER)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "whole_units", read_and_interrupted)
        done, sizes = remove_incomplete_units(tmp_path, {}, TWO_UNITS)
    assert done == {Key(0, "a", 0)}
    assert sizes == {"results.jsonl": path.stat().st_size}


def test_a_unit_written_after_a_run_was_resumed_is_not_computed_again(
    tmp_path: Path,
) -> None:
    """The unit would be in the file twice, and the file would be refused from then on."""
    path = tmp_path / "results.jsonl"
    write_unit(path, ONE)
    _, sizes = remove_incomplete_units(tmp_path, {}, TWO_UNITS)
    write_unit(path, ANOTHER)
    with pytest.raises(ValueError, match=r"results.jsonl: found \d+ bytes, expected \d+: another"):
        Ledger(path, {"settings": {}}, sizes[path.name])
    done, sizes = remove_incomplete_units(tmp_path, {}, TWO_UNITS)
    assert done == set(TWO_UNITS)
    Ledger(path, {"settings": {}}, sizes[path.name]).close()


def test_two_processes_that_start_a_run_write_one_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process opened the new file while it was empty.

    It locked it only after the first process had ended.
    """
    path, lock = tmp_path / "results.jsonl", ledger.lock

    def late(path: Path, file: Any) -> None:
        monkeypatch.setattr(ledger, "lock", lock)
        write_unit(path, ONE)
        lock(path, file)

    monkeypatch.setattr(ledger, "lock", late)
    Ledger(path, {"settings": {}}).close()
    found = path.read_text().splitlines()
    assert [json.loads(line) for line in found] == [{"settings": {}}, *ONE]


def test_a_file_that_was_replaced_before_its_lock_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--regrade` replaces the file.

    Records that are appended to the old file would be lost.
    """
    path, lock = tmp_path / "results.jsonl", ledger.lock
    write_unit(path, ONE)

    def late(path: Path, file: Any) -> None:
        (tmp_path / "new").write_bytes(path.read_bytes())
        (tmp_path / "new").replace(path)
        lock(path, file)

    monkeypatch.setattr(ledger, "lock", late)
    with pytest.raises(ValueError, match=r"results.jsonl: another process has replaced it"):
        Ledger(path, {"settings": {}})


@pytest.mark.slow
def test_without_fcntl_an_error_says_what_is_needed(tmp_path: Path) -> None:
    """On Windows, even `--help` gave a traceback.

    A run is refused before a model is loaded.
    """
    code = (
        "import runpy, sys; sys.modules['fcntl'] = sys.modules['resource'] = None; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for flags, status, stdout in (
        (["--help"], 0, "usage: evaluate"),
        (["--model", "nowhere", "--task", "gsm8k", "--out", str(tmp_path / "run")], 1, ""),
    ):
        command = [sys.executable, "-c", code, "tools/evaluate.py", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == status, done.stderr
        assert done.stdout.startswith(stdout)
    expected = (
        "found no module fcntl, which is needed to lock the result files, expected Linux, macOS"
    )
    assert done.stderr.startswith(f"evaluate: error: {expected}")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_running_programs_without_a_sandbox_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error comes before a model is loaded, not at the first question with a program."""
    monkeypatch.setattr(sys, "platform", "win32")
    command = ["--model", "nowhere", "--task", "mbppplus", "--out", str(tmp_path / "run")]
    assert main([*command, "--run-untrusted-code"]) == 1
    error = "evaluate: error: sandbox: found platform win32, expected linux\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--align", "rigde"], 2, "argument --align: found 'rigde', expected one of ridge"),
        (
            ["--method", "single,dual"],
            2,
            "argument --method: found 'dual', expected single, text_mas, latent_mas",
        ),
        (
            ["--latent-steps", "1,-1"],
            2,
            "argument --latent-steps: found '-1', expected a whole number, 0 or more",
        ),
        (["--data", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["--task", "gsm8k"], 1, "found both of them, expected --task or --data"),
        (["--replay", "q-99"], 1, "replay (--replay): found 'q-99'"),
        # With one question, the control arm got the question's own KV cache.
        (["--limit", "1", "--transfer", "shuffled"], 1, "found 'shuffled' with one question"),
    ],
)
def test_a_wrong_flag_gives_one_line(
    flags: list[str],
    status: int,
    said: str,
    finished: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        found = main(["--data", str(data), "--out", str(finished), *FIXED, *flags])
    except SystemExit as stop:
        found = int(str(stop.code))
    error = capsys.readouterr().err
    assert (found, error.count("\n")) == (status, 1)
    assert said in error


def test_a_layout_that_a_team_cannot_have_is_refused_before_any_arm_runs(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The arms in layout chat of the first batch ran for minutes before the error."""
    writer = {"name": "writer", "prompt": "{question}", "writes": True}
    team = tmp_path / "team.json"
    team.write_text(json.dumps({"agents": [writer, {"name": "last", "prompt": "{question}"}]}))
    argv = ["--data", str(data), "--team", str(team), "--layout", "chat,turn"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "layout (--layout): found 'turn' with agent 'writer', writes: found true" in error
    assert not (tmp_path / "run").exists()


def test_a_team_for_rows_that_have_their_own_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both arms ran with the rows' own teams, and were recorded as two teams."""
    argv = ["--task", "split_evidence", "--limit", "1", "--latent-steps", "0", "--quiet"]
    argv += ["--max-new-tokens", "1", "--out", str(tmp_path / "run")]
    assert main([*argv, "--team", "hierarchical,sequential"]) == 1
    assert (
        "team (--team): found ['hierarchical', 'sequential'] with rows" in capsys.readouterr().err
    )
    assert main(argv) == 0
    [_, row] = map(json.loads, (tmp_path / "run" / "results.jsonl").read_text().splitlines())
    assert row["team"] is None


# -- replay and regrade ----------------------------------------------------------------------------


def test_replay_finds_the_same_answer_or_the_agent_that_differs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--replay` needs only the folder and the question. Everything else is in the head."""
    assert main(["--out", str(finished), "--replay", "q-4"]) == 0
    assert capsys.readouterr().out.count(": the same\n") == 6

    def altered(found: bytes) -> bytes:
        parts = found.decode().splitlines()
        for i, part in enumerate(parts):
            record = json.loads(part)
            if (
                record.get("id") == "q-4"
                and record["metric"] == "accuracy"
                and record["method"] == "latent_mas"
            ):
                agent = record["agents"][2] if record["transfer"] == "full" else record["agents"][3]
                agent["mark"][0] *= 1.01
                record["agents"][3]["text"] += "."
                parts[i] = json.dumps(record)
        return "\n".join(parts).encode() + b"\n"

    folder = copied(finished, tmp_path / "run", altered)
    assert main(["--out", str(folder), "--replay", "q-4"]) == 1
    said = capsys.readouterr().out
    assert "differs at agent 3, refiner: memory" in said
    assert "differs at agent 4, judger: text" in said
    assert said.count("the same") == 4


def test_regrade_grades_the_saved_texts_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A better grading rule needs no new run. Grading again without a change has no effect."""
    wrong = copied(
        finished,
        tmp_path / "run",
        lambda found: found.replace(b'"correct": true', b'"correct": false'),
    )
    assert main(["--out", str(wrong), "--regrade"]) == 0
    right = sum(r["correct"] is True for r in lines(finished))
    assert f"{right} grades changed" in capsys.readouterr().err
    assert lines(wrong) == lines(finished)
    assert main(["--out", str(wrong), "--regrade"]) == 0
    assert "0 grades changed" in capsys.readouterr().err


def test_regrade_keeps_line_separators_inside_texts(finished: Path, tmp_path: Path) -> None:
    """U+2028 in a text does not end a line, and an incomplete line is not a record."""
    odd = "one\u2028two\x85three\ud800"

    def altered(found: bytes) -> bytes:
        first, *rest = found.split(b"\n")[:-1]
        texts = [json.loads(line) for line in rest]
        for record in texts:
            record |= {"text": odd} if record["metric"] == "accuracy" else {}
        told = [
            json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass")
            for record in texts
        ]
        return b"\n".join([first, *told, b'{"id": "q'])

    folder = copied(finished, tmp_path / "run", altered)
    assert main(["--out", str(folder), "--regrade"]) == 0
    found = [
        json.loads(line) for line in (folder / "results.jsonl").read_bytes().split(b"\n")[1:-1]
    ]
    assert [r["correct"] for r in found if r["metric"] == "accuracy"] == [False] * 24
    assert {r["text"] for r in found if r["metric"] == "accuracy"} == {odd}


def test_regrade_does_not_replace_the_file_of_a_running_process(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run appends to the file that it has opened.

    If the file were replaced, all later results would be lost.
    """
    folder = copied(finished, tmp_path / "run")
    running = Ledger(folder / "results.jsonl", {})
    assert main(["--out", str(folder), "--regrade"]) == 1
    assert "another process is writing to it" in capsys.readouterr().err
    running.close()
    assert main(["--out", str(folder), "--regrade"]) == 0


def test_regrade_may_run_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Running programs is a setting of the grading, not of the texts.

    The head says how the texts were graded.
    """
    data, out = tmp_path / "code.jsonl", tmp_path / "run"
    data.write_text(
        json.dumps(
            {"id": "one", "question": "Write f.", "tests": "assert True", "entry_point": "f"}
        )
    )
    short = ["--method", "single", "--max-new-tokens", "4", "--dtype", "float32", "--quiet"]
    assert main(["--data", str(data), "--out", str(out), *short]) == 0
    assert lines(out)[0]["correct"] is None
    assert main(["--out", str(out), "--regrade", "--run-untrusted-code"]) == 0
    assert lines(out)[0]["correct"] is not None
    head = json.loads((out / "results.jsonl").read_text().splitlines()[0])
    assert "sandbox" in head["code"]
    same = ["--data", str(data), "--out", str(out), *short]
    assert main([*same, "--run-untrusted-code"]) == 0
    assert main(same) == 1
    assert "run_untrusted_code" in capsys.readouterr().err


def test_the_contents_of_files_are_settings_of_a_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A team file that was edited between two batches gave one result file for two teams."""
    team, out = tmp_path / "team.json", tmp_path / "run"
    agents = [{"name": "a", "prompt": "Plan: {question}"}, {"name": "b", "prompt": "{question}"}]
    team.write_text(json.dumps({"agents": agents}))
    command = [
        "--data",
        str(data),
        "--out",
        str(out),
        "--team",
        str(team),
        "--latent-steps",
        "1",
        "--quiet",
    ]
    command += ["--max-new-tokens", "2", "--limit", "2"]
    assert main(command) == 0
    assert main(command) == 0
    agents[0]["prompt"] = "Plan nothing: {question}"
    team.write_text(json.dumps({"agents": agents}))
    assert main(command) == 1
    assert "teams: found" in capsys.readouterr().err
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    sampled = [
        "--model",
        str(model),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "sampled"),
        *command[4:],
    ]
    assert main(sampled) == 0
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 3}))
    assert main(sampled) == 1
    assert "sampling: found" in capsys.readouterr().err


def test_an_incomplete_table_is_not_a_success(
    finished: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks without a common folder each printed half of the questions, with status 0."""
    folder = copied(
        finished, tmp_path / "run", lambda found: b"\n".join(found.split(b"\n")[:4]) + b"\n"
    )
    monkeypatch.setattr(Evaluation, "run", lambda self: None)
    assert main(["--data", str(data), "--out", str(folder), *FIXED]) == 1
    assert "found 1 of 18 units, 17 are missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "edit",
    [
        '"seed": [0]',
        '"seed": "0"',
        '"seconds": "x"',
        '"correct": "yes"',
        '"text": 3',
        '"agents": {}',
    ],
)
def test_a_record_of_the_wrong_type_is_refused_with_its_line(
    edit: str, finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def altered(found: bytes) -> bytes:
        parts = found.decode().splitlines()
        field, value = json.loads("{" + edit + "}").popitem()
        parts[3] = json.dumps(json.loads(parts[3]) | {field: value})
        return "\n".join(parts).encode() + b"\n"

    folder = copied(finished, tmp_path / "run", altered)
    assert main(["--data", str(data), "--out", str(folder), *FIXED]) == 1
    assert "results.jsonl: line 4" in capsys.readouterr().err


def test_an_error_names_the_questions_of_its_batch(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ "Question 2" of a batch is another question in the file."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[4]["question"] = "Eva has 2 cards. " * 5000
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["--data", str(long), "--out", str(tmp_path / "run"), *FIXED]) == 1
    assert "questions q-3, q-4, q-5:" in capsys.readouterr().err


# -- what is measured ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm() -> LM:
    return load_text_lm(TINY)


QUESTIONS = ["Eva has 2 cards. How many?", "Tom?", "Ann has 8 books. She finds 1 more."]


@pytest.mark.parametrize("steps", [0, 2])
def test_gold_nll_equals_one_forward_pass_over_the_whole_text(lm: LM, steps: int) -> None:
    """The loss equals that of one dense forward pass of another implementation over all inputs.

    Rows and texts have different lengths.
    """
    texts = [[" 4 5", "9"], [" 7"], ["no <|im_end|> at all"]]
    found = latent_turn(lm, QUESTIONS, latent_steps=steps, sampling=Sampling()).losses(texts)
    tokenizer, model, align = lm.tokenizer, lm.model, lm.aligner("ridge")
    assert tokenizer is not None
    for q, question in enumerate(QUESTIONS):
        *before, last = lm.teams["sequential"].agents
        x = model.embed(torch.tensor([], dtype=torch.int64))
        for agent in before:
            turn = tokenizer.turn(agent.prompt.replace("{question}", question))
            x = torch.cat([x, model.embed(torch.tensor(tokenizer.encode_turn(turn)))])
            for _ in range(steps):
                x = torch.cat([x, align(reference(model, x)[-1:])])
            x = torch.cat([x, model.embed(torch.tensor(tokenizer.encode(tokenizer.turn_end)))])
        turn = tokenizer.turn(last.prompt.replace("{question}", question))
        x = torch.cat([x, model.embed(torch.tensor(tokenizer.encode_turn(turn)))])
        for text, loss in zip(texts[q], found[q], strict=True):
            ids = tokenizer.encode_turn(PromptText.from_user(text))
            hidden = reference(model, torch.cat([x, model.embed(torch.tensor(ids))]))[
                len(x) - 1 : -1
            ]
            expected = -model.logits(hidden).log_softmax(-1)[range(len(ids)), ids].sum()
            assert loss.tokens == len(ids)
            assert abs(loss.total - float(expected)) <= 1e-9 * float(expected)


def test_methods_that_pass_text_also_have_a_gold_nll(lm: LM) -> None:
    """It works after a turn with the texts of other agents, and after a single prompt."""
    alone = text_turn(lm, QUESTIONS, None).losses([[" 4"]] * 3)
    team = text_turn(lm, QUESTIONS, "sequential", sampling=Sampling(max_new_tokens=3)).losses(
        [[" 4"]] * 3
    )
    assert all(abs(a[0].total - b[0].total) > 1e-6 for a, b in zip(alone, team, strict=True))


@pytest.mark.parametrize("text", ["", " 1" * 5000])
def test_an_empty_or_too_long_solution_is_refused_with_its_question(lm: LM, text: str) -> None:
    with pytest.raises(ValueError, match="question 2: found"):
        latent_turn(lm, QUESTIONS, latent_steps=0).losses([["1"], [text], ["1"]])


def test_a_prompt_that_arms_share_is_prefilled_once_without_changing_results(lm: LM) -> None:
    """The first agent's prompt is the same for every map and number of steps."""
    once = PrefillOnce()
    for steps, align in ((0, "ridge"), (3, "ridge"), (3, "random"), (3, "ridge")):
        how: dict[str, Any] = {"latent_steps": steps, "align": align}
        plain = latent_turn(lm, QUESTIONS, **how).losses([["1 2"]] * 3)
        assert plain == latent_turn(lm, QUESTIONS, once=once, **how).losses([["1 2"]] * 3)
    assert len(once.prefilled) == 1


def rows(count: int, tmp_path: Path) -> list[Record]:
    return read_rows(write_data(tmp_path / "rows.jsonl", count))


@pytest.mark.parametrize("metric", ["accuracy", "nll"])
def test_shuffled_pairs_follow_the_order_of_the_data_for_every_batch_size(
    metric: str, tmp_path: Path
) -> None:
    """Question i gets the KV cache of question i + 1, even from another batch.

    If all questions are in one batch, the result equals that of the library.
    """
    lm, some = load(TINY, device="cpu", dtype="float64"), rows(5, tmp_path)
    arm = Arm("shuffled", metric=metric, latent_steps=3, align="ridge", transfer="shuffled")
    found = []
    for size in (1, 2, 5):
        bench = Bench(lm, some, size, Sampling(max_new_tokens=4), plain_grader)
        found.append(
            [
                record
                for batch in range(len(bench.batches))
                for record in bench.compute(batch, arm, 0)
            ]
        )
    assert [record["id"] for record in found[0]] == [row["id"] for row in some]
    for records in found[:2]:
        for record, other in zip(records, found[2], strict=True):
            if metric == "nll":
                assert abs(record["nll"] - other["nll"]) < 1e-9
            else:
                assert record["text"] == other["text"]
                assert [a["prompt"] for a in record["agents"]] == [
                    a["prompt"] for a in other["agents"]
                ]
    if metric == "accuracy":
        questions = [row["question"] for row in some]
        expected = latent_mas(
            lm, questions, latent_steps=3, transfer="shuffled", sampling=Sampling(max_new_tokens=4)
        )
        assert [record["text"] for record in found[2]] == [result.text for result in expected]


def test_a_row_can_have_its_own_team(tmp_path: Path) -> None:
    """With split facts and shuffled, the KV cache is from the next row's team.

    The question is that of the row itself.
    """
    rng, some = random.Random(0), []
    for i in range(3):
        stories, asked = split_stories(rng, fresh=True)
        team = split_team([told.text for told in stories])
        row = {
            "id": str(i),
            "question": asked.ask,
            "answer": str(asked.totals[-1]),
            "kind": "math",
            "team": team,
        }
        some.append(row)
    bench = Bench(load(TINY, device="cpu"), some, 2, Sampling(max_new_tokens=6), plain_grader)
    full = [
        r for b in (0, 1) for r in bench.compute(b, Arm("full", align="ridge", transfer="full"), 0)
    ]
    assert all(record["correct"] for record in full)
    other = [
        r
        for b in (0, 1)
        for r in bench.compute(b, Arm("shuffled", align="ridge", transfer="shuffled"), 0)
    ]
    for i, record in enumerate(other):
        assert record["agents"][0]["prompt"] == full[(i + 1) % 3]["agents"][0]["prompt"]
        assert record["agents"][-1]["prompt"] == full[i]["agents"][-1]["prompt"]


@pytest.mark.parametrize("gold", ["b", "B", "(b)", "two"])
@pytest.mark.parametrize("keys", ["ab", "AB"])
def test_a_gold_option_in_any_form_is_its_letter(gold: str, keys: str) -> None:
    """A gold answer with a capital letter was not matched to its option.

    Its loss was that of another text, and the option with the lowest loss counted as wrong.
    """
    row = {
        "id": "a",
        "question": "Which?",
        "answer": gold,
        "choices": dict(zip(keys, ["one", "two"], strict=True)),
    }
    assert right_letter(row) == keys[1]
    assert gold_text(row) == option_texts(row)[keys[1]]


def test_each_option_has_a_loss_and_the_lowest_is_the_answer(lm: LM) -> None:
    """Options are boxed letters if they are shown, and boxed texts if they are not."""
    shown = {
        "id": "a",
        "question": "Which?",
        "answer": "b",
        "choices": {"a": "one", "b": "two"},
        "kind": "choice",
    }
    hidden = shown | {"id": "b", "answer": "two", "kind": "math"}
    bench = Bench(lm, [shown, hidden], 2, Sampling(), plain_grader)
    for row, record in zip(
        (shown, hidden), bench.compute(0, Arm("single", "single", "nll"), 0), strict=True
    ):
        texts = [
            rf"\boxed{{{letter if row is shown else text}}}"
            for letter, text in row["choices"].items()
        ]  # type: ignore[attr-defined]
        kind = {"kind": row["kind"], "choices": row["choices"]}
        [expected] = text_turn(lm, ["Which?"], None, **kind).losses([texts])
        for found, loss in zip(record["options"].values(), expected, strict=True):
            assert abs(found - loss.total) < 1e-9
        assert record["answer"] == min("ab", key=record["options"].__getitem__)
        assert record["correct"] == (record["answer"] == "b")


def test_a_grid_has_no_duplicate_arms() -> None:
    """Settings without an effect must not multiply arms.

    `single` has no latent steps, and with 0 steps no map is used.
    """
    lists = {"team": ["sequential"], "latent_steps": [0, 5], "align": ["ridge", "pause"]}
    found = grid(method=["single", "text_mas", "latent_mas"], **lists)
    assert [(arm.method, arm.latent_steps, arm.align) for arm in found] == [
        ("single", None, None), ("text_mas", None, None), ("latent_mas", 0, None),
        ("latent_mas", 5, "ridge"), ("latent_mas", 5, "pause"),
    ]  # fmt: skip
    assert len({arm.name for arm in found}) == 5


def test_a_grid_has_one_arm_per_layout_and_varies_close_only_for_chat() -> None:
    """`--layout turn,chat --close yes,no` gives three arms.

    Without a KV cache, the last agent is the same in both layouts.
    """
    lists = {"transfer": ["full", "none"], "close": [True, False], "layout": ["turn", "chat"]}
    found = grid(method=["latent_mas"], **lists)
    full = [(arm.layout, arm.close) for arm in found if arm.transfer == "full"]
    assert full == [("turn", None), ("chat", True), ("chat", False)]
    assert [arm.name for arm in found if arm.transfer == "none"] == ["latent_mas transfer=none"]


def test_a_layout_that_changes_the_last_prompt_is_an_arm_without_a_cache_too() -> None:
    """`chat:lead` was dropped beside `chat`, although its last agent has another prompt."""
    lists = {"transfer": ["none"], "layout": ["turn", "chat", "chat:lead", "assistant"]}
    found = [arm.layout for arm in grid(method=["latent_mas"], **lists)]
    assert found == ["turn", "chat:lead", "assistant"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "full,none"], "arms (--arms): found without --audit"),
        (["--diagnose", "9"], "diagnose (--diagnose): found without --audit"),
        (["--samples", "5"], "samples (--samples): found no single agent"),
        (["--samples", "5", "--method", "single", "--metric", "nll"], "samples (--samples): found"),
        (["--samples", "5", "--audit", "--arms", "full,none"], "samples (--samples): found"),
        (["--out", "FILE"], "a file, expected a folder"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ordinary run started, and the flag was ignored."""
    data = write_data(tmp_path / "rows.jsonl", 2)
    flags = [str(data) if flag == "FILE" else flag for flag in flags]
    out = [] if "--out" in flags else ["--out", str(tmp_path / "run")]
    assert main(["--data", str(data), *out, *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_repeated_value_of_a_list_is_used_once(tmp_path: Path) -> None:
    """The page of a run with --seeds 0,0 called it not finished."""
    data, out = write_data(tmp_path / "rows.jsonl", 2), tmp_path / "run"
    flags = ["--seeds", "0,0", "--metric", "nll,nll", "--latent-steps", "1"]
    assert main(["--data", str(data), "--out", str(out), *flags]) == 0
    assert json.loads((out / "results.jsonl").read_text().splitlines()[0])["settings"]["seeds"] == [
        0
    ]


def test_n_counts_the_answers_that_were_graded(tmp_path: Path) -> None:
    """One of two rows is code that was not run: "n 2, 100 %" had the interval of one answer."""
    data = write_data(tmp_path / "rows.jsonl", 1)
    code = {"id": "c", "question": "Write f.", "answer": "assert f()", "kind": "code"}
    data.write_text(data.read_text() + json.dumps(code) + "\n")
    flags = ["--method", "single", "--max-new-tokens", "4"]
    assert main(["--data", str(data), "--out", str(tmp_path / "run"), *flags]) == 0
    assert "| single | 1 of 2 |" in (tmp_path / "run" / "summary.md").read_text()


def test_an_arms_layout_is_the_layout_of_its_team(lm: LM) -> None:
    rows = [{"id": "a", "question": QUESTIONS[0], "answer": "1"}]
    bench = Bench(lm, rows, 1, Sampling(max_new_tokens=2), plain_grader)
    for layout, turns in (("turn", 1), ("chat", 4)):
        [record] = bench.compute(0, Arm("one", latent_steps=1, layout=layout), 0)
        text = "".join(agent["prompt"] for agent in record["agents"])
        assert record["layout"] == layout and text.count("<|im_start|>assistant") == turns


def test_arms_without_a_memory_are_one_arm() -> None:
    """`--transfer full,none` with four settings of latent steps gives four arms and one control."""
    lists = {
        "latent_steps": [0, 5],
        "align": ["ridge", "pause"],
        "transfer": ["full", "none"],
        "close": [True, False],
    }
    found = grid(method=["latent_mas"], **lists)
    [control] = [arm for arm in found if arm.transfer == "none"]
    assert control.name == "latent_mas transfer=none"
    assert len(found) == 1 + 2 * 3
    # The last agent may have latent steps too, and then the map matters again.
    assert (
        len([arm for arm in grid(True, method=["latent_mas"], **lists) if arm.transfer == "none"])
        == 2 * 3
    )


def test_a_vote_goes_to_the_most_frequent_answer_and_counts_all_costs() -> None:
    """Of equally frequent answers, the first wins.

    A text without an answer does not vote, even if there are three of them.
    """
    costs = {"read": 1, "thought": 0, "written": 2, "seconds": 0.5}

    def sample(answer: str | None) -> Record:
        return {"answer": answer, "text": str(answer), **costs}

    won = vote([sample(answer) for answer in (None, "4", None, "5", None, "5")])
    assert (won["answer"], won["written"], won["seconds"]) == ("5", 12, 3.0)
    assert vote([sample("4"), sample("5")])["answer"] == "4"
    assert vote([sample(None), sample(None)])["answer"] is None


def test_samples_of_a_question_differ_and_are_reproducible(tmp_path: Path) -> None:
    """A vote over copies of one greedy answer has no meaning. A resumed vote must be the same."""
    sampling = Sampling(max_new_tokens=6, temperature=3.0)
    bench = Bench(load(TINY, device="cpu"), rows(2, tmp_path), 2, sampling, plain_grader)
    arm = Arm("single", "single", samples=6)
    first, again = ([r["votes"] for r in bench.compute(0, arm, 0)] for _ in range(2))
    assert first == again
    assert any(len(votes) > 1 for votes in first)


def test_more_seeds_do_not_count_as_more_questions() -> None:
    """Ten seeds of one greedy run would make intervals three times too small."""
    some: Sequence[Record] = [
        {
            "id": str(i),
            "arm": "a",
            "seed": seed,
            "metric": "accuracy",
            "correct": i < 5,
            "memory_bytes": 0,
        }
        | {"read": 0, "thought": 0, "written": 0, "seconds": 0.0}
        for i in range(10)
        for seed in range(10)
    ]
    [line] = summarize(some).values()
    assert (line["n"], line["seeds"]) == (10, 10)
    assert line["accuracy"][1] < 0.3


def test_marks_are_equal_for_one_memory_and_different_for_another(data: Path) -> None:
    """`--replay` uses the marks to find the agent at which a run differs."""
    some = read_rows(data)[:2]
    bench = Bench(load(TINY, device="cpu"), some, 2, Sampling(max_new_tokens=2), plain_grader)
    first, again, other = (
        [
            agent["mark"]
            for record in bench.compute(0, Arm("x", align=align), 0)
            for agent in record["agents"]
        ]
        for align in ("ridge", "ridge", "random")
    )
    for a, b, c in zip(first, again, other, strict=True):
        assert same_mark(a, b)
        assert not same_mark(a, c)


def test_close_and_prefix_change_the_memory(lm: LM) -> None:
    """If these settings had no effect, their arms would be found not to differ."""
    some = [{"id": "a", "question": "Eva has 2 cards.", "answer": "2"}]
    bench = Bench(lm, some, 1, Sampling(), plain_grader)
    plain = Arm("x", latent_steps=2, align="ridge")

    def held(arm: Arm) -> int:
        return slots(bench.last_turn([0], arm).memory)[0]

    closing = bench.last_turn([0], plain).closing_tokens
    assert closing > 0
    assert held(plain) - held(replace(plain, close=False)) == 3 * closing
    prefix = "Eva has"
    assert held(replace(plain, prefix=prefix)) - held(plain) == 3 * len(lm.tokenizer.encode(prefix))
    last = bench.last_turn([0], replace(plain, prefix=prefix)).prompts[0].text
    assert last == bench.last_turn([0], plain).prompts[0].text, "the one who answers has its own"


def test_close_prefix_and_fit_text_are_settings_of_a_run(data: Path, tmp_path: Path) -> None:
    """A prefix may contain a comma.

    With another plain text, `fitted` is another map, so the run is another run.
    """
    text = tmp_path / "plain.txt"
    text.write_text("Eva has 2 cards and Tom finds 3 coins in his box. " * 40)
    command = [
        "--data",
        str(data),
        "--limit",
        "2",
        "--metric",
        "nll",
        "--align",
        "fitted",
        "--latent-steps",
        "2",
    ]
    command += [
        "--close",
        "yes,no",
        "--prefix",
        "Eva, Ann",
        "--prefix",
        "Tom",
        "--quiet",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*command, "--fit-text", str(text)]) == 0
    found: dict[str, float] = {}
    for record in lines(tmp_path / "run"):
        found[record["arm"]] = found.get(record["arm"], 0) + record["nll"]
    assert list(found) == [
        f"latent_mas close={close} prefix={name}"
        for close in (True, False)
        for name in ("Eva, Ann", "Tom")
    ]
    assert len(set(found.values())) == 4
    text.write_text("Ann doubles the 7 cards, and then she loses 4 of them. " * 40)
    assert main([*command, "--fit-text", str(text)]) == 1
    assert main([*command, "--fit-text", str(tmp_path / "nowhere")]) == 1


def test_a_saved_map_can_be_an_arm(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file can be in the list of maps. Its contents are a setting of the run."""
    path, lm = tmp_path / "map.safetensors", load(TINY)
    lm.aligner("random").save(path)
    command = ["--data", str(data), "--limit", "2", "--metric", "nll", "--latent-steps", "2"]
    command += ["--quiet", "--out", str(tmp_path / "run")]
    kinds = f"ridge,{path},random,mean"
    assert main([*command, "--align", kinds]) == 0
    found: dict[str, list[float]] = {}
    for record in lines(tmp_path / "run"):
        found.setdefault(record["align"], []).append(record["nll"])
    assert list(found) == kinds.split(",")
    assert found[str(path)] == pytest.approx(found["random"])
    assert found[str(path)] != pytest.approx(found["ridge"])
    lm.aligner("identity").save(path)
    assert main([*command, "--align", kinds]) == 1
    assert "maps: found" in capsys.readouterr().err
    path.unlink()
    assert main([*command[:-1], str(tmp_path / "other"), "--align", kinds]) == 1
    assert f"{path}: no such file" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux only")
def test_code_is_graded_by_running_it_only_if_allowed() -> None:
    """Without the flag, code is neither right nor wrong, and does not count in the accuracy."""
    row = {
        "id": "c",
        "question": "Double it.",
        "answer": "x",
        "tests": "assert f(2) == 4",
        "kind": "code",
    }
    right, wrong = (f"```python\ndef f(x):\n    return {body}\n```" for body in ("x * 2", "x"))
    assert [grader(True)(row, text) for text in (right, wrong)] == [True, False]
    assert grader(False)(row, right) is None
    record = {
        "id": "c",
        "arm": "a",
        "seed": 0,
        "metric": "accuracy",
        "correct": None,
        "memory_bytes": 0,
    }
    [line] = summarize([record | {"read": 0, "thought": 0, "written": 0, "seconds": 0.0}]).values()
    assert "accuracy" not in line


def test_equivalent_expressions_are_right_with_math_verify() -> None:
    """The head of a run has the version of math-verify, so grades must come from it."""
    row = {"id": "a", "question": "q", "answer": r"\frac{1}{\sqrt{2}}", "kind": "math"}
    said = r"\boxed{\frac{\sqrt{2}}{2}}"
    assert grader(False)(row, said) is False
    pytest.importorskip("math_verify")
    assert grader(False, verifies=True)(row, said) is True
    assert grader(False, verifies=True)(row, r"\boxed{\frac{\sqrt{3}}{2}}") is False


# -- thoughts as tokens ----------------------------------------------------------------------------


def test_a_lens_adds_only_thoughts_and_attention_to_the_records(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are recorded for all agents with latent steps, for answers and for losses.

    In the shuffled arm, they belong to the KV cache that was handed over. For an arm without
    thoughts, the command says that there are none.
    """
    command = ["--data", str(data), "--out", str(tmp_path), *FIXED, "--lens", "2"]
    assert main(command) == 0
    said = capsys.readouterr().err.splitlines()
    expected_warnings = [
        f"evaluate: --lens records nothing for {arm}: no thoughts" for arm in SINGLES
    ]
    assert sorted(said) == sorted(expected_warnings)
    found, layers = lines(tmp_path), 3
    for record in found:
        *earlier, last = record["agents"]
        assert not {"thoughts", "attention"} & last.keys()
        for agent in earlier:
            assert [len(one["tokens"]) for one in agent["thoughts"]] == [2, 2]
            assert [one["cosine_before"] is None for one in agent["thoughts"]] == [True, False]
            shape = [len(heads) for heads in agent["attention"]["thoughts"]]
            assert shape == [len(heads) for heads in agent["attention"]["prompt"]]
            assert len(shape) == layers
        for layer in range(layers if earlier else 0):
            parts = [part for agent in earlier for part in agent["attention"].values()]
            totals = [sum(shares) for shares in zip(*(part[layer] for part in parts), strict=True)]
            assert all(0 < total < 1 for total in totals), "the rest is the last agent's own turn"
    lm = load(TINY, device="cpu", dtype="float32")
    lens, asked = Lens(lm, 2), [json.loads(line) for line in data.read_text().splitlines()]
    latent_mas(lm, [asked[1]["question"]], kind="math", latent_steps=2, on_event=lens)
    expected = [[view.tokens for view in views] for _, views in lens.seen[:3]]
    for id_, transfer in (("q-1", "full"), ("q-0", "shuffled")):  # q-0 gets the memory of q-1
        for metric in ("accuracy", "nll"):
            [record] = [
                r for r in found
                if (r["id"], r["transfer"], r["metric"]) == (id_, transfer, metric)
            ]  # fmt: skip
            for agent, views in zip(record["agents"], expected, strict=False):
                for one, tokens in zip(agent["thoughts"], views, strict=True):
                    assert [token for token, _ in one["tokens"]] == [token for token, _ in tokens]
                    chances = [chance for _, chance in one["tokens"]]
                    assert chances == pytest.approx([chance for _, chance in tokens], rel=2e-3)
    for record in found:
        for agent in record["agents"]:
            agent.pop("thoughts", None)
            agent.pop("attention", None)
    assert found == lines(finished)
    assert main(["--out", str(tmp_path), "--replay", "q-4"]) == 0


SINGLES = ("single metric=accuracy", "single metric=nll")
