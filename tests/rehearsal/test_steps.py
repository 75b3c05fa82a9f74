"""Prefill, latent steps, decoding and hand-overs at Qwen3's sizes, on a GPU without values.

A tensor on the wrong device or of the wrong dtype raises an error. Everything that reads a value
from the GPU, or copies to it and waits, is counted. Within a step the host waits for nothing except
the token that `decode` has sampled.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minimas import Aligner, KVCache, Qwen3, Sampling, think
from minimas.core.model import prefill, take_last
from minimas.fast import quantize as quantize_module
from minimas.fast.compiled import Recorded
from minimas.text.generate import decode, generator

from ..fast.test_compiled import Layers
from .gpu import CUDA, SHAPES, VALUE, FakeGPU, qwen3

FORMATS = (None, "q4", "q8")
LENGTHS = [5, 17, 9]  # a ragged batch
every_model = pytest.mark.parametrize("quantize", FORMATS)
every_size = pytest.mark.parametrize("size", SHAPES)


@functools.cache
def rehearsed(size: str, quantize: str | None) -> tuple[FakeGPU, Qwen3]:
    gpu = FakeGPU()
    with gpu:
        model = gpu.load(qwen3(size), quantize)
    return gpu, model


def start(model: Qwen3) -> tuple[Tensor, KVCache]:
    """Prefill three rows of different lengths. Returns their last states (3, 1, D)."""
    cache = model.new_cache(len(LENGTHS))
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64, device=CUDA)
    hidden = model(model.embed(ids), cache, LENGTHS)  # (B, T, D)
    return take_last(hidden, LENGTHS), cache


def ridge(model: Qwen3) -> Aligner:
    """Return a map of the paper's form. `from_model` would read values."""
    size = model.config.hidden_size
    return Aligner(matrix=torch.empty(size, size, device=CUDA), norm=1.0)


def on_gpu(model: Qwen3, cache: KVCache) -> bool:
    """Return whether all keys and values have the model's device and dtype, and enough slots."""
    stores = [*cache.keys, *cache.values]
    kinds = {(x.device, x.dtype) for x in stores}
    return kinds == {(CUDA, model.dtype)} and min(x.shape[2] for x in stores) >= max(cache.lengths)


@every_size
@every_model
def test_a_latent_step_waits_for_nothing(size: str, quantize: str | None) -> None:
    """For ragged rows, a tensor was copied to the GPU twice per layer and step."""
    gpu, model = rehearsed(size, quantize)
    with gpu:
        hidden, cache = start(model)
        assert not gpu.waits, "prefill"
        thoughts, hidden = think(model, ridge(model), hidden, cache, 3)
        assert not gpu.waits
        assert thoughts.shape == (3, 3, model.config.hidden_size)
        assert (hidden.device, hidden.dtype) == (CUDA, torch.bfloat16)
        assert cache.lengths == [n + 3 for n in LENGTHS] and on_gpu(model, cache)


@every_size
@every_model
def test_a_decode_step_waits_only_for_its_token(size: str, quantize: str | None) -> None:
    """The check of the logits waited a second time in every step.

    A repetition penalty copied the ids of each row's earlier tokens to the GPU in every step.
    """
    gpu, model = rehearsed(size, quantize)
    drawn = Sampling(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.1)
    for sampling in (Sampling(), Sampling(repetition_penalty=1.1), drawn):
        with gpu:
            hidden, cache = start(model)
            generators = [generator(0, str(row)) for row in LENGTHS]
            prompts = [[0] * n for n in LENGTHS]
            steps = decode(model, hidden, cache, sampling, {1}, generators, prompts)
            draws = ["item on the host"] * len(LENGTHS) if sampling.temperature else []
            for _ in range(4):
                assert next(steps) == [VALUE] * len(LENGTHS)
            assert gpu.waits == [*draws, "tolist"] * 4
            assert cache.lengths == [n + 3 for n in LENGTHS]


