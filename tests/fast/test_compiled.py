"""Compiled and recorded steps compute what plain ones do, whatever the memory, and are compiled
once.
"""

import contextlib
import copy
import gc
import shutil
import weakref
from typing import Any

import pytest
import torch

from minimas import Aligner, KVCache, Qwen3, load, think
from minimas.core.cache import Positions
from minimas.fast import packed
from minimas.fast.compiled import SPARE_SLOTS, Recorded, check_compiler, compile_steps
from minimas.fast.packed import pack

from ..models import TINY, apart, random_ids, remember, tiny_model

# torch's own compiler imports what torch deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no C++ compiler is installed"
)


def steps(
    model: Qwen3, count: int, lengths: list[int] | None = None, rows: int = 2
) -> torch.Tensor:
    """Thoughts of `count` steps behind two rows or one, ragged if `lengths` says so."""
    hidden, cache = remember(model, random_ids(model, rows, 7), lengths)
    return think(model, Aligner.from_model(model, "identity"), hidden[:, -1:], cache, count)[0]


# -- recorded (what a GPU replays; elsewhere the same function, called) --------------------------


class Layers:
    """The loop over the layers, without the compiler."""

    def __init__(self, model: Qwen3) -> None:
        self.model = model

    def __call__(self, x: torch.Tensor, positions: Positions, cache: KVCache) -> torch.Tensor:
        for layer, block in enumerate(self.model.model.layers):
            x = block(x, positions, cache, layer)
        return self.model.model.norm(x)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU a recorded step is the step itself."""
    monkeypatch.setattr("torch.cuda.make_graphed_callables", lambda step, sample: step)
    monkeypatch.setattr("torch.cuda.device", lambda device: contextlib.nullcontext())


@pytest.mark.parametrize("lengths", [None, [7, 3]])
def test_a_recorded_step_equals_a_plain_one(lengths: list[int] | None) -> None:
    """Over the whole room behind a mask, at positions that are a tensor, and beyond the room it was
    recorded for.
    """
    model, recorded = tiny_model(), tiny_model()
    recorded.step = Recorded(Layers(recorded))
    found, expected = (
        steps(recorded, SPARE_SLOTS + 90, lengths),
        steps(model, SPARE_SLOTS + 90, lengths),
    )
    assert apart(found, expected) <= 1e-9
    assert apart(found[:1], expected[1:]) > 0.1


def test_memories_taking_turns_are_recorded_anew() -> None:
    """A recording holds addresses: replayed for another memory, it would write into the first one's
    slots.
    """
    model, recorded = tiny_model(), tiny_model()
    recorded.step = Recorded(Layers(recorded))
    results = []
    for which in (model, recorded):
        memories = [remember(which, random_ids(which, 2, 5, seed=seed)) for seed in (1, 2)]
        states = [hidden[:, -1:] for hidden, _ in memories]
        for _ in range(3):
            states = [
                which(state, cache) for state, (_, cache) in zip(states, memories, strict=True)
            ]
        results.append(torch.cat(states))
    assert apart(results[1], results[0]) <= 1e-9
    assert apart(results[0][:2], results[0][2:]) > 0.1


def test_a_new_cache_in_the_place_of_an_old_one_is_recorded_anew() -> None:
    """A recording was found by addresses. A cache of another size that got the memory of the one
    before was read in that one's layout.
    """
    model, recorded = tiny_model(), tiny_model()
    recorded.step = Recorded(Layers(recorded))
    memory = torch.zeros(4, 2, 2 * 2 * 400 * 6, dtype=torch.float64)  # of keys and values, by layer
    for rows, slots in ((2, 400), (2, 300), (1, 400)):
        hidden, cache = remember(recorded, random_ids(recorded, rows, 7, seed=rows))
        _, other = remember(model, random_ids(model, rows, 7, seed=rows))
        for store, stores in ((memory[0], cache.keys), (memory[1], cache.values)):
            for layer, old in enumerate(stores):
                shape = (rows, 2, slots, 6)
                new = store[layer].flatten()[: rows * 2 * slots * 6].view(shape)
                new[:, :, :7] = old[:, :, :7]
                stores[layer] = new
        for _ in range(2):
            assert apart(recorded(hidden[:, -1:], cache), model(hidden[:, -1:], other)) <= 1e-9


def test_a_recording_does_not_keep_its_cache_alive() -> None:
    """The memory of the last question stayed allocated until the next one."""
    recorded = tiny_model()
    recorded.step = Recorded(Layers(recorded))
    hidden, cache = remember(recorded, random_ids(recorded, 2, 7))
    recorded(hidden[:, -1:], cache)
    references = [weakref.ref(cache), weakref.ref(cache.keys[0])]
    del cache
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    hidden, cache = remember(recorded, random_ids(recorded, 2, 7))
    recorded(hidden[:, -1:], cache)


def test_a_recording_is_freed_before_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a pool of memory of its own, and two of them were allocated at the same time."""
    pools: list[weakref.ref[object]] = []
    alive: list[int] = []

    def record(step: Any, sample: tuple[torch.Tensor, ...]) -> Any:
        alive.append(sum(pool() is not None for pool in pools))
        pool = sample[0].clone()
        pools.append(weakref.ref(pool))

        def replay(*given: torch.Tensor) -> Any:
            assert pool is not None
            return step(*given)

        return replay

    monkeypatch.setattr("torch.cuda.make_graphed_callables", record)
    recorded = tiny_model()
    recorded.step = Recorded(Layers(recorded))
    for rows in (1, 2, 3):
        hidden, cache = remember(recorded, random_ids(recorded, rows, 7))
        for _ in range(3):
            recorded(hidden[:, -1:], cache)
    assert alive == [0, 0, 0]


