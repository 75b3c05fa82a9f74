"""Faster steps of one position: what `load(compile=True)` does to a model. Results stay the same.

A step of one thought or token is hundreds of tiny operations between a few large products.
torch.compile fuses them, in one function per layer: from after the append to the KV cache up to
the append of the next layer. All layers share what was compiled, and a growing cache compiles
nothing anew. On a GPU the whole step is also recorded as a CUDA graph, once per cache, so that no
launch waits for Python. Longer inputs, where the products take all the time, are not compiled.

Does not know: prompts, agents.

    B rows   T new positions   S slots   D hidden   H query heads   K key-value heads   d head size
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.cache import KVCache, Positions, with_capacity
from ..core.errors import ParameterError
from ..core.model import Block, Qwen3
from ..core.rotary import rotate
from .packed import CPULinear, has_units

SPARE_SLOTS = 256  # steps until a recorded step must be recorded anew

# No graph can hold a packed weight. It goes in as a number, by which the operator finds the layer.
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_namespace = __name__.replace(".", "_")
_library = torch.library.Library(_namespace, "DEF")
_library.define("product(Tensor x, Tensor handle, int n) -> Tensor")
_library.impl("product", lambda x, handle, n: _layers[int(handle)].product(x), "CPU")
_library.impl("product", lambda x, handle, n: x.new_empty(*x.shape[:-1], n), "Meta")
_product = getattr(torch.ops, _namespace).product.default


def check_compiler() -> None:
    """Raise ValueError if torch.compile has no C++ compiler to call, before any file is read."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        problem = f"found no C++ compiler, expected g++ or clang++ ({error})"
        raise ParameterError("compile", problem) from error


def compile_steps(model: Qwen3) -> None:
    """Compile the model's steps of one position, in place. The first step takes seconds for it."""
    # The compiler cannot trace this question, only keep its answer. Not a decorator: that would
    # import the compiler, 2 s and 75 MB, with every `import minimas`.
    torch.compiler.assume_constant_result(has_units)
    for layer in model.model.layers.modules():
        if hasattr(layer, "opaque"):
            layer.opaque, layer.handle = _product, torch.tensor(id(layer))
            _layers[id(layer)] = layer
    compiled = Compiled(model)
    model.step = Recorded(compiled.layers) if model.device.type == "cuda" else compiled


def pre_attention(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Return what `block` does before the append: queries (B, H, T, d), keys, values (B, K, T, d).

    This and `post_attention` are `Attention.forward` and `Block.forward`, without the cache.
    """
    attention, x = block.self_attn, block.input_layernorm(x)
    heads = (*x.shape[:2], -1, attention.head_dim)
    q = attention.q_norm(attention.q_proj(x).view(heads)).transpose(1, 2)  # (B, H, T, d)
    k = attention.k_norm(attention.k_proj(x).view(heads)).transpose(1, 2)  # (B, K, T, d)
    v = attention.v_proj(x).view(heads).transpose(1, 2)  # (B, K, T, d)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def post_attention(
    block: Block, mask: Tensor | None, x: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Return what `block` does after the append: all keys and values (B, K, S, d) -> (B, T, D)."""
    B, H, T, d = q.shape
    q = q.reshape(B, k.shape[1], -1, d)  # (B, K, H/K · T, d)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.reshape(B, H, T, d).transpose(1, 2).reshape(B, T, -1)  # (B, T, H · d)
    x = x + block.self_attn.o_proj(out)
    return x + block.mlp(block.post_attention_layernorm(x))  # type: ignore[no-any-return]


def _between(
    block: Block, following: Block, positions: Sequence[Any], x: Tensor, *qkv: Tensor
) -> tuple[Tensor, ...]:
    cos, sin, mask = positions
    x = post_attention(block, mask, x, *qkv)
    return x, *pre_attention(following, x, cos, sin)


class Compiled:
    """A model's step of one position, compiled in pieces: the parts between two appends."""

    def __init__(self, model: Qwen3) -> None:
        self.model = model
        layers = model.model.layers.modules()
        self.packing = [layer for layer in layers if isinstance(layer, CPULinear)]
        self.first, self.between, self.last = (
            # Size checks took 3 % of a step.
            torch.compile(piece, dynamic=True, options={"size_asserts": False})
            for piece in (pre_attention, _between, post_attention)
        )

    def __call__(self, inputs_embeds: Tensor, cache: KVCache) -> Tensor:
        if len(inputs_embeds) > 1:  # one row reads plain weights faster, more read packed ones
            for layer in self.packing:
                layer.pack()
        positions = cache.next_positions(len(inputs_embeds), 1)
        return self.layers(inputs_embeds, positions, cache)

    def layers(self, x: Tensor, positions: Positions, cache: KVCache) -> Tensor:
        """Return the final hidden states, as the loop of `Qwen3.forward` does."""
        cos, sin, mask = positions[:3]
        blocks: Any = self.model.model.layers
        q, k, v = self.first(blocks[0], x, cos, sin)
        for layer, (block, following) in enumerate(itertools.pairwise(blocks)):
            k, v = cache.append(layer, k, v, positions)
            x, q, k, v = self.between(block, following, positions[:3], x, q, k, v)
        k, v = cache.append(len(blocks) - 1, k, v, positions)
        x = self.last(blocks[-1], mask, x, q, k, v)  # type: ignore[assignment]
        return self.model.model.norm(x)  # type: ignore[no-any-return]


class Recorded:
    """A model's step of one position on a cache whose address and size do not change.

    A recording holds addresses, not values. So positions are a tensor, keys go to the slots that
    it names, and queries read all allocated slots under a mask. A step on another cache, or on one
    that has grown, is recorded anew.
    """

    def __init__(self, layers: Callable[[Tensor, Positions, KVCache], Tensor]) -> None:
        self.layers = layers
        self.recorded_for: list[Any] = []

    def __call__(self, inputs_embeds: Tensor, cache: KVCache) -> Tensor:
        slots = torch.tensor(cache.lengths)[:, None]  # (B, 1)
        needed = int(slots.max()) + 1
        if cache.keys[0].shape[2] <= needed:
            for stores in (cache.keys, cache.values):
                stores[:] = [with_capacity(x, needed + SPARE_SLOTS, x.shape[1]) for x in stores]
        addresses = [x.data_ptr() for x in (*cache.keys, *cache.values)]
        recorded_for = [cache.keys[0].shape, *addresses]
        if self.recorded_for != recorded_for:
            self.embeds, self.slots = inputs_embeds.clone(), slots.to(cache.device)
            self.replay = record(functools.partial(self._step, cache), cache.device)
            self.recorded_for = recorded_for
        self.embeds.copy_(inputs_embeds)
        self.slots.copy_(slots)
        return self.replay().clone()

    def _step(self, cache: KVCache) -> Tensor:
        total = cache.keys[0].shape[2] - 1  # `append` keeps one slot free
        positions = cache.positions_at(self.slots, total, ragged=True)
        return self.layers(self.embeds, positions, cache)


def record(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Return a CUDA graph of `step`: a call runs it on what its tensors hold then.

    On other devices, return `step` itself.
    """
    if device.type != "cuda":
        return step
    # A first run compiles and allocates, which a recording must not.
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