@every_model
def test_a_recorded_step_waits_for_nothing(quantize: str | None) -> None:
    """Every step updates positions and checks whether it must be recorded again."""
    gpu, model = rehearsed("0.6B", quantize)
    with gpu:
        hidden, cache = start(model)
        model.step = Recorded(Layers(model))
        try:
            for _ in range(3):
                hidden = model(hidden, cache)
        finally:
            model.step = None
        assert not gpu.waits and gpu.recordings == 1, "a step was recorded again"
        assert cache.lengths == [n + 3 for n in LENGTHS] and on_gpu(model, cache)


@every_size
def test_caches_are_cut_and_joined_on_the_gpu(size: str) -> None:
    """No copy of a cache may pass through the host, because a cache has gigabytes."""
    gpu, model = rehearsed(size, None)
    with gpu:
        _, cache = start(model)
        gpu.copied = 0
        found = {
            "fork": cache.fork(),
            "select": cache.select([2, 0, 1]),
            "truncate": cache.truncate([4, 4, 2]),
            "keep_last": cache.keep_last(3),
            "drop": cache.drop(1, [2, 9, 3]),
            "concat": KVCache.concat([cache, cache.keep_last(2)]),
        }
        lengths = {name: other.lengths for name, other in found.items()}
        assert lengths == {
            "fork": [5, 17, 9],
            "select": [9, 5, 17],
            "truncate": [4, 4, 2],
            "keep_last": [3, 3, 3],
            "drop": [4, 9, 7],
            "concat": [7, 19, 11],
        }
        for name, other in found.items():
            assert on_gpu(model, other), name
            model(model.embed(torch.zeros(3, 1, dtype=torch.int64, device=CUDA)), other)
        assert all(wait.endswith("cuda:0") or wait.startswith("index") for wait in gpu.waits), (
            "nothing may be read"
        )
        assert 0 < gpu.copied < 1000, "only a few integers may be copied"


def test_prefill_in_chunks_limits_the_memory_for_a_long_prompt() -> None:
    """The mask of all positions, (T, S) for every row, would be larger than the model."""
    gpu, model = rehearsed("0.6B", None)
    peaks = []
    for chunk_tokens in (512, 8192):
        with gpu:
            gpu.peak = gpu.allocated
            cache = model.new_cache(2)
            prefill(model, [[0] * 8192, [0] * 4000], cache, chunk_tokens)
            peaks.append(gpu.peak - gpu.allocated)  # without the KV cache, which is equal in both
            assert cache.lengths == [8192, 4000]
    assert peaks[0] < 0.2 * peaks[1]


@pytest.mark.parametrize(("quantize", "most"), [("q4", math.inf), ("q8", 16)])
def test_layers_have_the_format_that_gpu_kernels_take(quantize: str, most: float) -> None:
    """q8's kernel got 384 rows, although it computes only 16 in the time of one.

    Its scales were converted at every call.
    """
    gpu, model = rehearsed("8B", quantize)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.max_kernel_rows == most
    scales = getattr(layer, "scale" if quantize == "q8" else "scales")
    assert scales.dtype == (torch.float32 if quantize == "q8" else torch.bfloat16)
    for rows in (1, 16, 17, 600):
        called: list[str] = []
        with gpu, Called(called):
            layer(torch.empty(rows, 1, 4096, dtype=torch.bfloat16, device=CUDA))
        kernels = [name for name in called if name.startswith("_weight_int")]
        assert len(kernels) == (rows <= most), rows
        assert ("_to_copy" in called) == (rows > most), "only unpacking converts anything"


