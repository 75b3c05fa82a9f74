"""Check the script for a day with a GPU by rehearsing it on a CPU, because GPU time is short."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools.benchmarking import gpu_day

from ..processes import LIMIT

ROOT = Path(__file__).parents[2]


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "tools/gpu_day.sh", *arguments],
        cwd=ROOT, env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip


def test_out_without_a_file_is_wrong_usage() -> None:
    done = script("--out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_variant_that_fails_or_has_no_time_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ended at the first variant that did not fit into memory."""
    real = gpu_day.measure

    def measure(config: object, format: str, *rest: object) -> dict[str, float]:
        if format == "q4":
            raise torch.OutOfMemoryError("no memory")
        if format == "q8":
            raise RuntimeError("a kernel that is not there")
        if format == "transformers":
            return dict.fromkeys(("latent", "decode", "prefill"), 0.5)
        return real(config, format, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_day, "measure", measure)
    plan = [("tiny", "q4", False), ("tiny", "q8", False), ("tiny", "transformers", False)]
    out = tmp_path / "day.json"
    gpu_day.save(out, {"measured": [], "left_out": [], "failed": False, "next": 0})
    gpu_day.work(out, True, plan, 99)
    assert gpu_day.load(out)["next"] == 2, "after a failure, a new process goes on"
    gpu_day.work(out, True, plan, 99)
    day = gpu_day.load(out)
    assert {r["per_second"] for r in day["measured"]} == {2.0} and day["failed"]
    assert day["left_out"] == [
        "tiny q4 is left out: no memory",
        "tiny q8 has failed: a kernel that is not there",
    ]
    gpu_day.save(out, day | {"next": 0, "left_out": []})
    gpu_day.work(out, True, plan, -1)
    assert [line.split(": ")[1] for line in gpu_day.load(out)["left_out"]] == [
        "no time was left"
    ] * 3


def end_at_the_first(
    out: Path, rehearse: bool, plan: list[gpu_day.Variant], seconds: float
) -> None:
    """Take the place of `work_and_exit`: variant 0 ends its process, 1 fails, others do nothing.

    After the failure of variant 1, which is recorded, the process crashes as it ends.
    """
    day = gpu_day.load(out)
    if day["next"] == 0:
        os._exit(7)  # as after an illegal access to memory
    if day["next"] == 1:
        gpu_day.fail(day, "variant 1", "recorded")
        gpu_day.save(out, day)
        os._exit(8)
    gpu_day.save(out, day | {"next": len(plan)})


@pytest.mark.slow
def test_a_variant_that_ends_its_process_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that the program did not expect ended a day with a GPU."""
    monkeypatch.setattr(gpu_day, "work_and_exit", end_at_the_first)
    out = tmp_path / "day.json"
    assert gpu_day.main(["--rehearse", "--out", str(out)]) == 1
    line, recorded = gpu_day.load(out)["left_out"]
    assert recorded == "variant 1 has failed: recorded", "variant 2 has not failed"
    assert "tiny bf16 recorded has failed: its process ended with status 7" in line
    assert line in capsys.readouterr().out


class Blocked:
    """Takes the place of a process that never ends by itself."""

    exitcode: int | None = None

    def __init__(self, **settings: object) -> None: ...

    def start(self) -> None: ...

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        assert timeout or self.exitcode, "the parent would wait forever"

    def kill(self) -> None:
        self.exitcode = -9


def test_a_variant_that_blocks_its_process_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_day, "get_context", lambda _: SimpleNamespace(Process=Blocked))
    monkeypatch.setattr(gpu_day, "VARIANTS", [("bf16", True), ("bf16", False)])
    assert gpu_day.main(["--rehearse", "--out", str(tmp_path / "day.json")]) == 1
    lines = gpu_day.load(tmp_path / "day.json")["left_out"]
    assert len(lines) == 2 and all("its process ended with status -9" in line for line in lines)


@pytest.mark.slow
def test_the_script_measures_and_saves_every_variant(tmp_path: Path) -> None:
    out = tmp_path / "day.json"
    done = script("--rehearse", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_cuda.py" in done.stdout
    assert done.stdout.count("of the bandwidth") == 2 * len(gpu_day.VARIANTS)
    day = json.loads(out.read_text())
    assert day["left_out"] == [] and day["copy_bytes_per_second"] > 0
    measured = [(r["format"], r["recorded"], r["task"]) for r in day["measured"]]
    tasks = ("latent", "decode", "prefill")
    assert measured == [(*variant, task) for variant in gpu_day.VARIANTS for task in tasks]
    for record in day["measured"]:
        assert record["per_second"] > 0 and ("share" in record) == (record["task"] != "prefill")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_script_gives_one_line(tmp_path: Path) -> None:
    done = script("--out", str(tmp_path / "day.json"))
    assert done.returncode == 1
    assert done.stderr.startswith("gpu_day: found no CUDA GPU") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert gpu_day.main(["--out", str(tmp_path / "day.json")]) == 1
