"""A KV cache behaves like a value, and each slot's index is its position.

The first half needs no model: its keys are random and rotated for their slots.
"""

import copy
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimas import KVCache, Qwen3
from minimas.core.model import take_last
from minimas.core.rotary import rotate

from ..models import apart, distance, filled, random_ids, remember, tiny_config, tiny_model

CONFIG = tiny_config()
seeds = st.integers(0, 99)
row_lengths = st.lists(st.integers(0, 5), min_size=1, max_size=3)


def random_cache(lengths: list[int], seed: int = 0, chunks: int = 1) -> KVCache:
    """Return a cache of random keys and values, appended in chunks.

    The padding has large values, so any leak shows.
    """
    source = torch.Generator().manual_seed(seed)
    shape = (
        2,
        CONFIG.num_hidden_layers,
        len(lengths),
        CONFIG.num_key_value_heads,
        max(lengths),
        CONFIG.head_dim,
    )
    raw_keys, values = torch.randn(shape, generator=source, dtype=torch.float64)
    counts, cache = torch.tensor(lengths), KVCache(CONFIG, len(lengths), torch.float64)
    edges = [max(lengths) * i // chunks for i in range(chunks + 1)]
    for start, end in itertools.pairwise(edges):
        taken = (counts - start).clamp(0, end - start)
        positions = cache.next_positions(len(lengths), end - start)
        padding = (torch.arange(end - start) >= taken[:, None])[:, None, :, None]
        for layer in range(CONFIG.num_hidden_layers):
            key = rotate(raw_keys[layer][:, :, start:end], positions.cos, positions.sin)
            key = key.masked_fill(padding, 1e30)
            value = values[layer][:, :, start:end].masked_fill(padding, 1e30)
            cache.append(layer, key, value, positions)
        cache.advance(taken, most=end - start)
    return cache


def lengths_of(cache: KVCache) -> list[int]:
    return [int(n) for n in cache.lengths]


def test_the_repr_of_a_cache_says_what_it_holds() -> None:
    """The default repr is an address, which says nothing in a notebook."""
    said = "lengths=[3, 1], 1,536 bytes, 2 layers, torch.float64, cpu"
    assert repr(random_cache([3, 1])) == f"KVCache({said})"


@given(row_lengths, st.integers(1, 4), seeds)
def test_appending_in_chunks_gives_the_same_cache(
    lengths: list[int], chunks: int, seed: int
) -> None:
    """Each ragged row has its own first free slot.

    transformers pads all rows to the longest, and then attends to the padding.
    """
    assert distance(random_cache(lengths, seed, chunks), random_cache(lengths, seed)) == 0
    assert (
        random_cache(lengths, seed, chunks).nbytes == sum(lengths) * 2 * 2 * 2 * 6 * 8
    )  # k, v; layers; heads; d; float64


def test_growing_a_cache_keeps_its_slots() -> None:
    """A cache grows by half of its size.

    A step that triggers this must not lose or shift a slot.
    """
    assert distance(random_cache([300, 1, 170], chunks=300), random_cache([300, 1, 170])) == 0


@given(row_lengths, st.data(), seeds)
def test_select_returns_the_given_rows(lengths: list[int], data: st.DataObject, seed: int) -> None:
    """Rows may be repeated, reordered or alone. Each question must keep its own cache.

    Control arms shuffle the caches on purpose.
    """
    cache = random_cache(lengths, seed)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
    chosen, whole = cache.select(rows), list(filled(cache))
    assert lengths_of(chosen) == [lengths[row] for row in rows]
    assert distance(chosen, cache.select(torch.tensor(rows))) == 0
    for (_, keys, values), row in zip(filled(chosen), rows, strict=True):
        assert torch.equal(keys, whole[row][1])
        assert torch.equal(values, whole[row][2])


@given(row_lengths, st.data(), seeds)
def test_truncate_and_keep_last_undo_concat(
    lengths: list[int], data: st.DataObject, seed: int
) -> None:
    """truncate returns the first cache, and keep_last the last one.

    The keys of the last one are rotated back to slot 0.
    """
    others = data.draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    first, second = random_cache(lengths, seed), random_cache(others, seed + 1)
    joined = KVCache.concat([first, second])
    assert distance(joined.truncate(first.lengths), first) == 0
    assert distance(joined.keep_last(second.lengths), second) <= 1e-12


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=3), seeds)
def test_concat_is_associative_and_an_empty_cache_changes_nothing(
    rows: list[tuple[int, int, int]], seed: int
) -> None:
    """(a + b) + c = a + (b + c), for teams of any size and caches of any length."""
    a, b, c = (random_cache([row[i] for row in rows], seed + i) for i in range(3))
    joined = KVCache.concat([a, b, c])
    assert distance(KVCache.concat([KVCache.concat([a, b]), c]), joined) <= 1e-12
    assert distance(KVCache.concat([a, KVCache.concat([b, c])]), joined) <= 1e-12
    assert distance(KVCache.concat([random_cache([0] * len(rows)), a]), KVCache.concat([a])) == 0
    assert distance(KVCache.concat([a]), a) == 0


