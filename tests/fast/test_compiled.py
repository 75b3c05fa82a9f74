"""Compiled and recorded steps compute what plain steps do, for any KV cache.

They are compiled only once.
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
from minimas.fast.compiled import SPARE_SLOTS, Compiled, Recorded, check_compiler, compile_steps
from minimas.fast.few_rows import MAX_ROWS

from ..models import TINY, apart, random_ids, remember, tiny_model

# torch's compiler imports deprecated parts of torch
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no C++ compiler is installed"
)


def steps(
    model: Qwen3, count: int, lengths: list[int] | None = None, rows: int = 2
) -> torch.Tensor:
    """Return the thoughts of `count` steps after a prompt.

    There are two rows or one, ragged if `lengths` says so.
    """
    hidden, cache = remember(model, random_ids(model, rows, 7), lengths)
    return think(model, Aligner.from_model(model, "identity"), hidden[:, -1:], cache, count)[0]


# -- recorded steps (replayed on a GPU, and called elsewhere) --------------------------------------


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
    """Without a GPU, a recorded step is the step itself."""
    monkeypatch.setattr("torch.cuda.make_graphed_callables", lambda step, sample: step)
    monkeypatch.setattr("torch.cuda.device", lambda device: contextlib.nullcontext())


@pytest.mark.parametrize("lengths", [None, [7, 3]])
def test_a_recorded_step_equals_a_plain_one(lengths: list[int] | None) -> None:
    """It uses all allocated slots with a mask, and positions in a tensor.

    The steps go beyond the slots that it was recorded for.
    """
    model, recorded = tiny_model(), tiny_model()
    recorded.step = Recorded(Layers(recorded))
    found, expected = (
        steps(recorded, SPARE_SLOTS + 90, lengths),
        steps(model, SPARE_SLOTS + 90, lengths),
    )
    assert apart(found, expected) <= 1e-9
    assert apart(found[:1], expected[1:]) > 0.1


def test_caches_used_in_turn_are_recorded_again() -> None:
    """A recording contains addresses.

    Replayed for another cache, it would write into the slots of the first one.
    """
    model, recorded = tiny_model(), tiny_model()
    recorded.step = Recorded(Layers(recorded))
    results = []
    for current in (model, recorded):
        caches = [remember(current, random_ids(current, 2, 5, seed=seed)) for seed in (1, 2)]
        states = [hidden[:, -1:] for hidden, _ in caches]
        for _ in range(3):
            states = [
                current(state, cache) for state, (_, cache) in zip(states, caches, strict=True)
            ]
        results.append(torch.cat(states))
    assert apart(results[1], results[0]) <= 1e-9
    assert apart(results[0][:2], results[0][2:]) > 0.1


def test_a_new_cache_at_the_address_of_an_old_one_is_recorded_again() -> None:
    """Recordings were identified by addresses.

    A cache of another size at the address of an older one was read with the older one's layout.
    """
    model, recorded = tiny_model(), tiny_model()
    recorded.step = Recorded(Layers(recorded))
    memory = torch.zeros(4, 2, 2 * 2 * 400 * 6, dtype=torch.float64)  # keys and values per layer
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
    """The KV cache of the last question stayed allocated until the next question."""
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
    """Each recording has its own pool of memory, and two of them were allocated at once."""
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


def test_a_failed_recording_removes_the_previous_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an out-of-memory error, the next step would have replayed another cache's recording."""
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


def test_a_copy_of_a_model_does_not_replay_the_recording_of_the_original() -> None:
    recorded = tiny_model()
    recorded.step = Recorded(Layers(recorded))
    hidden, cache = remember(recorded, random_ids(recorded, 2, 7))
    expected = recorded(hidden[:, -1:], cache.fork())
    recorded(hidden[:, -1:], cache)
    copied = copy.deepcopy(recorded)
    copied.model.norm.weight.data.mul_(2)
    found = copied.step(hidden[:, -1:], cache.truncate(7))  # type: ignore[misc]
    assert apart(found, 2 * expected) <= 1e-9


