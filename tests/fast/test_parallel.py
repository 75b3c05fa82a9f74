"""A model divided among two ranks computes what a whole one does, with half of it on each rank."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minimas import load
from minimas.core.checkpoint import Folder
from minimas.fast.parallel import BY_INPUTS, Part
from minimas.formats.gguf import GGUF
from tools.evaluation.command import main

from ..formats.test_gguf import write
from ..models import TINY, apart, random_model, tiny_config, tiny_model, write_folder
from ..processes import LIMIT
from .rank import QUESTIONS, run

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class Mesh:
    """One rank of several, without processes."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def get_local_rank(self) -> int:
        return self.rank

    def size(self) -> int:
        return self.ranks


def torchrun(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*TORCHRUN, str(ranks), *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip


@pytest.mark.slow
def test_two_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    """Heads and features are divided, and each partial sum is added once, in every format."""
    (tmp_path / "model").symlink_to(TINY)
    done = torchrun(2, "-m", "tests.fast.rank", str(tmp_path))
    assert done.returncode == 0, done.stderr
    ranks: list[Any] = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for quantize in ranks[0]:
        whole: Any = run(TINY, None if quantize == "None" else quantize, parallel=False)
        first, second = ranks[0][quantize], ranks[1][quantize]
        tolerance = 1e-5 if quantize == "None" else 0.3
        for name in ("prefill", "thoughts", "after"):
            assert torch.equal(first[name], second[name]), "all ranks must choose the same tokens"
            assert apart(first[name].double(), whole[name].double()) <= tolerance, (quantize, name)
        assert apart(first["prefill"].flip(0), whole["prefill"]) > 0.3, "nothing is told apart"
        assert first["texts"] == second["texts"]
        if quantize == "None":
            assert first["texts"] == whole["texts"]
        assert (2 * first["sizes"]).tolist() == whole["sizes"].tolist(), "half on each rank"


@pytest.mark.slow
def test_only_rank_0_prints() -> None:
    ask = ("-m", "minimas", "ask", "--device", "cpu", "--dtype", "float32", QUESTIONS[0])
    done = torchrun(2, *ask, "--parallel")
    alone = subprocess.run(
        [sys.executable, *ask], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout != ""
    # torch warned eight times of patterns that match no layer.
    assert done.stderr.count("judger: ") == 1 and "Warning" not in done.stderr
    refused = torchrun(3, *ask, "--parallel")
    said = "minimas: error: --parallel: found 3 ranks, expected a divisor of num_attention_heads, 4"
    assert said in refused.stderr


@pytest.mark.slow
def test_groups_of_ranks_share_the_questions_of_an_evaluation(tmp_path: Path) -> None:
    """Four processes with two models of two ranks each give the records of a single process."""
    data = tmp_path / "data.jsonl"
    rows = [{"id": str(i), "question": text, "answer": "6"} for i, text in enumerate(QUESTIONS * 2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate = ["tools/evaluate.py", "--data", str(data), "--device", "cpu", "--dtype", "float32"]
    evaluate += ["--batch-size", "1", "--max-new-tokens", "8", "--quiet"]
    done = torchrun(4, *evaluate, "--out", str(tmp_path / "many"), "--parallel", "2")
    assert done.returncode == 0, done.stderr
    subprocess.run(
        [sys.executable, *evaluate, "--out", str(tmp_path / "one")],
        cwd=ROOT, check=True, capture_output=True, timeout=LIMIT,
    )  # fmt: skip

    def texts(folder: str, name: str) -> dict[Any, Any]:
        lines = (tmp_path / folder / name).read_text().splitlines()[1:]
        return {record["id"]: record["text"] for record in map(json.loads, lines)}

    groups = [texts("many", f"results-rank{rank}.jsonl") for rank in (0, 1)]
    assert [set(group) for group in groups] == [{"0", "2"}, {"1", "3"}]
    assert groups[0] | groups[1] == texts("one", "results.jsonl")
    assert not list((tmp_path / "many").glob("results-rank[23]*"))


def test_parallel_without_torchrun_is_refused_before_loading() -> None:
    with pytest.raises(ValueError, match="parallel: found a process without a rank, expected: "):
        load("/nowhere/at/all", device="cpu", parallel=True)
    with pytest.raises(ValueError, match="compile: found with --device mps or --parallel"):
        load("/nowhere/at/all", device="cpu", compile=True, parallel=True)


def test_each_rank_has_chosen_its_gpu_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of --quantize started CUDA, and torch left both ranks on the first GPU."""
    calls: list[str] = []
    module = sys.modules["minimas.load"]  # in the package, `load` is the function
    monkeypatch.setattr(module, "device_mesh", lambda *_: calls.append("mesh"))
    monkeypatch.setattr(module, "check", lambda *_: calls.append("check"))
    with pytest.raises(FileNotFoundError):
        load("/nowhere/at/all", device="cpu", quantize="q8", parallel=True)
    assert calls == ["mesh", "check"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--audit"], r"audit \(--audit\): found with --parallel, expected one process"),
        (["--lens", "3"], r"lens \(--lens\): found with --parallel"),
        ([], r"parallel \(--parallel\): found 1 of 1 ranks, expected torchrun"),
    ],
)
def test_an_evaluation_refuses_work_of_a_single_rank(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rank would wait for the others, or they for it, for days."""
    command = ["--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path), "--parallel"]
    assert main([*command, *flags]) == 1
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("ranks", [3, 4])
def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused(
    ranks: int, tmp_path: Path
) -> None:
    source = Folder(write_folder(tmp_path, tiny_model()))  # 4 query and 2 key-value heads
    field = {3: "num_attention_heads, 4", 4: "num_key_value_heads, 2"}[ranks]
    with pytest.raises(ValueError, match=f"parallel: found {ranks} ranks, .* divisor of {field}"):
        Part(source, Mesh(0, ranks))


def test_the_parts_of_all_ranks_add_up_to_the_whole_model(tmp_path: Path) -> None:
    """A Qwen2 model has biases: they are divided or added once, never twice."""
    source = Folder(write_folder(tmp_path, tiny_model("qwen2")))
    parts = [Part(source, Mesh(rank, 2)) for rank in (0, 1)]
    for key, shape in source.shapes.items():
        own = [part.read(key, torch.float32) for part in parts]
        whole = source.read(key, torch.float32)
        dim = int(any(name in key for name in BY_INPUTS))
        joined = torch.cat(own, dim) if "_proj" in key else own[0]
        assert joined.shape == shape and torch.equal(joined, whole)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_blocks_of_a_gguf_file_are_divided_without_widening(kind: str, tmp_path: Path) -> None:
    """If they were widened to 16 bits, the parts of a file would take three times its size."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    sizes["num_key_value_heads"] = 4
    config = tiny_config(**sizes, vocab_size=99)
    path = write(tmp_path / "a.gguf", random_model(config, dtype=torch.float32), kinds=kind)
    source = GGUF(path)
    for key, dim in (("q_proj", 0), ("o_proj", 1)):
        name = f"model.layers.0.self_attn.{key}.weight"
        parts: list[Any] = [Part(source, Mesh(rank, 2)).blocks(name) for rank in (0, 1)]
        for own, whole in zip(zip(*parts, strict=True), source.blocks(name), strict=True):
            assert torch.equal(torch.cat(own, dim), whole)
    down = "model.layers.0.mlp.down_proj.weight"  # 192 inputs are six groups of 32
    kept = [Part(source, Mesh(0, ranks)).low_bits(down) for ranks in (2, 4)]
    assert kept == ["q4", ""], "a group of a scale would be cut"


def test_8_bit_weights_of_a_gguf_file_stay_in_8_bits_on_every_rank(tmp_path: Path) -> None:
    """Their scales are per row, so no number of ranks splits a group."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    config = tiny_config(**sizes, num_key_value_heads=4, vocab_size=99)
    path = write(tmp_path / "a.gguf", random_model(config, dtype=torch.float32), kinds="Q8_0")
    source = GGUF(path)
    down = "model.layers.0.mlp.down_proj.weight"
    assert Part(source, Mesh(1, 2)).low_bits(down) == source.low_bits(down) == "q8"
    part = Part(source, Mesh(1, 2)).read(down, torch.float32)
    assert torch.equal(part, source.read(down, torch.float32)[:, 96:])
