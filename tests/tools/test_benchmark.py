"""Check tools/benchmark.py: what it refuses, what it counts, and that all modes print tables.

The models are tiny, so a run takes seconds.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minimas import Config
from tools.benchmarking import command as benchmark
from tools.benchmarking import contenders, end_to_end, quality, race

from ..processes import LIMIT

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Config.from_dict(contenders.QWEN3_06B)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/benchmark.py", "--threads", "1", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT)


def test_results_that_differ_are_an_error() -> None:
    one = torch.ones(2, 3)
    assert race.agree(one, one, 0, "it") == 0
    for wrong in (one * 1.1, one * float("nan")):
        with pytest.raises(ValueError, match="it: found a relative difference"):
            race.agree(wrong, one, 0.05, "it")


def test_patterns_choose_contenders_and_keep_the_reference_and_the_yardstick() -> None:
    assert contenders.chosen(["llama*Q*"]) == [
        contenders.REFERENCE,
        contenders.YARDSTICK,
        "llama.cpp-Q8_0",
        "llama.cpp-Q4_0",
    ]
    assert contenders.chosen(["*"]) == list(contenders.CONTENDERS)
    with pytest.raises(ValueError, match="--contenders: found 'gpt'"):
        contenders.chosen(["*", "gpt"])


def test_weight_bytes_match_the_format() -> None:
    exact, four, theirs = (
        contenders.weight_bytes(CONFIG, format) for format in ("bf16", "q4", "Q4_0")
    )
    # All parameters of the tied model, in 16 bits.
    assert exact["trunk"] + exact["head"] == 2 * 596_049_920
    assert four["trunk"] / exact["trunk"] == pytest.approx(5 / 16, rel=1e-3)
    assert theirs["trunk"] / exact["trunk"] == pytest.approx(4.5 / 16, rel=1e-3)
    assert race.slot_bytes(CONFIG) == 2 * 28 * 8 * 128 * 2


@pytest.mark.slow
def test_contenders_that_do_not_fit_into_memory_are_left_out_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = list(contenders.CONTENDERS)
    for free, left in ((2**50, set()), (23 * 2**30, set(contenders.SPARE[:2])), (2**30, None)):
        monkeypatch.setattr(race, "proc_bytes", lambda *_, free=free: free)
        if left is None:
            with pytest.raises(ValueError, match=r"found 1\.0 GiB of free memory"):
                race.fitting(names, CONFIG, 8, 512)
        else:
            assert left == set(names) - set(race.fitting(names, CONFIG, 8, 512))


def test_a_ratio_of_perplexities_has_the_standard_error_of_paired_differences() -> None:
    assert quality.ratio([1.0, 2.0], [1.0, 2.0]) == "1.0000 ± 0.0000"
    assert quality.ratio([1.1, 2.1, 3.1], [1.0, 2.0, 3.0]) == "1.1052 ± 0.0000"


def test_the_table_compares_latent_mas_with_the_other_methods() -> None:
    of = {"read": [1, 1], "thought": [0, 0], "right": [], "cut": [False, True]}
    found = {
        name: of | {"seconds": [s, s], "written": [w, w]}
        for name, s, w in (("text_mas", 4, 10), ("latent_mas", 1, 2))
    }
    text = end_to_end.table(1, found)[-2]
    assert text == "| 1 | text_mas | 4.00 | 4.00 | 1 | 0 | 10 |  | 1 | 4.00 × (4.00 ×) | 80% |"


@pytest.mark.slow
def test_the_race_prints_a_table_and_saves_every_sample(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    names = ["minimas-q?", "trunk*"]
    options = "--context 8 --rounds 2 --batch-sizes 1 --only latent decode".split()
    options += ["--contenders", *names, "--out", str(out)]
    done = run("--model", "weights/tiny", *options)
    assert done.returncode == 0, done.stderr
    assert "| latent step, ms | 1 | trunk-bf16 |" in done.stdout
    samples = json.loads(out.read_text(encoding="utf-8"))
    assert {len(row["seconds"]) for row in samples["rows"]} == {2}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--memory-error", "--perplexity", "--end-to-end"])
def test_every_other_mode_prints_its_table(mode: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"id": 1, "question": "How many is two and three?", "answer": "5"}
    rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
    q8 = ["--formats", "q8"]
    short = ["--max-new-tokens", "4", "--batch-sizes", "1"]
    given = {
        "--memory-error": q8,
        "--perplexity": ["--text", str(rows), *q8],
        "--end-to-end": ["--questions", str(rows), *short],
    }
    done = run(mode, "weights/tiny", *given[mode])
    assert done.returncode == 0, done.stderr
    wanted = {
        "--memory-error": "| ridge | q8 | bf16's |",
        "--perplexity": "| q8 |",
        "--end-to-end": "| 1 | text_mas |",
    }
    assert wanted[mode] in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rounds", "0"], "expected numbers of 1 or more"),
        (["--model", "nowhere"], "found no config.json in nowhere"),
        (
            ["--perplexity", "weights/tiny"],
            "expected --questions FILE.jsonl with --end-to-end, and --text FILE",
        ),
        (
            ["--perplexity", "weights/tiny", "--memory-error", "weights/tiny"],
            "expected only one of them",
        ),
        (["--contenders", "gpt"], "--contenders: found 'gpt'"),
    ],
)
def test_a_wrong_flag_gives_one_line(
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--threads", "1", *args])
    monkeypatch.setattr(race, "bandwidth", lambda: 0.0)
    try:
        status = benchmark.main("")
    except SystemExit as stop:
        status = int(str(stop.code))
    assert status != 0
    assert message in capsys.readouterr().err.splitlines()[-1]