def test_a_recording_that_fails_leaves_no_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error for want of memory the next step would have replayed another cache's."""
    recorded = tiny_model()
    step = recorded.step = Recorded(Layers(recorded))
    hidden, first = remember(recorded, random_ids(recorded, 2, 7))
    recorded(hidden[:, -1:], first)

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr("torch.cuda.make_graphed_callables", fails)
        _, second = remember(recorded, random_ids(recorded, 2, 7))
        with pytest.raises(torch.OutOfMemoryError):
            recorded(hidden[:, -1:], second)
    assert step.replay is None and not step.recorded_for
    recorded(hidden[:, -1:], first)
    assert step.replay is not None


def test_a_copy_of_a_recorded_model_does_not_replay_the_recording_of_the_first() -> None:
    recorded = tiny_model()
    recorded.step = Recorded(Layers(recorded))
    hidden, cache = remember(recorded, random_ids(recorded, 2, 7))
    expected = recorded(hidden[:, -1:], cache.fork())
    recorded(hidden[:, -1:], cache)
    twin = copy.deepcopy(recorded)
    twin.model.norm.weight.data.mul_(2)
    found = twin.step(hidden[:, -1:], cache.truncate(7))  # type: ignore[misc]
    assert apart(found, 2 * expected) <= 1e-9


