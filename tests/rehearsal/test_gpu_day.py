"""The measurements of tools/gpu_day.sh, on a GPU without values.

A day with a GPU is too short to fix bugs.
"""

import pytest

from tools.benchmarking import gpu_day

from .gpu import CUDA, FakeGPU, qwen3


@pytest.mark.parametrize("format", ["bf16", "q4", "q8"])
def test_a_variant_is_measured_on_the_gpu(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU()
    monkeypatch.setattr(gpu_day, "ROUNDS", 1)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: gpu.peak)
    with gpu:
        found = gpu_day.measure(qwen3("8B", layers=1), format, False, CUDA, tokens=16)
    assert found["peak"] > gpu.allocated and {"latent", "decode", "prefill"} < found.keys()
