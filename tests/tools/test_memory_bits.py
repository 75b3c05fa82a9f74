"""Check that tools/memory_bits.py rounds the right numbers and pairs losses by question."""

import json
from pathlib import Path

import pytest
import torch

from tools import memory_bits

ROWS = [
    {"id": f"q{n}", "question": f"Eva has {n} cards. She finds 7 more.", "answer": str(n + 7),
     "solution": f"{n} {n + 7}"} for n in (2, 5)
]  # fmt: skip


@pytest.mark.parametrize("dim", [memory_bits.VECTOR, memory_bits.CHANNEL])
def test_rounding_changes_a_number_by_at_most_half_a_step(dim: int) -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    x[0, 1], x[1, :, 3] = 0, 300.0  # a vector of zeros; a channel like the biases of Qwen2.5
    found = memory_bits.rounded(x, dim)
    steps = x.abs().amax(dim, keepdim=True) / 127
    assert ((found - x).abs() <= steps * 0.501).all()
    assert len(found[0, 0].unique()) > 4, "it is all zeros"
    assert memory_bits.rounded(x, None) is x


def test_a_large_channel_spoils_the_others_only_with_one_scale_per_vector() -> None:
    """A channel with a value of 300 has steps of 2.4, so numbers near 1 become 0."""
    x = torch.full((1, 4, 8), 0.9)
    x[..., 0] = 300.0
    assert (memory_bits.rounded(x, memory_bits.VECTOR)[..., 1:] == 0).all()
    assert torch.allclose(memory_bits.rounded(x, memory_bits.CHANNEL), x)


def test_the_table_has_a_row_for_every_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "q.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    argv = ["memory_bits", "weights/tiny", "--data", str(data)]
    monkeypatch.setattr("sys.argv", argv)
    assert memory_bits.main() == 0
    out, err = capsys.readouterr()
    title, _, exact, *others = out.splitlines()
    assert title.startswith("| 2 questions |") and err.count("\n") == 2
    assert "| +0.0000 [+0.0000, +0.0000] | +0.0000 |" in exact
    assert len(others) == len(memory_bits.ROUNDINGS) - 1
    each = [list(map(float, line.split()[1:])) for line in err.splitlines()]
    assert all(len(set(one)) == len(one) for one in each), "a rounding changed nothing"
    monkeypatch.setattr("sys.argv", [*argv[:-1], str(tmp_path / "none.jsonl")])
    assert memory_bits.main() == 1
    assert capsys.readouterr().err.startswith("memory_bits: error: ")
