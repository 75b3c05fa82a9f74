"""Steps of one position, faster: what `load(compile=True)` does to a model. Does not change what it computes.

A step of one thought or token is hundreds of tiny operations between a few large products. The compiler fuses them, in
one pure function a layer, from behind its memory to before the next one's; all layers share what was compiled, and the
growing memory does not change it. On a GPU the whole step is then recorded once a memory and replayed, so that no
launch waits for Python. Longer inputs, where the products take all the time, stay as they are.

Does not know: the mathematics of a layer, prompts, agents.
"""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.cache import KVCache, with_room
from ..core.model import Block, Places, Qwen3
from .packed import CPULinear

ROOM = 256  # slots that a recorded step has before it must be recorded anew

# A packed weight is an object that no graph can hold. It goes in as a number, and the operator finds the layer by it.
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_library = torch.library.Library(__name__.replace(".", "_"), "DEF")
_library.define("product(Tensor x, Tensor handle, int n) -> Tensor")
_library.impl("product", lambda x, handle, n: _layers[int(handle)].product(x), "CPU")
_library.impl("product", lambda x, handle, n: x.new_empty(*x.shape[:-1], n), "Meta")
_product = getattr(torch.ops, __name__.replace(".", "_")).product.default


def check_compiler() -> None:
    """Raise ValueError, before anything is read, where torch.compile has no compiler to call."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ValueError(
            f"compile (--compile): found no C++ compiler, expected g++ or clang++ ({error})"
        ) from error


def compile_steps(model: Qwen3) -> None:
    """Compile the model's steps of one position, in place; the work happens at the first of them, for seconds."""
    for layer in model.model.layers.modules():
        if hasattr(layer, "opaque"):
            layer.opaque, layer.handle = _product, torch.tensor(id(layer))
            _layers[id(layer)] = layer
    compiled = Compiled(model)
    model.step = Recorded(model, compiled.layers) if model.device.type == "cuda" else compiled


class Compiled:
    """A model's step of one position, in compiled pieces: what lies between one append to the memory and the next."""

    def __init__(self, model: Qwen3) -> None:
        self.model = model
        self.packing = [
            layer for layer in model.model.layers.modules() if isinstance(layer, CPULinear)
        ]
        self.before, self.between, self.behind = (
            torch.compile(
                piece, dynamic=True, options={"size_asserts": False}
            )  # they took 3 % of a step
            for piece in (Block.before, _between, Block.behind)
        )

    def __call__(self, inputs_embeds: Tensor, cache: KVCache) -> Tensor:
        if len(inputs_embeds) > 1:  # one row reads plain weights faster, more read packed ones
            for layer in self.packing:
                layer.pack()
        return self.layers(
            inputs_embeds, self.model.places_of(cache, *inputs_embeds.shape[:2]), cache
        )

    def layers(self, x: Tensor, at: Places, memory: Any) -> Tensor:
        """As `Qwen3.layers`."""
        blocks: Any = list(self.model.model.layers)
        q, k, v = self.before(blocks[0], x, at.cos, at.sin)
        for layer, (block, following) in enumerate(itertools.pairwise(blocks)):
            k, v = memory.append(layer, k, v)
            x, q, k, v = self.between(block, following, at, x, q, k, v)
        k, v = memory.append(len(blocks) - 1, k, v)
        return self.model.model.norm(self.behind(blocks[-1], x, q, k, v, at.mask))  # type: ignore[no-any-return]


def _between(
    block: Block, following: Block, at: Places, x: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Any:
    x = block.behind(x, q, k, v, at.mask)
    return x, *following.before(x, at.cos, at.sin)


class Recorded:
    """A model's step of one position over a memory whose place and size do not change: (B, 1, D) -> (B, 1, D).

    A recording holds addresses, not values. So positions are a tensor, keys go to the slots that it names, and the
    queries look at the whole room behind a mask. Another memory, or one that has grown, is recorded anew.
    """

    def __init__(self, model: Qwen3, layers: Callable[..., Tensor]) -> None:
        self.model, self.layers = model, layers
        self.recorded_for: tuple[int, ...] = ()

    def __call__(self, inputs_embeds: Tensor, cache: KVCache) -> Tensor:
        needed = int(cache.lengths.max()) + 1
        if cache.keys[0].shape[2] < needed:
            for stores in (cache.keys, cache.values):
                stores[:] = [
                    with_room(store, needed + ROOM, heads=store.shape[1]) for store in stores
                ]
        memory = (len(inputs_embeds), *(store.data_ptr() for store in (*cache.keys, *cache.values)))
        if self.recorded_for != memory:
            self._record(inputs_embeds, cache)
            self.recorded_for = memory
        self.embeds.copy_(inputs_embeds)
        self.positions.copy_(cache.lengths[:, None])
        return self.replay().clone()

    def _record(self, inputs_embeds: Tensor, cache: KVCache) -> None:
        self.embeds = inputs_embeds.clone()  # (B, 1, D)
        self.positions = cache.lengths[:, None].to(cache.device)  # (B, 1)
        slots = Slots(cache, self.positions)

        def step() -> Tensor:
            return self.layers(
                self.embeds, self.model.places(self.positions, cache.keys[0].shape[2]), slots
            )

        self.replay = record(step, self.model.device)


class Slots:
    """What `append` is in a recording: one new slot a row, at `positions` (B, 1); everything is seen, and masked."""

    def __init__(self, cache: KVCache, positions: Tensor) -> None:
        self.keys, self.values, self.positions = list(cache.keys), list(cache.values), positions
        self.rows = torch.arange(len(positions), device=positions.device)[:, None]  # (B, 1)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store[self.rows, :, self.positions] = new.transpose(1, 2)  # indexed as (B, 1, K, d)
        return self.keys[layer], self.values[layer]


def record(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`step` as a CUDA graph: what to call to run it again on what its tensors hold then; elsewhere `step` itself."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream(
        device
    )  # a first run compiles and allocates, which a recording must not
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