# -- compiled --------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("quantize", [None, "q4", "q8"])
def test_compiled_steps_equal_plain_ones_and_are_compiled_once(quantize: str | None) -> None:
    """For all layers, while the memory grows, for any number of rows: a recompilation at every step
    would cost more.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    plain = load(TINY, device="cpu", quantize=quantize).model
    fast = load(TINY, device="cpu", quantize=quantize, compile=True).model
    steps(fast, 90)  # past the room that the memory began with
    counters.clear()
    steps(fast, 200)
    assert counters["stats"]["unique_graphs"] == 0
    for lengths in (
        None,
        [3, 7],
    ):  # two thoughts: bf16 rounds at other places, and later ones amplify it
        assert apart(steps(fast, 2, lengths).double(), steps(plain, 2, lengths).double()) <= 0.05


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("quantize", [None, "q8"])
def test_a_compiled_step_of_one_row_equals_a_plain_one(quantize: str | None) -> None:
    """It multiplies by code of its own, as long as the weights are plain; after a step of two rows
    they may not be.
    """
    torch._dynamo.reset()
    plain = load(TINY, device="cpu", quantize=quantize).model
    fast = load(TINY, device="cpu", quantize=quantize, compile=True).model
    for rows in (1, 2, 1):
        expected = steps(plain, 2, rows=rows).double()
        assert apart(steps(fast, 2, rows=rows).double(), expected) <= 0.05
    assert apart(expected, steps(fast, 2, rows=2)[1:].double()) > 0.2, (
        "the bound tells nothing apart"
    )
    assert fast.fingerprint() == plain.fingerprint()


@pytest.mark.slow
@needs_compiler
def test_compiled_steps_of_few_rows_multiply_in_a_loop_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nothing is packed. One compilation for all layers: another layout in a later layer
    would be one more.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    monkeypatch.setattr(packed, "has_units", lambda dtype: dtype.itemsize != 2)
    monkeypatch.setattr(packed, "can_pack", lambda: False)
    plain, fast = load(TINY, device="cpu").model, load(TINY, device="cpu", compile=True).model
    called: list[torch.Size] = []
    linear = packed.linear

    def counted(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        called.append(x.shape)
        return linear(x, *weights)

    for rows, graphs in ((5, 1), (12, 0)):
        _, cache = remember(fast, random_ids(fast, rows, 7))
        _, other = remember(plain, random_ids(plain, rows, 7))
        new = fast.embed(random_ids(fast, rows, 1, seed=1))
        counters.clear()
        monkeypatch.setattr(packed, "linear", counted)
        found = fast(new, cache).double()
        monkeypatch.setattr(packed, "linear", linear)
        assert counters["stats"]["unique_graphs"] == graphs
        expected = plain(new, other).double()
        assert apart(found, expected) <= 0.02
        assert apart(found.roll(1, 0), expected) > 0.2, "the bound tells no rows apart"
    assert not called, "few rows went to torch's product"


def test_a_model_that_compiling_makes_no_faster_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The compiler cannot read a packed weight, and float16 has no loop for few rows."""
    monkeypatch.setattr(packed, "has_units", lambda dtype: dtype.itemsize != 2)
    for dtype, can_pack, compiled in (
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, False),
        (torch.float16, False, False),
        (torch.float32, True, True),
    ):
        monkeypatch.setattr("minimas.fast.compiled.can_pack", lambda can_pack=can_pack: can_pack)
        model = tiny_model(dtype=dtype)
        pack(model)
        compile_steps(model)
        assert (model.step is not None) == compiled, (dtype, can_pack)


@needs_compiler
def test_a_copy_of_a_compiled_model_multiplies_by_its_own_weights() -> None:
    """The compiled code found a layer by a number that the copy had too."""
    torch._dynamo.reset()
    fast = load(TINY, device="cpu", compile=True).model
    steps(fast, 2)
    twin = copy.deepcopy(fast)
    assert twin.step is not None and twin.step is not fast.step
    zeros = {name: torch.zeros_like(tensor) for name, tensor in twin.state_dict().items()}
    twin.load_state_dict(zeros | {"model.embed_tokens.weight": fast.model.embed_tokens.weight})
    _, cache = remember(twin, random_ids(twin, 2, 7))
    assert not bool(twin(twin.embed(random_ids(twin, 2, 1)), cache).any())
    assert apart(steps(fast, 2).double(), steps(load(TINY, device="cpu").model, 2).double()) <= 0.05


@pytest.mark.slow
@needs_compiler
def test_compiled_steps_are_exact_in_float64() -> None:
    torch._dynamo.reset()
    plain, fast = tiny_model(), tiny_model()
    compile_steps(fast)
    assert apart(steps(fast, 5), steps(plain, 5)) <= 1e-12


def test_without_a_compiler_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    with pytest.raises(
        ValueError, match=r"compile: found no C\+\+ compiler, expected g\+\+ or clang"
    ):
        load("/nowhere/at/all", device="cpu", compile=True)
    with pytest.raises(ValueError, match="no C"):
        check_compiler("cpu")


def test_without_triton_a_gpu_is_told_so_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It failed at the first step, with a traceback from inside the compiler."""
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"compile: found no Triton .* pip install triton"):
        check_compiler("cuda")
    check_compiler("cpu")
