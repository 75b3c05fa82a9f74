"""Compiled and recorded steps compute what plain ones do, whatever the memory, and are compiled
once.
"""

import shutil
from collections.abc import Callable

import pytest
import torch

from minimas import Aligner, KVCache, Qwen3, load, think
from minimas.core.cache import Positions
from minimas.fast import packed
from minimas.fast.compiled import SPARE_SLOTS, Recorded, check_compiler, compile_steps
from minimas.fast.packed import CPULinear, pack

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


def plain_layers(model: Qwen3) -> Callable[[torch.Tensor, Positions, KVCache], torch.Tensor]:
    """Return the loop over the layers, without the compiler."""

    def layers(x: torch.Tensor, positions: Positions, cache: KVCache) -> torch.Tensor:
        for layer, block in enumerate(model.model.layers):
            x = block(x, positions, cache, layer)
        return model.model.norm(x)

    return layers


@pytest.mark.parametrize("lengths", [None, [7, 3]])
def test_a_recorded_step_equals_a_plain_one(lengths: list[int] | None) -> None:
    """Over the whole room behind a mask, at positions that are a tensor, and beyond the room it was
    recorded for.
    """
    model, recorded = tiny_model(), tiny_model()
    recorded.step = Recorded(plain_layers(recorded))
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
    recorded.step = Recorded(plain_layers(recorded))
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
    """Where nothing is packed. One compilation for each piece: another layout in a later layer
    would be one more.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    monkeypatch.setattr(packed, "has_units", lambda dtype: dtype.itemsize != 2)
    monkeypatch.setattr(packed, "can_pack", lambda: False)
    plain, fast = load(TINY, device="cpu").model, load(TINY, device="cpu", compile=True).model
    product, called = CPULinear.product, list[CPULinear]()

    def counted(layer: CPULinear, x: torch.Tensor) -> torch.Tensor:
        called.append(layer)
        return product(layer, x)

    for rows, graphs in ((5, 3), (12, 0)):
        _, cache = remember(fast, random_ids(fast, rows, 7))
        _, other = remember(plain, random_ids(plain, rows, 7))
        new = fast.embed(random_ids(fast, rows, 1, seed=1))
        counters.clear()
        monkeypatch.setattr(CPULinear, "product", counted)
        found = fast(new, cache).double()
        monkeypatch.setattr(CPULinear, "product", product)
        assert counters["stats"]["unique_graphs"] == graphs
        expected = plain(new, other).double()
        assert apart(found, expected) <= 0.02
        assert apart(found.roll(1, 0), expected) > 0.2, "the bound tells no rows apart"
    assert not called, "few rows went to torch's product"


def test_matrices_are_packed_when_a_compiled_step_has_rows_to_share_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packed for a prompt, the steps of one row behind it lose their loop; never packed, several
    rows pay each.
    """
    called: list[CPULinear] = []
    monkeypatch.setattr(CPULinear, "pack", lambda layer: called.append(layer))
    # CPULinear on any CPU
    monkeypatch.setattr(packed, "has_units", lambda dtype: dtype.itemsize != 2)
    monkeypatch.setattr("torch.compile", lambda piece, **_: piece)
    model = tiny_model(dtype=torch.bfloat16)
    pack(model)
    remember(model, random_ids(model, 1, 5))
    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, CPULinear)]
    assert called[: len(layers)] == layers, "without compiled steps it is at once"
    called.clear()
    compile_steps(model)
    for rows, expected in ((1, []), (2, layers)):
        _, cache = remember(model, random_ids(model, rows, 5))
        assert called == []
        model(model.embed(random_ids(model, rows, 1)), cache)
        assert called == expected


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
        check_compiler()
