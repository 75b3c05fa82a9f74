"""The memory that `info` reports for a model, compared with the sum of all allocations."""

import json
from pathlib import Path

import pytest

from minimas import Aligner, Sampling, think
from minimas.core.model import prefill
from minimas.info import describe
from minimas.text.generate import decode, generator

from ..models import config_dict
from ..test_info import number
from .gpu import SHAPES, FakeGPU, qwen3

CONTEXT, NEW = 960, 256


def allocated(size: str, quantize: str | None, rows: int) -> int:
    """Load, solve W_a, prefill, think and decode. Returns the peak of the bytes of all tensors."""
    gpu = FakeGPU()
    with gpu:
        model = gpu.load(qwen3(size), quantize)
        align = Aligner.from_model(model)
        cache = model.new_cache(rows)
        hidden = prefill(model, [[0] * CONTEXT] * rows, cache)
        _, hidden = think(model, align, hidden, cache, 2)
        generators = [generator(0, str(row)) for row in range(rows)]
        sampling = Sampling(temperature=0.7, top_k=20)
        steps = decode(model, hidden, cache, sampling, {1}, generators, [[]] * rows)
        for _ in range(3):
            next(steps)
    return gpu.peak


@pytest.mark.parametrize(
    "size",
    [pytest.param(size, marks=[pytest.mark.slow] * (size != "8B")) for size in SHAPES],
)
@pytest.mark.parametrize(("quantize", "rows"), [(None, 1), (None, 8), ("q4", 1), ("q8", 8)])
def test_info_reports_the_peak_memory_of_a_call(
    size: str, quantize: str | None, rows: int, tmp_path: Path
) -> None:
    """`info` added the same constant for all models and batches.

    Two layers are the hard case: in a complete model the weights have a larger share.
    """
    (tmp_path / "config.json").write_text(json.dumps(config_dict(qwen3(size))))
    peaks = describe(tmp_path, rows, CONTEXT, NEW)["peak"].split(", ")
    said = {form: number(text) for form, text in (peak.split() for peak in peaks)}
    real = allocated(size, quantize, rows)
    assert said[quantize or "bfloat16"] == pytest.approx(real, rel=0.05)