@given(row_lengths, st.integers(0, 6), st.integers(0, 6), seeds)
def test_truncating_twice_equals_truncating_once_to_the_smaller_length(
    lengths: list[int], one: int, two: int, seed: int
) -> None:
    """Rows shorter than the cut stay as they are. The same holds for keep_last."""
    cache, least = random_cache(lengths, seed), min(one, two)
    assert distance(cache.truncate(one).truncate(two), cache.truncate(least)) == 0
    assert distance(cache.keep_last(one).keep_last(two), cache.keep_last(least)) <= 1e-12
    assert lengths_of(cache.keep_last(one)) == [min(one, n) for n in lengths]


@given(row_lengths, st.integers(0, 6), st.integers(0, 6), seeds)
def test_drop_equals_joining_what_is_left(
    lengths: list[int], start: int, more: int, seed: int
) -> None:
    """The span may be inside a row, at an end, empty or after the row's end.

    Later keys must close the gap.
    """
    cache, stop = random_cache(lengths, seed), start + more
    rest = [max(n - stop, 0) for n in lengths]
    joined = KVCache.concat([cache.truncate(start), cache.keep_last(rest)])
    assert distance(cache.drop(start, stop), joined) <= 1e-12
    each = [start] * len(lengths), torch.tensor([stop] * len(lengths))
    assert distance(cache.drop(*each), cache.drop(start, stop)) == 0
    assert distance(cache.drop(0, stop), cache.keep_last(rest)) == 0
    assert distance(cache.drop(stop, start), cache if more else cache.drop(start, start)) == 0


def test_each_row_drops_its_own_span() -> None:
    """The spans of a ragged batch differ per row, for example if they are one agent's share."""
    lengths, starts, stops = [5, 2, 4], [1, 0, 4], [3, 2, 9]
    cache = random_cache(lengths)
    dropped = cache.drop(starts, stops)
    assert lengths_of(dropped) == [3, 0, 4]
    for row in range(3):
        alone = cache.select([row]).drop(starts[row], stops[row])
        assert distance(dropped.select([row]), alone) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.fork(),
        lambda cache: cache.select([0, 1]),
        lambda cache: cache.truncate(9),
        lambda cache: cache.keep_last(9),
        lambda cache: cache.drop(9, 9),
        lambda cache: KVCache.concat([cache]),
    ],
    ids=["fork", "select", "truncate", "keep_last", "drop", "concat"],
)
def test_a_derived_cache_does_not_share_storage(
    change: Callable[[KVCache], KVCache], model: Qwen3
) -> None:
    """Two continuations that share storage overwrite each other's thoughts (a view in place of a
    copy).
    """
    _, cache = remember(model, random_ids(model, 2, 4), [4, 2])
    before, other = cache.truncate(9), change(cache)
    for store in (*other.keys, *other.values):
        store.fill_(7)
    assert distance(cache, before) == 0
    model(model.embed(random_ids(model, 2, 3)), other)
    assert distance(cache, before) == 0
    assert lengths_of(other) == [7, 5]


