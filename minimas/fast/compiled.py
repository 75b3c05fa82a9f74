"""Faster steps of one position: what `load(compile=True)` does to a model.

Results stay the same, up to rounding. A step of one thought or token is hundreds of tiny operations
between a few large products. torch.compile fuses them, one layer at a time. All layers share the
compiled code, and a growing cache does not cause another compilation. On a GPU the whole step is
also recorded as a CUDA graph, once per cache: one call then starts all of its kernels, and no
kernel waits for Python. Longer inputs, where the products take nearly all the time, are not
compiled.

On a CPU most of the gain in bf16 and q8 comes from loops that are fast only if they are compiled
(few_rows.py, and `Q8Linear.multiply`). The README's latent step of one row takes 43 ms in bf16, 29
in q8 and 31 in q4, and 66, 49 and 39 ms not compiled: 1.5, 1.7 and 1.25 times as fast (2-core AMD
EPYC with AVX-512, 2026-11-30). CUDA graphs are untested.

    B rows   D hidden   S slots
"""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.cache import KVCache, Positions, with_capacity
from ..core.errors import ParameterError
from ..core.model import Block, Qwen3
from . import packed
from .few_rows import MAX_ROWS

SPARE_SLOTS = 256  # per allocation; once they are filled, a GPU's step is recorded again


def check_compiler(device_type: str) -> None:
    """Check, before any file is read, that torch.compile has the compilers that it needs.

    Raises ValueError without a C++ compiler, or on a GPU without Triton.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ParameterError(
            "compile", f"found no C++ compiler, expected g++ or clang++ ({error})"
        ) from error
    if device_type == "cuda" and not has_triton():
        raise ParameterError(
            "compile",
            "found no Triton that runs on this GPU, "
            "expected compute capability 7.0 or newer, and: pip install triton",
        )


def compile_steps(model: Qwen3) -> None:
    """Compile the model's steps of one position, in place. The first step takes seconds longer.

    On a CPU the LM head is compiled too, unless it can be packed. A float16 model that is not
    quantized gains little on a CPU: 1.15 times for a step of one row, 0.93 for one of eight.
    """
    compiled = Compiled(model)
    model.step = Recorded(compiled.layers) if model.device.type == "cuda" else compiled
    packs = isinstance(model.lm_head, packed.CPULinear) and packed.packing_is_faster()
    if model.step is compiled and not packs:
        model.logits = compiled.logits  # type: ignore[method-assign]


def allocate(cache: KVCache) -> None:
    """Allocate the slot of the next step, and spare slots for later steps.

    A compiled step cannot allocate slots, and a recorded step needs tensors that do not move.
    """
    needed = max(cache.lengths) + 1
    if cache.keys[0].shape[2] <= needed:  # `append` keeps one slot free
        for stores in (cache.keys, cache.values):
            stores[:] = [with_capacity(x, needed + SPARE_SLOTS, x.shape[1]) for x in stores]


class Compiled:
    """A model's step of one position with compiled layers.

    On a CPU more than `max_rows` rows go through the layers without compilation, because the
    products take nearly all of their time, and compiling them takes minutes. Where weights can be
    packed it is one row: torch's packed product is faster for several.
    """

    def __init__(self, model: Qwen3) -> None:
        self.model = model
        self.cpu_linears = [
            m for m in model.model.layers.modules() if isinstance(m, packed.CPULinear)
        ]
        self.max_rows = 1 if self.cpu_linears and packed.packing_is_faster() else MAX_ROWS
        # Vectors of 256 bits make a product in few_rows.py 6 times as fast on an Intel Xeon without
        # bf16 instructions: 1.4 ms against 8.6. On an AMD EPYC with bf16 instructions they cost
        # little: a step takes 40 ms with AVX2's code, and 38 with that of AVX-512.
        options: Any = {"cpp.simdlen": 256} if self.cpu_linears and packed.AVX512 else None
        self.block = torch.compile(Block.forward, dynamic=True, options=options)
        self.head = torch.compile(Qwen3.logits, dynamic=True, options=options)

    def __call__(self, inputs_embeds: Tensor, cache: KVCache) -> Tensor:
        allocate(cache)
        return self.layers(inputs_embeds, cache.next_positions(len(inputs_embeds), 1), cache)

    def layers(self, x: Tensor, positions: Positions, cache: KVCache) -> Tensor:
        """Return the final hidden states, as the loop of `Qwen3.forward` does."""
        many = len(x) > self.max_rows and x.is_cpu
        # The compiled loop needs plain weights; many rows are faster with packed ones.
        for linear in self.cpu_linears:
            if linear.packs != many:
                linear.packs = many
                linear.unpack()
        block = Block.forward if many else self.block
        decoder = self.model.model
        for layer, keys, values in zip(decoder.layers, cache.keys, cache.values, strict=True):
            # Pass a cache of one layer: a layer number would become part of the compiled code.
            one = copy.copy(cache)
            one.keys = [keys]
            one.values = [values]
            x = block(layer, x, positions, one, 0)
        return decoder.norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the next token, as `Qwen3.logits` does."""
        head = self.head if hidden.shape[:-1].numel() <= self.max_rows else Qwen3.logits
        return head(self.model, hidden)


class Recorded:
    """A model's step of one position, recorded for one cache and its current tensors.

    A recording holds addresses, not values. Therefore positions are a tensor, keys go to the slots
    that this tensor names, and queries attend to all allocated slots under a mask. A step on
    another cache, or on one that has grown, is recorded again. The recording does not keep the
    cache alive.
    """

    def __init__(self, layers: Callable[..., Tensor]) -> None:
        self.layers = layers
        self.recorded_for: list[Any] = []  # weak references
        self.replay: Any = None

    def __call__(self, inputs_embeds: Tensor, cache: KVCache) -> Tensor:
        allocate(cache)
        # A blocking copy would make the host wait for the previous step.
        slots = torch.tensor(cache.lengths)[:, None].to(cache.device, non_blocking=True)  # (B, 1)
        # Compare the tensors, not their addresses, which a later cache of another shape may reuse.
        # `self` is included because a deep copy of this object is for another model.
        used = (self, cache, *cache.keys, *cache.values)
        if [id(old()) for old in self.recorded_for] != [id(new) for new in used]:
            self.recorded_for = []
            self.replay = None  # frees its memory for the new recording
            self.replay = self._record(cache, inputs_embeds, slots)
            self.recorded_for = [weakref.ref(new) for new in used]
        return self.replay(inputs_embeds, slots).clone()  # type: ignore[no-any-return]

    def _record(self, cache: KVCache, *sample: Tensor) -> Callable[..., Any]:
        """Return the step on `cache` as a recorded function of embeddings and slots."""
        the_cache: Any = weakref.ref(cache)
        total = cache.keys[0].shape[2] - 1  # `append` keeps one slot free

        def step(inputs_embeds: Tensor, slots: Tensor) -> Tensor:
            positions = the_cache().positions_at(slots, total, ragged=True)
            return self.layers(inputs_embeds, positions, the_cache())

        with torch.cuda.device(cache.device):
            # The copies are the inputs that the recording reads.
            return torch.cuda.make_graphed_callables(step, tuple(x.clone() for x in sample))