# -- compiled --------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("has_loop", [True, False])
def test_the_loop_over_8_bits_is_for_one_row_with_avx512(
    has_loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On AVX2 the compiler loads 8-bit values one by one, and a step took five times as long."""
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr("minimas.fast.quantize.packing_is_faster", lambda: has_loop)
    for rows in (1, 2):
        torch._dynamo.reset()
        fast = load(TINY, device="cpu", quantize="q8", compile=True).model
        _, cache = remember(fast, random_ids(fast, rows, 7))
        _, (code,) = run_and_get_code(fast, fast.embed(random_ids(fast, rows, 1)), cache)
        assert ("_weight_int8pack_mm" not in code) == (has_loop and rows == 1)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("quantize", [None, "q4", "q8"])
def test_compiled_steps_equal_plain_ones_and_are_compiled_once(quantize: str | None) -> None:
    """One compilation serves all layers, any number of rows, and a growing cache.

    Compiling at every step would cost more than it saves.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    plain = load(TINY, device="cpu", quantize=quantize).model
    fast = load(TINY, device="cpu", quantize=quantize, compile=True).model
    steps(fast, 90)  # beyond the slots that the cache starts with
    counters.clear()
    steps(fast, 200)
    assert counters["stats"]["unique_graphs"] == 0
    for lengths in (
        None,
        [3, 7],
    ):  # two thoughts: bf16 rounds at other places, and later thoughts amplify that
        assert apart(steps(fast, 2, lengths).double(), steps(plain, 2, lengths).double()) <= 0.05


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("quantize", [None, "q8"])
def test_a_compiled_step_of_one_row_equals_a_plain_one(quantize: str | None) -> None:
    """One row has its own product code, as long as the weights are plain.

    After a step of two rows they may not be.
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
def test_a_compiled_step_writes_one_slot_and_copies_no_others() -> None:
    """New keys were stored through a slice, for which the compiled code copied the whole cache.

    Steps became slower than steps that are not compiled, the more so the longer the cache.
    """
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    fast = load(TINY, device="cpu", quantize="q8", compile=True).model
    _, cache = remember(fast, random_ids(fast, 2, 7))
    _, (code,) = run_and_get_code(fast, fast.embed(random_ids(fast, 2, 1)), cache)
    assert "index_put" in code
    assert "copy_copy" not in code


@pytest.mark.slow
@needs_compiler
def test_compiled_steps_of_few_rows_use_their_own_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This applies if nothing is packed.

    All layers share one compilation. Another layout in a later layer would need one more.
    """
    from torch._dynamo.utils import counters
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    monkeypatch.setattr(packed, "has_units", lambda dtype: dtype.itemsize != 2)
    monkeypatch.setattr(packed, "packing_is_faster", lambda: False)
    monkeypatch.setattr(packed, "AVX512", False)
    plain, fast = load(TINY, device="cpu").model, load(TINY, device="cpu", compile=True).model
    for rows in (5, 12):
        _, cache = remember(fast, random_ids(fast, rows, 7))
        _, other = remember(plain, random_ids(plain, rows, 7))
        new = fast.embed(random_ids(fast, rows, 1, seed=1))
        counters.clear()
        if rows == 5:
            found, (code,) = run_and_get_code(fast, new, cache)
            assert "extern_kernels." not in code, "few rows went to torch's product"
        else:
            found = fast(new, cache)
            assert not counters["stats"], "they were compiled again"
        expected = plain(new, other).double()
        assert apart(found.double(), expected) <= 0.02
        assert apart(found.double().roll(1, 0), expected) > 0.2, "the bound tells no rows apart"


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("quantize", [None, "q4", "q8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_logits_equal_plain_ones(quantize: str | None, dtype: torch.dtype) -> None:
    """A loop over 8-bit values gave NaN, because it was fused with what computes its inputs."""
    torch._dynamo.reset()
    plain = load(TINY, device="cpu", dtype=dtype, quantize=quantize).model
    fast = load(TINY, device="cpu", dtype=dtype, quantize=quantize, compile=True).model
    for rows in (1, 2, 13, 1):
        states = []
        for model in (fast, plain):
            _, cache = remember(model, random_ids(model, rows, 7))
            new = model.embed(random_ids(model, rows, 1, seed=1))
            hidden = model(new, cache)
            states.append(torch.cat([hidden.double(), model.logits(hidden).double()], -1))
        assert apart(*states) <= 0.03
    assert fast.fingerprint() == plain.fingerprint()


def test_a_model_of_any_dtype_is_compiled() -> None:
    """With float16 on a CPU, compile=True did nothing, without a word."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = tiny_model(dtype=dtype)
        packed.pack(model)
        compile_steps(model)
        assert model.step is not None, dtype


@pytest.mark.parametrize("packs", [True, False])
def test_an_untied_head_is_compiled_only_where_it_cannot_be_packed(
    packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without bf16 instructions, a head that stays plain went through torch's slow product."""
    monkeypatch.setattr(packed, "packing_is_faster", lambda: packs)
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=False)
    packed.pack(model)
    compile_steps(model)
    assert ("logits" in vars(model)) != packs


@pytest.mark.parametrize(
    ("wide", "packs", "dtype", "options", "max_rows"),
    [
        (True, True, torch.bfloat16, {"cpp.simdlen": 256}, 1),
        (True, False, torch.bfloat16, {"cpp.simdlen": 256}, MAX_ROWS),
        (True, True, torch.float32, None, MAX_ROWS),
        (False, False, torch.bfloat16, None, MAX_ROWS),
    ],
)
def test_the_loop_over_16_bits_has_vectors_of_256_bits(
    wide: bool,
    packs: bool,
    dtype: torch.dtype,
    options: Any,
    max_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 512 bits a compiled step took 236 ms on an Intel Xeon, and 82 ms not compiled.

    That CPU cannot pack bf16. Its steps of several rows were not compiled, and took twice as long.
    """
    given: list[Any] = []
    monkeypatch.setattr(packed, "AVX512", wide)
    monkeypatch.setattr(packed, "packing_is_faster", lambda: packs)
    monkeypatch.setattr(torch, "compile", lambda *_, **options: given.append(options["options"]))
    model = tiny_model(dtype=dtype)
    packed.pack(model)
    compiled = Compiled(model)
    assert given == [options] * 2
    assert compiled.max_rows == max_rows


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(not packed.packing_is_faster(), reason="this CPU cannot pack bf16 matrices")
def test_weights_are_plain_in_steps_of_one_row_and_packed_in_steps_of_several() -> None:
    """One row is faster in the compiled loop, and several rows with packed weights.

    There is one copy of the weights, and a prefill takes them as they are.
    """
    torch._dynamo.reset()
    fast = load(TINY, device="cpu", compile=True).model
    layers = [m for m in fast.model.layers.modules() if isinstance(m, packed.CPULinear)]
    for rows in (1, 3, 1):
        steps(fast, 2, rows=rows)
        assert [layer.packed is not None for layer in layers] == [rows > 1] * len(layers)
        assert ["weight" in layer._parameters for layer in layers] == [rows == 1] * len(layers)
        packs = [layer.packs for layer in layers]
        remember(fast, random_ids(fast, 2, 7))
        assert [layer.packs for layer in layers] == packs


@pytest.mark.slow
@needs_compiler
def test_a_copy_of_a_compiled_model_uses_its_own_weights() -> None:
    """The compiled code found a layer by a number, and the copy had the same number."""
    torch._dynamo.reset()
    fast = load(TINY, device="cpu", compile=True).model
    steps(fast, 2)
    copied = copy.deepcopy(fast)
    assert copied.step is not None and copied.step is not fast.step
    zeros = {name: torch.zeros_like(tensor) for name, tensor in copied.state_dict().items()}
    copied.load_state_dict(zeros | {"model.embed_tokens.weight": fast.model.embed_tokens.weight})
    _, cache = remember(copied, random_ids(copied, 2, 7))
    assert not bool(copied(copied.embed(random_ids(copied, 2, 1)), cache).any())
    assert apart(steps(fast, 2).double(), steps(load(TINY, device="cpu").model, 2).double()) <= 0.05


@pytest.mark.slow
@needs_compiler
def test_compiled_steps_are_exact_in_float64() -> None:
    torch._dynamo.reset()
    plain, fast = tiny_model(), tiny_model()
    compile_steps(fast)
    assert apart(steps(fast, 5), steps(plain, 5)) <= 1e-12


def test_a_missing_compiler_is_reported_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    with pytest.raises(
        ValueError, match=r"compile: found no C\+\+ compiler, expected g\+\+ or clang"
    ):
        load("/nowhere/at/all", device="cpu", compile=True)
    with pytest.raises(ValueError, match="no C"):
        check_compiler("cpu")


def test_missing_triton_is_reported_before_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It failed at the first step, with a traceback from inside the compiler."""
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"compile: found no Triton .* pip install triton"):
        check_compiler("cuda")
    check_compiler("cpu")
