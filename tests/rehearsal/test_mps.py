"""An Apple GPU without an Apple GPU: no float64 may be moved to it or created on it."""

import functools
from typing import Any

import pytest
import torch

from minimas import LM, Aligner, KVCache, Sampling, latent_mas, load, remember, think
from minimas.core.latent import ALIGNMENTS
from minimas.core.model import prefill, take_last
from minimas.core.rotary import angles
from minimas.fast.quantize import has_kernels
from minimas.load import _default_dtype, _device
from minimas.text.generate import decode, generator

from ..models import TINY, tiny_config
from ..text import tiny_tokenizer
from .gpu import MPS, VALUE, FakeGPU, qwen3

LENGTHS = [5, 17, 9]


@functools.cache
def rehearsed() -> tuple[FakeGPU, LM]:
    """Return a small model with the tokenizer and the teams of weights/tiny."""
    gpu = FakeGPU(MPS)
    with gpu:
        return gpu, LM(gpu.load(tiny_config(vocab_size=tiny_tokenizer().size)), TINY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_thinks_and_decodes_without_float64(dtype: torch.dtype) -> None:
    """Angles were computed in float64 on the device, and so were the draws of tokens."""
    gpu = FakeGPU(MPS)
    with gpu:
        model = gpu.load(qwen3("4B", layers=1), dtype=dtype)
        cache = model.new_cache(3)
        hidden = prefill(model, [[0] * length for length in LENGTHS], cache, chunk_tokens=8)
        thoughts, hidden = think(model, Aligner.from_model(model), hidden, cache, 2)
        assert (thoughts.device, thoughts.dtype, thoughts.shape[1]) == (MPS, dtype, 2)
        generators = [generator(0, str(row)) for row in LENGTHS]
        for sampling in (Sampling(), Sampling(temperature=0.7, top_k=20, top_p=0.9)):
            steps = decode(model, hidden, cache.fork(), sampling, {1}, generators, [[]] * 3)
            assert [next(steps) for _ in range(3)] == [[VALUE] * 3] * 3
        found = {
            "select": cache.select([2, 0, 1]),
            "keep_last": cache.keep_last(3),
            "drop": cache.drop(1, [2, 9, 3]),
            "concat": KVCache.concat([cache, cache.keep_last(2)]),
        }
        for name, other in found.items():
            ids = torch.zeros(3, 4, dtype=torch.int64, device=MPS)
            last = take_last(model(model.embed(ids), other), [4] * 3)
            assert (last.device, last.dtype) == (MPS, dtype), name


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_a_map_is_solved_on_the_cpu_and_moved_afterwards(kind: str) -> None:
    """This includes more dimensions than tokens, where even the sums are computed in float64."""
    gpu = FakeGPU(MPS)
    with gpu:
        for size in (64, 8):
            model = gpu.load(tiny_config(hidden_size=size, vocab_size=41))
            align = Aligner.from_model(model, kind)
            assert align.matrix is None or align.matrix.device == MPS
            embedding = align(torch.empty(3, 1, size, dtype=model.dtype, device=MPS))
            assert (embedding.device, embedding.dtype) == (MPS, model.dtype)


def test_a_team_and_a_memory_run_on_an_apple_gpu() -> None:
    gpu, lm = rehearsed()
    with gpu:
        memory = remember(lm, "Eva has 2 cards.", latent_steps=2)
        [result] = latent_mas(
            lm, ["And Ben?"], latent_steps=2, memory=memory, sampling=Sampling(max_new_tokens=3)
        )
        assert memory.device == MPS
    assert result.usage.output_tokens == 3


def test_planted_float64_is_refused() -> None:
    """The tests above rely on this check.

    It covers float64 that is created or computed on the device, or is on its way from or to it.
    """
    with FakeGPU(MPS):
        wide = torch.zeros(3, dtype=torch.float64)
        narrow = torch.zeros(3, device=MPS)
        for fault in (
            lambda: torch.zeros(3, dtype=torch.float64, device=MPS),
            lambda: narrow.double(),
            lambda: wide.to(MPS, torch.float32),
            lambda: narrow.to("cpu", torch.float64),
        ):
            with pytest.raises(TypeError, match="float64 on mps"):
                fault()
        cos, _ = angles(torch.zeros(1, 3, dtype=torch.int64, device=MPS), 8, 1e4, torch.float16)
        assert (cos.device, cos.dtype) == (MPS, torch.float32)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"quantize": "q4"}, "device: found mps with --quantize, .* expected none of them"),
        ({"compile": True}, "compile: found with --device mps"),
        ({"dtype": "float64"}, "device: found mps with .* float64"),
        ({"parallel": True}, "device: found mps with .* --parallel"),
        ({"name": "/nowhere/at/all"}, "no such folder"),
    ],
)
def test_options_that_an_apple_gpu_does_not_support_are_refused(
    asked: Any, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are refused before anything is read.

    A warning says that the rest was not tested.
    """
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load(**({"name": TINY, "device": "mps"} | asked))
    warned = [record.message for record in caplog.records]
    assert len(warned) == ("name" in asked) and all("nothing was tested" in text for text in warned)


def test_an_apple_gpu_is_not_chosen_by_auto_and_gets_no_packed_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GGUF file keeps its blocks only where q4's kernels run, and Apple GPUs do not run them."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"expected auto, cpu, or cuda .*, or mps on"):
        _device("mps")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert (_device("auto").type, _device("mps").type) == ("cpu", "mps")
    assert not has_kernels(MPS)


@pytest.mark.parametrize(
    ("name", "device", "capability", "used"),
    [
        ("bfloat16", "cuda", (7, 5), "float16"),
        ("bfloat16", "cuda", (8, 0), "bfloat16"),
        ("float32", "cuda", (7, 5), "float32"),
        ("bfloat16", "cpu", (7, 5), "bfloat16"),
        ("bfloat16", "mps", (7, 5), "float16"),
        ("float16", "mps", (7, 5), "float16"),
        ("float64", "mps", (7, 5), "float32"),
    ],
)
def test_auto_chooses_a_dtype_that_the_device_supports(
    name: str,
    device: str,
    capability: tuple[int, int],
    used: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """GPUs before compute capability 8.0 emulated bf16, many times slower than float16."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert _default_dtype(name, torch.device(device)) == getattr(torch, used)
    explained = f"--dtype auto: {device} has no fast {name}: using {used}"
    assert [record.message for record in caplog.records] == [explained] * (name != used)