@pytest.mark.parametrize(("quantize", "function"), [("q4", "fit"), ("q8", "round_rows")])
def test_a_gpu_quantizes_in_few_chunks(
    quantize: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks for the cache of a CPU are too small for a GPU.

    There were 192 of them for one matrix, with some sixty kernels each. A matrix in one chunk would
    take gigabytes.
    """
    real, shapes = getattr(quantize_module, function), list[torch.Size]()

    def recorded(weight: Tensor) -> object:
        shapes.append(weight.shape)
        return real(weight)

    monkeypatch.setattr(quantize_module, function, recorded)
    gpu = FakeGPU()
    with gpu:
        weight = torch.empty(12288, 4096, dtype=torch.bfloat16, device=CUDA)
        before = gpu.allocated
        quantize_module.quantized(quantize, weight, None)
        assert len(shapes) <= 4 and sum(shape[0] for shape in shapes) == 12288
        assert gpu.peak - before < 1.5e9


def test_a_fingerprint_copies_nothing_to_the_gpu() -> None:
    """To unpack q4, a matrix of unit vectors was made on the host, 600 MB for each layer of 8B."""
    gpu, model = rehearsed("0.6B", "q4")
    with gpu:
        model.fingerprint()
        assert "cpu to cuda:0" not in gpu.waits


class Called(TorchDispatchMode):
    """Records the names of all operators that are called."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# -- what the rehearsal catches -------------------------------------------------------------------


def wrong_map(name: str, model: Qwen3) -> Callable[[Tensor], Tensor]:
    """Return a map with one planted fault."""
    size = model.config.hidden_size

    def elsewhere(hidden: Tensor) -> Tensor:
        return hidden @ torch.empty(size, size, dtype=hidden.dtype)

    def reads(hidden: Tensor) -> Tensor:
        return hidden * float(hidden.norm().item())

    def copies(hidden: Tensor) -> Tensor:
        return hidden + torch.tensor([1.0] * size).to(CUDA, hidden.dtype)

    def fetches(hidden: Tensor) -> Tensor:
        return hidden.cpu().to(CUDA, non_blocking=True)

    def compares(hidden: Tensor) -> Tensor:
        return hidden if (hidden > 0).all() else -hidden

    def widens(hidden: Tensor) -> Tensor:
        return (
            hidden.float() @ torch.empty(size, size, dtype=hidden.dtype, device=CUDA)
        ).bfloat16()

    faults = (elsewhere, reads, copies, fetches, compares, widens)
    return {fault.__name__: fault for fault in faults}[name]


@pytest.mark.parametrize(
    ("fault", "wait"),
    [
        ("reads", "item"),
        ("copies", "cpu to cuda:0"),
        ("fetches", "cuda:0 to cpu"),
        ("compares", "__bool__"),
    ],
)
def test_a_planted_wait_is_counted_in_every_step(fault: str, wait: str) -> None:
    gpu, model = rehearsed("0.6B", None)
    with gpu:
        hidden, cache = start(model)
        think(model, wrong_map(fault, model), hidden, cache, 3)
        assert gpu.waits == [wait] * 3


@pytest.mark.parametrize(
    ("fault", "message"), [("elsewhere", "cuda:0.* and cpu"), ("widens", "wrong dtypes")]
)
def test_a_planted_tensor_of_another_device_or_dtype_is_refused(fault: str, message: str) -> None:
    gpu, model = rehearsed("0.6B", None)
    with gpu:
        hidden, cache = start(model)
        with pytest.raises(RuntimeError, match=message):
            think(model, wrong_map(fault, model), hidden, cache, 1)


@pytest.mark.parametrize(("quantize", "weights"), [("q4", "packed"), ("q8", "values")])
def test_a_kernel_refuses_packed_weights_of_another_dtype(quantize: str, weights: str) -> None:
    """A kernel's schema names the dtype of what is packed for it."""
    gpu, model = rehearsed("0.6B", quantize)
    with gpu:
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        packed = getattr(layer, weights)
        setattr(layer, weights, packed.to(torch.int16))
        try:
            with pytest.raises(RuntimeError, match="wrong dtypes"):
                layer(torch.empty(1, 1, 1024, dtype=torch.bfloat16, device=CUDA))
        finally:
            setattr(layer, weights, packed)