def test_a_failed_forward_leaves_the_cache_unchanged(
    model: Qwen3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an out-of-memory error in layer 2, the same cache is used again with fewer steps."""
    ids = random_ids(model, 2, 4)
    _, cache = remember(model, ids, [4, 2])
    before, expected = cache.fork(), model(model.embed(ids), cache.fork())
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(
            model.model.layers[1].mlp, "forward", lambda _: (_ for _ in ()).throw(MemoryError())
        )
        model(model.embed(ids + 0), cache)
    assert distance(cache, before) == 0
    assert torch.equal(model(model.embed(ids), cache), expected)


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        (lambda: KVCache(CONFIG, 0), ValueError, "batch_size: found 0"),
        (lambda: random_cache([2]).select([]), IndexError, "rows: found"),
        (lambda: random_cache([2]).select([1]), IndexError, "rows: found"),
        (lambda: random_cache([2]).select([-1]), IndexError, "rows: found"),
        (lambda: random_cache([2, 2]).select([True, False]), IndexError, "rows: found"),
        (
            lambda: random_cache([2]).select([0.0]),  # type: ignore[list-item]
            IndexError,
            "rows: found",
        ),
        (
            lambda: random_cache([2]).truncate(-1),
            ValueError,
            r"lengths: found \[-1\], expected 1 numbers",
        ),
        (
            lambda: random_cache([2]).keep_last(-1),
            ValueError,
            r"lengths: found \[-1\], expected 1 numbers",
        ),
        (lambda: random_cache([2]).drop(-1, 2), ValueError, r"lengths: found \[-1\], expected 1"),
        (
            lambda: random_cache([2]).drop([0, 0], 1),
            ValueError,
            r"lengths: found \[0, 0\], expected 1",
        ),
        (lambda: KVCache.concat([]), ValueError, "caches: found "),
        (lambda: KVCache.concat([random_cache([2]), random_cache([2, 2])]), ValueError, "2 rows"),
        (lambda: KVCache.concat([random_cache([2]), KVCache(CONFIG, 1)]), ValueError, "float32"),
        (
            lambda: KVCache.concat(
                [random_cache([2]), KVCache(tiny_config("llama"), 1, torch.float64)]
            ),
            ValueError,
            "model",
        ),
        (lambda: random_cache([2, 2]).next_positions(3, 1), ValueError, "found 3 rows, expected 2"),
    ],
)
def test_invalid_arguments_are_refused(
    wrong: Callable[[], Any], kind: type[Exception], said: str
) -> None:
    """Each error says what was found and what was expected."""
    with pytest.raises(kind, match=said):
        wrong()


def test_caches_of_different_weights_are_not_joined() -> None:
    """Keys mean nothing to other weights, even if the shapes are equal.

    This holds in memory as in a file.
    """
    one, two = (
        remember(m, random_ids(m, 1, 3))[1] for m in (tiny_model(seed=0), tiny_model(seed=1))
    )
    with pytest.raises(ValueError, match="model"):
        KVCache.concat([one, two])


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[5], [5, 2], [1, 4, 3]])
def test_a_loaded_cache_continues_like_the_saved_one(
    lengths: list[int], model: Qwen3, tmp_path: Path
) -> None:
    """mlx-lm's test of this is `assertTrue(len(a), len(b))`, which cannot fail.

    Here the loaded cache is *used*.
    """
    hidden, cache = remember(model, random_ids(model, len(lengths), 5), lengths)
    last, path = take_last(hidden, cache.lengths), tmp_path / "memory.safetensors"
    cache.save(path)
    loaded = KVCache.load(path, model)
    assert distance(loaded, cache) == 0
    for _ in range(3):
        expected, found = model(last, cache), model(last, loaded)
        assert torch.equal(model.logits(found), model.logits(expected))
        last = expected
    loaded.save(path)
    assert distance(KVCache.load(path, model), cache) == 0
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_padding_is_not_written_to_a_memory_file(model: Qwen3, tmp_path: Path) -> None:
    """Otherwise preallocated slots would make every file 1.5 times as long."""
    _, cache = remember(model, random_ids(model, 1, 5))
    cache.save(tmp_path / "m")
    with safe_open(tmp_path / "m", framework="pt") as file:
        assert (
            sum(file.get_tensor(name).nbytes for name in file.keys() if name != "lengths")
            == cache.nbytes
        )


def test_a_saved_cache_loads_in_another_dtype_of_its_model(tmp_path: Path) -> None:
    """A cache saved in float32 is used in bf16: the weights have the same fingerprint."""
    wide, narrow = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.bfloat16)
    _, cache = remember(wide, random_ids(wide, 1, 5))
    cache.save(tmp_path / "m")
    loaded = KVCache.load(tmp_path / "m", narrow)
    assert loaded.dtype == loaded.keys[0].dtype == torch.bfloat16
    ids = random_ids(wide, 1, 2, seed=1)
    assert apart(narrow(narrow.embed(ids), loaded).float(), wide(wide.embed(ids), cache)) < 0.05


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"family": "llama"}, {"rope_theta": 1e6}, {"rms_norm_eps": 1e-5}]
)
def test_the_cache_of_another_model_is_refused(
    other: dict[str, Any], model: Qwen3, tmp_path: Path
) -> None:
    """With the same shapes and other weights, the output would be nonsense without any error."""
    remember(model, random_ids(model, 1, 3))[1].save(tmp_path / "m")
    stranger = tiny_model(**other)
    stranger.name = "stranger"
    with pytest.raises(ValueError, match=r"/m: model: .*'qwen3-0'.*expected .*'stranger'"):
        KVCache.load(tmp_path / "m", stranger)


def rewritten(
    change: Callable[[dict[str, Tensor], dict[str, str]], None],
) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = (
                {name: file.get_tensor(name) for name in file.keys()},
                file.metadata(),
            )
        change(tensors, metadata)
        save_file(tensors, path, metadata=metadata)

    return damage


@pytest.mark.parametrize(
    ("damage", "kind", "said"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "no such file"),
        (lambda path: path.write_bytes(b""), ValueError, "a damaged file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), ValueError, "a damaged file"),
        (lambda path: path.write_bytes(b"\x80\x04}." * 99), ValueError, "a damaged file"),
        (lambda path: torch.save({}, path), ValueError, "a damaged file"),
        (lambda path: (path.unlink(), path.mkdir()), ValueError, "a damaged file"),
        (lambda path: save_file({"x": torch.zeros(2)}, path), ValueError, "format: found None"),
        (
            rewritten(lambda t, m: m.update(format="minimas-memory-9")),
            ValueError,
            "format: found 'minimas-memory-9'",
        ),
        (rewritten(lambda t, m: m.pop("fingerprint")), ValueError, "model"),
        (rewritten(lambda t, m: t.pop("lengths")), ValueError, "lengths: found"),
        (
            rewritten(lambda t, m: t.update(lengths=torch.tensor([-1, 3]))),
            ValueError,
            "lengths: found",
        ),
        (rewritten(lambda t, m: t.update(lengths=torch.tensor(3))), ValueError, "lengths: found"),
        (
            rewritten(lambda t, m: t.update(lengths=torch.tensor([3.0]))),
            ValueError,
            "lengths: found",
        ),
        (
            rewritten(lambda t, m: t.update(lengths=torch.tensor([2**40]))),
            ValueError,
            "keys.0: found",
        ),
        (rewritten(lambda t, m: t.pop("values.1")), ValueError, "values.1: found"),
        (
            rewritten(lambda t, m: t.update({"keys.1": torch.zeros(1, 2, 3, 7)})),
            ValueError,
            "keys.1: found",
        ),
        (
            rewritten(lambda t, m: t.update({"keys.1": t["keys.1"].long()})),
            ValueError,
            "keys.1: found",
        ),
    ],
)
def test_a_damaged_or_foreign_memory_file_is_refused(
    damage: Callable[[Path], None], kind: type[Exception], said: str, model: Qwen3, tmp_path: Path
) -> None:
    """The error is one line with the file's name, and nothing is ever unpickled."""
    path = tmp_path / "memory"
    remember(model, random_ids(model, 1, 3))[1].save(path)
    damage(path)
    with pytest.raises(kind, match=f"{path}: .*{said}"):
        KVCache.load(path, model)


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_a_failed_save_keeps_the_older_file(
    failure: BaseException, model: Qwen3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the file were written in place, a full disk would destroy the old and the new cache."""
    path = tmp_path / "memory"
    _, cache = remember(model, random_ids(model, 1, 3))
    cache.save(path)
    before = path.read_bytes()

    def write_half(tensors: Any, partial: Path, metadata: Any) -> None:
        partial.write_bytes(b"half")
        raise failure

    monkeypatch.setattr("minimas.core.files.save_file", write_half)
    with pytest.raises(
        type(failure), match=f"{path}: cannot write" if isinstance(failure, OSError) else None
    ):
        cache.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFOs, and links need rights")
def test_a_save_keeps_links_and_devices(model: Qwen3, tmp_path: Path) -> None:
    """A save to /dev/null replaced the device by a file, for all programs, if root ran it."""
    _, cache = remember(model, random_ids(model, 1, 3))
    target = tmp_path / "disk" / "memory"
    target.parent.mkdir()
    link = tmp_path / "link"
    link.symlink_to(target)
    for _ in range(2):  # a new file, then an older one
        cache.save(link)
        assert link.is_symlink() and KVCache.load(target, model).lengths == [3]
    device = tmp_path / "device"
    os.mkfifo(device)
    with pytest.raises(OSError, match=f"{device}: cannot write the memory .*expected a file"):
        cache.save(device)
    assert device.is_fifo()
    assert {file.name for file in tmp_path.rglob("*")} == {"disk", "memory", "link", "device"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_other_users_can_read_a_memory_file_if_the_umask_allows_it(
    model: Qwen3, tmp_path: Path
) -> None:
    """safetensors makes files that only their owner can read, whatever the umask is."""
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            remember(model, random_ids(model, 1, 3))[1].save(tmp_path / f"{umask}")
        finally:
            os.umask(before)
        assert (tmp_path / f"{umask}").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_memory_file_keeps_its_permissions_when_it_is_replaced(
    model: Qwen3, tmp_path: Path
) -> None:
    """A conversation that only its owner could open became readable for all users."""
    _, cache = remember(model, random_ids(model, 1, 3))
    for mode in (0o600, 0o640, 0o604):
        cache.save(tmp_path / "m")
        (tmp_path / "m").chmod(mode)
        cache.save(tmp_path / "m")
        assert (tmp_path / "m").stat().st_mode & 0o777 == mode


def test_a_cache_that_cannot_be_saved_says_why(model: Qwen3, tmp_path: Path) -> None:
    """A cache without a model has no fingerprint. A missing folder is named."""
    with pytest.raises(ValueError, match="found memory without a model, expected"):
        random_cache([2]).save(tmp_path / "m")
    with pytest.raises(OSError, match="nowhere/m: cannot write the memory"):
        remember(model, random_ids(model, 1, 3))[1].save(tmp_path / "nowhere" / "m")


def test_an_lm_passed_as_the_model_is_named(model: Qwen3, tmp_path: Path) -> None:
    """An LM has a `.model` attribute as its model does, so the two are easily confused."""
    path = tmp_path / "m"
    remember(model, random_ids(model, 1, 3))[1].save(path)
    with pytest.raises(ValueError, match=r"^model: found SimpleNamespace, .*lm\.model"):
        KVCache.load(path, SimpleNamespace(model=model))


def test_a_file_with_nan_is_refused(tmp_path: Path) -> None:
    """On a GPU, states are not checked before they are saved, so NaN must be found on loading."""
    model, path = tiny_model(), tmp_path / "m"
    model.model.norm.weight.data[0] = torch.nan
    model.model.layers[1].self_attn.v_proj.weight.data[0] = torch.nan
    remember(model, random_ids(model, 1, 3))[1].save(path)
    with pytest.raises(ValueError, match=r"/m: values\.1: found NaN or infinity"):
        KVCache.load(path, model)


def test_two_caches_of_one_model_do_not_affect_each_other(model: Qwen3) -> None:
    """With the position stored in the model, one cache corrupts the other (as in gpt-fast)."""
    ids, other = random_ids(model, 2, 6).split(1)
    expected = remember(model, ids)[1]
    one, two = model.new_cache(1), model.new_cache(1)
    for at in range(0, 6, 2):
        model(model.embed(ids[:, at : at + 2]), one)
        model(model.embed(other[:, : at + 1]), two)
    assert distance(one, expected) <= 1e-12


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_a_cache_in_8_bits_is_off_by_at_most_half_a_step(
    data: st.DataObject, model: Qwen3, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each vector has its own 255 steps. With a shared scale, small vectors would be lost."""
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    cache = random_cache(lengths)
    size = data.draw(st.floats(1e-6, 1e6))
    cache.keys = [keys * size for keys in cache.keys]
    cache.set_owner(model)
    path = tmp_path_factory.mktemp("bits") / "m"
    cache.save(path, bits=8)
    loaded = KVCache.load(path, model)
    assert loaded.lengths == cache.lengths and loaded.dtype == cache.dtype
    length = max(lengths)
    pairs = zip(cache.keys + cache.values, loaded.keys + loaded.values, strict=True)
    for original, found in pairs:
        original = original[:, :, :length]
        step = original.abs().amax(-1, keepdim=True) / 127
        assert ((found - original).abs() <= step * 0.501).all()
        assert not torch.equal(found, original)  # it was rounded


def test_a_cache_in_8_bits_takes_a_quarter_of_the_float32_file(
    model: Qwen3, tmp_path: Path
) -> None:
    small = copy.deepcopy(model).float()
    cache = small.new_cache(1)
    small(torch.randn(1, 200, small.config.hidden_size), cache)
    sizes = []
    for bits in (None, 8):
        cache.save(tmp_path / "m", bits)
        sizes.append((tmp_path / "m").stat().st_size)
    assert 0.25 < sizes[1] / sizes[0] < 0.25 + 1.5 / small.config.head_dim


@pytest.mark.parametrize("bits", [4, 16, 0, True, "8"])
def test_other_numbers_of_bits_are_refused(bits: Any, model: Qwen3, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^bits: found .*expected 8 or None"):
        remember(model, random_ids(model, 1, 3))[1].save(tmp_path / "m", bits)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("scale.keys.1", None),
        ("scale.keys.1", torch.ones(1)),
        ("scale.values.0", torch.full((1, 2, 3, 1), torch.nan)),
        ("keys.0", torch.zeros(1, 2, 3, 7, dtype=torch.int8)),
    ],
)
def test_a_damaged_file_in_8_bits_is_refused(
    name: str, wrong: Tensor | None, model: Qwen3, tmp_path: Path
) -> None:
    """int8 values mean nothing without scales, and a scale of another shape would broadcast."""
    path = tmp_path / "m"
    remember(model, random_ids(model, 1, 3))[1].save(path, bits=8)
    rewritten(lambda t, m: t.pop(name) if wrong is None else t.update({name: wrong}))(path)
    with pytest.raises(ValueError, match=rf"{path}: {name}: found"):
        KVCache.load(path, model)
