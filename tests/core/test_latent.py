"""W_a is the ridge solution, other maps match their equations, and `think` feeds thoughts back."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from minimas import Aligner, KVCache, Qwen3, alignment_matrix, think
from minimas.core.latent import ALIGNMENTS, LAMBDA
from minimas.core.model import prefill, take_last

from ..models import (
    apart,
    distance,
    models,
    random_ids,
    reference,
    remember,
    tiny_config,
    tiny_model,
)
from .test_cache import rewritten

seeds = st.integers(0, 99)
ragged = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def weights(model: Qwen3) -> tuple[Tensor, Tensor]:
    state = model.state_dict()
    return state.get("lm_head.weight", state["model.embed_tokens.weight"]), state[
        "model.embed_tokens.weight"
    ]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


# -- the map ---------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 9), st.floats(1e-5, 10), seeds)
def test_the_map_is_the_ridge_solution(rows: int, size: int, ridge: float, seed: int) -> None:
    """The reference is least squares on the rows stacked with sqrt(λ) I.

    It has the same minimum and needs no normal equations.
    """
    w_out, w_in = gaussian(2, rows, size, seed=seed)
    left = torch.cat([w_out, ridge**0.5 * torch.eye(size, dtype=torch.float64)])
    expected = torch.linalg.lstsq(
        left, torch.cat([w_in, torch.zeros(size, size, dtype=torch.float64)])
    ).solution
    found = alignment_matrix(w_out, w_in, ridge)
    assert apart(found, expected) <= 1e-6  # with fewer rows than columns, only λ conditions it
    residual = w_out.T @ (w_out @ found - w_in) + ridge * found
    assert float(residual.abs().max()) <= 1e-9 * float((w_out.T @ w_in).abs().max() + 1)


@given(models(), seeds)
def test_tied_embeddings_make_the_map_an_identity(model: Qwen3, seed: int) -> None:
    """With tied embeddings W_a differs from the identity by exactly λ / (σ² + λ).

    On Qwen3-0.6B to 4B, only the rescaling has an effect (LatentMAS #31).
    """
    w_in = gaussian(30, 8, seed=seed)
    smallest = float(torch.linalg.svdvals(w_in).min())
    difference = torch.linalg.matrix_norm(
        alignment_matrix(w_in, w_in) - torch.eye(8, dtype=torch.float64), 2
    )
    assert float(difference) <= LAMBDA / smallest**2 * 1.01
    assert (
        float(
            torch.linalg.matrix_norm(
                alignment_matrix(w_in, -w_in) - torch.eye(8, dtype=torch.float64), 2
            )
        )
        > 1.9
    )


@given(st.integers(1, 60), st.integers(1, 70), seeds)
def test_the_chunk_size_of_the_sum_over_the_vocabulary_does_not_matter(
    rows: int, chunk: int, seed: int
) -> None:
    """A bug that skips the last, shorter chunk only loses the rarest tokens, so it is easily
    overlooked.
    """
    w_out, w_in = gaussian(2, rows, 4, seed=seed)
    assert (
        apart(alignment_matrix(w_out, w_in, 0.1, chunk), alignment_matrix(w_out, w_in, 0.1))
        <= 1e-10
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_16_bit_weights_are_summed_in_higher_precision(dtype: torch.dtype) -> None:
    """In bf16, a sum of 5,000 squares stops growing at 256."""
    w_out, w_in = gaussian(2, 5000, 6, dtype=dtype)
    assert (
        apart(alignment_matrix(w_out, w_in), alignment_matrix(w_out.double(), w_in.double()))
        <= 1e-4
    )


@given(models(), st.integers(1, 41))
def test_embedding_rows_beyond_the_tokenizer_are_ignored(model: Qwen3, rows: int) -> None:
    """Qwen3 pads 151,669 rows to 151,936.

    The authors cut the padding in only one of their backends.
    """
    full = {kind: Aligner.from_model(model, kind, rows) for kind in ALIGNMENTS}
    for weight in weights(model):
        weight[rows:] = 1e3
    h = gaussian(2, 16)
    for kind, align in full.items():
        assert torch.equal(Aligner.from_model(model, kind, rows)(h), align(h))
    if rows < 41:
        assert apart(Aligner.from_model(model, "identity")(h), full["identity"](h)) > 1


# -- other kinds -----------------------------------------------------------------------------------


@given(models(), seeds)
def test_each_kind_of_map_matches_its_equation(model: Qwen3, seed: int) -> None:
    """Each kind applies its map and rescales to the mean norm of the embeddings.

    "none" returns the state itself. "prenorm" starts before the gain of the final norm.
    """
    w_out, w_in = weights(model)
    w_a, norm = alignment_matrix(w_out, w_in), w_in.norm(dim=-1).mean()
    h = gaussian(2, 3, 16, seed=seed)
    raw = {"ridge": h @ w_a, "identity": h, "prenorm": (h / model.model.norm.weight) @ w_a}
    for kind, mapped in raw.items():
        expected = mapped / mapped.norm(dim=-1, keepdim=True) * norm
        assert apart(Aligner.from_model(model, kind)(h), expected) <= 1e-10
    assert torch.equal(Aligner.from_model(model, "none")(h), h)


@given(models())
def test_the_random_map_has_the_singular_values_of_the_ridge(model: Qwen3) -> None:
    """A control with another gain would say nothing about the directions.

    It must be the same at every call, or runs would differ.
    """
    ridge, control, again = (
        Aligner.from_model(model, kind) for kind in ("ridge", "random", "random")
    )
    assert ridge.matrix is not None
    assert control.matrix is not None
    assert again.matrix is not None
    values = torch.linalg.svdvals(ridge.matrix)
    torch.testing.assert_close(torch.linalg.svdvals(control.matrix), values, rtol=1e-9, atol=1e-12)
    assert apart(control.matrix, ridge.matrix) > 0.1
    assert torch.equal(control.matrix, again.matrix)
    assert control.norm == ridge.norm


@pytest.mark.parametrize("hidden_size", [8, 24])
def test_a_random_map_to_another_model_has_that_models_width(hidden_size: int) -> None:
    """A map with the sender's width could not be fed to the receiver."""
    sender = tiny_model()
    receiver = tiny_model(hidden_size=hidden_size)
    ridge = Aligner.from_model(sender, "ridge", receiver=receiver).matrix
    control = Aligner.from_model(sender, "random", receiver=receiver).matrix
    assert ridge is not None
    assert control is not None
    assert control.shape == ridge.shape == (16, hidden_size)
    values = torch.linalg.svdvals(ridge)
    torch.testing.assert_close(torch.linalg.svdvals(control), values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ALIGNMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 0, 16), (2, 3, 1, 16)])
def test_a_map_keeps_the_shape_and_the_dtype(
    kind: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """The map is computed in float32 or wider.

    A float32 result would promote every layer of a bf16 model.
    """
    embedding = Aligner.from_model(tiny_model(dtype=dtype), kind)(gaussian(*shape, dtype=dtype))
    assert embedding.shape == shape
    assert embedding.dtype == dtype


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_a_state_of_zeros_stays_zero(kind: str, model: Qwen3) -> None:
    """0 / 0 is NaN, and one NaN in a KV cache spreads to all later states."""
    assert torch.equal(
        Aligner.from_model(model, kind)(torch.zeros(1, 1, 16).double()),
        torch.zeros(1, 1, 16).double(),
    )


def test_prenorm_does_not_divide_by_a_gain_of_zero() -> None:
    """Such a channel is always 0 after the norm, so there is nothing to restore."""
    model = tiny_model()
    model.model.norm.weight.data[3] = 0
    hidden = model(model.embed(random_ids(model, 1, 3)))
    assert bool(torch.isfinite(Aligner.from_model(model, "prenorm")(hidden)).all())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            lambda m: Aligner.from_model(m, "ridgy"),
            "align.*found 'ridgy', expected one of ridge, identity",
        ),
        (lambda m: Aligner.from_model(m, rows=0), "rows: found 0, expected 1 … 41"),
        (lambda m: Aligner.from_model(m, rows=42), "rows: found 42"),
        (lambda m: alignment_matrix(torch.ones(3, 2), torch.ones(4, 2)), r"expected \(V, D\) and"),
        (lambda m: alignment_matrix(torch.ones(3), torch.ones(3)), r"expected \(V, D\) and"),
        (
            lambda m: alignment_matrix(torch.full((3, 2), torch.nan), torch.ones(3, 2)),
            "w_out.*: found NaN",
        ),
        (
            lambda m: alignment_matrix(torch.full((3, 2), torch.inf), torch.ones(3, 2)),
            "w_out.*: found NaN",
        ),
        (
            lambda m: alignment_matrix(torch.ones(3, 2), torch.full((3, 2), torch.nan)),
            "w_in.*: found NaN",
        ),
        (
            lambda m: think(m, Aligner(), torch.zeros(1, 1, 16).double(), m.new_cache(1), -1),
            "latent_steps.*found -1",
        ),
    ],
)
def test_invalid_arguments_are_refused(
    wrong: Callable[[Qwen3], Any], said: str, model: Qwen3
) -> None:
    """The error names the flag if there is one.

    Damaged input embeddings are refused like a damaged head.
    """
    with pytest.raises(ValueError, match=said):
        wrong(model)


# -- as a file -------------------------------------------------------------------------------------

PARTS = ("matrix", "norm", "scale", "shift")


def whole_map(model: Qwen3) -> Aligner:
    """Return a map with all parts, in the dtype of this model's maps."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    scale, shift = gaussian(2, 16, seed=1, dtype=dtype).unbind()
    return Aligner(gaussian(16, 16, dtype=dtype), 0.1, scale, shift, model)


@pytest.mark.parametrize("kind", [*ALIGNMENTS, "all parts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_loaded_map_equals_the_saved_one(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """All parts and no others are restored.

    If the scale were lost, prenorm would become the paper's map.
    """
    model = tiny_model(dtype=dtype)
    made = whole_map(model) if kind == "all parts" else Aligner.from_model(model, kind)
    made.save(tmp_path / "m.safetensors")
    loaded = Aligner.load(tmp_path / "m.safetensors", model)
    for name in PARTS:
        found, expected = getattr(loaded, name), getattr(made, name)
        if isinstance(expected, Tensor):
            assert (found.dtype, torch.equal(found, expected)) == (expected.dtype, True), name
        else:
            assert found == expected, name
    assert loaded.made_for == made.made_for
    hidden = gaussian(2, 3, 16, dtype=dtype)
    # A product may round differently if the matrix is stored by rows.
    torch.testing.assert_close(loaded(hidden), made(hidden))


def test_the_parts_of_a_map_give_its_equation(model: Qwen3) -> None:
    """The equation is rescale((h · scale) W) + shift, row by row."""
    align, h = whole_map(model), gaussian(2, 3, 16, seed=5)
    assert align.matrix is not None
    assert align.scale is not None
    mapped = torch.stack([(row * align.scale) @ align.matrix for row in h.flatten(0, 1)])
    expected = mapped / mapped.norm(dim=-1, keepdim=True) * 0.1 + align.shift
    assert apart(align(h).flatten(0, 1), expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_aligner_of_the_exact_matrix_maps_states_of_any_dtype(dtype: torch.dtype) -> None:
    """`alignment_matrix` is float64, so an Aligner of it failed on every other model."""
    model = tiny_model(dtype=dtype)
    matrix = alignment_matrix(model.lm_head.weight, model.model.embed_tokens.weight)
    hidden = torch.randn(2, 1, model.config.hidden_size, dtype=dtype)
    mapped = Aligner(matrix, 3.0)(hidden)
    ours = Aligner.from_model(model)
    ours.norm = 3.0
    assert mapped.dtype == dtype and apart(mapped, ours(hidden)) <= 1e-5
    assert apart(mapped, Aligner(matrix.T, 3.0)(hidden)) > 1e-3


def test_a_saved_map_loads_in_another_dtype_of_its_model(tmp_path: Path) -> None:
    """Mixed dtypes cannot be multiplied, so a map saved in bf16 must be converted to float64 and
    back.
    """
    narrow, wide = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.float64)
    for maker, reader, dtype in ((narrow, wide, torch.float64), (wide, narrow, torch.float32)):
        made = Aligner.from_model(maker, "prenorm")
        made.save(tmp_path / "m.safetensors")
        loaded = Aligner.load(tmp_path / "m.safetensors", reader)
        assert loaded.matrix is not None
        assert loaded.matrix.dtype == dtype
        hidden = gaussian(1, 1, 16, dtype=reader.dtype)
        expected = Aligner.from_model(reader, "prenorm")(hidden)
        torch.testing.assert_close(loaded(hidden), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("other", [{"seed": 1}, {"family": "llama"}, {"rms_norm_eps": 1e-5}])
def test_the_map_of_another_model_is_refused(
    other: dict[str, Any], model: Qwen3, tmp_path: Path
) -> None:
    """With the same shapes and other weights, thoughts would get worse without any error."""
    Aligner.from_model(model).save(tmp_path / "m.safetensors")
    stranger = tiny_model(**other)
    stranger.name = "stranger"
    said = r"/m.safetensors: model: found .*'qwen3-0'.*expected .*'stranger'"
    with pytest.raises(ValueError, match=said):
        Aligner.load(tmp_path / "m.safetensors", stranger)


def put(**tensors: Tensor) -> Callable[[Path], None]:
    return rewritten(lambda there, metadata: there.update(tensors))


@pytest.mark.parametrize(
    ("damage", "kind", "said"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "no such file"),
        (lambda path: path.write_bytes(b""), ValueError, "a damaged file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), ValueError, "a damaged file"),
        (lambda path: torch.save({}, path), ValueError, "a damaged file"),
        (lambda path: save_file({"matrix": torch.eye(16)}, path), ValueError, "format: found None"),
        (
            lambda path: remember(tiny_model(), random_ids(tiny_model(), 1, 3))[1].save(path),
            ValueError,
            "format: found 'minimas-memory-1', expected minimas-aligner-1",
        ),
        (rewritten(lambda t, m: m.pop("fingerprint")), ValueError, "model: found"),
        (put(matrix=torch.eye(15)), ValueError, r"matrix: found .*\(15, 15\), expected"),
        (put(matrix=torch.ones(16)), ValueError, r"matrix: found .*\(16,\), expected"),
        (put(scale=torch.ones(1)), ValueError, r"scale: found .*\(1,\), expected"),
        (put(shift=torch.ones(16, 1)), ValueError, r"shift: found .*\(16, 1\), expected"),
        (put(norm=torch.ones(1)), ValueError, r"norm: found .*\(1,\), expected"),
        (put(scale=torch.ones(16).long()), ValueError, "scale: found torch.int64"),
        (put(matrx=torch.eye(16)), ValueError, "matrx: found .*expected .*'matrix'"),
        (put(matrix=torch.eye(16).log()), ValueError, "matrix: found NaN or infinity"),
        (put(scale=torch.full((16,), torch.inf)), ValueError, "scale: found NaN or infinity"),
        (put(norm=torch.tensor(torch.nan)), ValueError, "norm: found NaN or infinity"),
    ],
)
def test_a_damaged_or_foreign_map_file_is_refused(
    damage: Callable[[Path], Any], kind: type[Exception], said: str, model: Qwen3, tmp_path: Path
) -> None:
    """The error is one line with the file's name, what was found and what was expected."""
    path = tmp_path / "map.safetensors"
    Aligner.from_model(model, "prenorm").save(path)
    damage(path)
    with pytest.raises(kind, match=f"^{path}: .*{said}") as caught:
        Aligner.load(path, model)
    assert "\n" not in str(caught.value)


def test_a_value_too_large_for_the_dtype_of_the_model_is_refused(tmp_path: Path) -> None:
    """1e300 is finite in float64 and infinite in float32, where the first thought would be NaN."""
    model = tiny_model(dtype=torch.float32)
    Aligner(scale=torch.full((16,), 1e300, dtype=torch.float64), model=model).save(tmp_path / "m")
    with pytest.raises(ValueError, match="scale: found NaN or infinity"):
        Aligner.load(tmp_path / "m", model)


def test_a_map_that_cannot_be_saved_says_why(model: Qwen3, tmp_path: Path) -> None:
    """A map without a model has no fingerprint. A missing folder is named."""
    with pytest.raises(ValueError, match="/m: found aligner without a model, expected"):
        Aligner(norm=1.0).save(tmp_path / "m")
    with pytest.raises(OSError, match="nowhere/m: cannot write the aligner"):
        Aligner.from_model(model).save(tmp_path / "nowhere" / "m")
    assert list(tmp_path.iterdir()) == []


# -- the loop --------------------------------------------------------------------------------------


@given(models(), ragged, st.integers(0, 4), st.sampled_from(ALIGNMENTS), seeds)
def test_thinking_is_feeding_each_thought_by_hand(
    model: Qwen3, lengths: list[int], steps: int, kind: str, seed: int
) -> None:
    """The reference has one row and no KV cache: for each thought it computes the whole sequence
    again.
    """
    align, ids = (
        Aligner.from_model(model, kind),
        random_ids(model, len(lengths), max(lengths), seed),
    )
    hidden, cache = remember(model, ids, lengths)
    thoughts, last = think(model, align, take_last(hidden, cache.lengths), cache, steps)
    assert thoughts.shape == (len(lengths), steps, 16)
    assert cache.lengths == [length + steps for length in lengths]
    for row, length in enumerate(lengths):
        x = model.embed(ids[row, :length])
        for step in range(steps):
            x = torch.cat([x, align(reference(model, x)[-1:])])
            assert apart(thoughts[row, step], x[-1]) <= 1e-9
        assert apart(last[row], reference(model, x)[-1:]) <= 1e-9


@given(models(), ragged, st.integers(0, 3), st.integers(0, 3), seeds)
def test_a_rollouts_first_thoughts_are_a_shorter_rollout(
    model: Qwen3, lengths: list[int], first: int, more: int, seed: int
) -> None:
    """A rollout of n + m steps equals n steps and then m more, bit for bit.

    No step depends on the planned number of steps.
    """
    align = Aligner.from_model(model)
    hidden, cache = remember(model, random_ids(model, len(lengths), max(lengths), seed), lengths)
    last, other = take_last(hidden, cache.lengths), cache.fork()
    thoughts, end = think(model, align, last, cache, first + more)
    prefix, middle = think(model, align, last, other, first)
    rest, same_end = think(model, align, middle, other, more)
    assert torch.equal(torch.cat([prefix, rest], 1), thoughts)
    assert torch.equal(same_end, end)
    assert distance(other, cache) == 0


def test_zero_steps_keep_the_cache_and_the_state(model: Qwen3) -> None:
    """The authors' default of 0 steps discards the working memory (#13)."""
    hidden, cache = remember(model, random_ids(model, 2, 4), [4, 2])
    before, last = cache.fork(), take_last(hidden, cache.lengths)
    thoughts, same = think(model, Aligner.from_model(model), last, cache, 0)
    assert thoughts.shape == (2, 0, 16)
    assert same is last
    assert distance(cache, before) == 0


def test_any_callable_can_replace_the_aligner(model: Qwen3) -> None:
    """`think` needs no class, so a learned map, a control or a recording function works too."""
    seen: list[Tensor] = []

    def tap(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return -hidden

    hidden, cache = remember(model, random_ids(model, 2, 3))
    thoughts, _ = think(model, tap, hidden[:, -1:], cache, 3)
    assert torch.equal(thoughts, -torch.cat(seen, 1))
    assert torch.equal(seen[0], hidden[:, -1:])


@pytest.mark.parametrize(
    "weight", ["embed_tokens.weight", "layers.1.mlp.up_proj.weight", "norm.weight"]
)
@pytest.mark.parametrize("steps", [0, 2])
def test_damaged_weights_are_detected_at_the_first_state(weight: str, steps: int) -> None:
    """The error names the model. With 0 steps too, an agent must not hand on NaN."""
    model = tiny_model()
    model.model.get_parameter(weight).data[0] = torch.nan
    hidden, cache = remember(model, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="qwen3-0: found a state that is not finite"):
        think(model, Aligner(), hidden[:, -1:], cache, steps)


def test_left_padding_counts_as_tokens(model: Qwen3) -> None:
    """Rows are padded on the right. A row that is padded on the left is another text."""
    ids = random_ids(model, 1, 3)
    left = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], 1)
    found = []
    for row in (left, ids):
        hidden, cache = remember(model, row)
        found.append(think(model, Aligner.from_model(model), hidden[:, -1:], cache, 3)[0])
    assert apart(found[0], found[1]) > 1e-3


MAPS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nothing": (lambda h: None, r"found <class 'NoneType'> of shape \(\), expected"),
    "another dtype": (lambda h: h.float(), r"found torch.float32 of shape \(2, 1, 16\)"),
    "one row for all": (lambda h: h[:1], r"torch.float64 of shape \(1, 1, 16\), expected"),
    "no step": (lambda h: h[:, 0], r"torch.float64 of shape \(2, 16\), expected"),
    "two steps": (lambda h: torch.cat([h, h], 1), r"shape \(2, 2, 16\), expected"),
    "another width": (lambda h: h[..., :8], r"shape \(2, 1, 8\), expected"),
}


@pytest.mark.parametrize(("align", "said"), MAPS.values(), ids=MAPS)
def test_a_map_with_a_wrong_result_is_named(
    align: Callable[[Tensor], Any], said: str, model: Qwen3
) -> None:
    """It is refused before the model runs, as one row would silently be broadcast over all rows."""
    hidden, cache = remember(model, random_ids(model, 2, 3))
    with pytest.raises(ValueError, match=f"^align: .*{said}"):
        think(model, align, hidden[:, -1:], cache, 2)
    assert cache.lengths == [3, 3]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_from_a_map_is_not_blamed_on_the_weights(bad: float, model: Qwen3) -> None:
    """NaN was detected one state later, and reported as a damaged weight of the model."""
    hidden, cache = remember(model, random_ids(model, 2, 3))
    seen: list[Tensor] = []

    def align(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden if len(seen) < 3 else torch.full_like(hidden, bad)

    with pytest.raises(ValueError, match=r"^align: found a state that is not finite") as caught:
        think(model, align, hidden[:, -1:], cache, 5)
    assert "weights" not in str(caught.value)
    assert len(seen) == 3


def test_an_lm_passed_as_the_model_is_named(model: Qwen3, tmp_path: Path) -> None:
    """An LM has a `.model` and no embedding, and Python's own error names neither."""
    path, lm = tmp_path / "m.safetensors", SimpleNamespace(model=model)
    Aligner.from_model(model).save(path)
    for wrong in (
        lambda: Aligner.load(path, lm),  # type: ignore[arg-type]
        lambda: Aligner.from_model(lm),  # type: ignore[arg-type]
        lambda: Aligner(norm=1.0, model=lm),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"^model: found SimpleNamespace, .*lm\.model"):
            wrong()


# -- a step on a GPU -------------------------------------------------------------------------------


def rollout(align: Callable[[Tensor], Tensor]) -> KVCache:
    """Prefill, think, cut and join ragged rows on "meta", where tensors have shapes and no values.

    It stands in for a GPU. Code that would wait for a value there raises an error here.
    """
    with torch.device("meta"):
        model = Qwen3(tiny_config())
    cache = model.new_cache(2)
    hidden = prefill(model, [[1, 2, 3, 4, 5], [6, 7]], cache, chunk_tokens=3)
    _, hidden = think(model, align, hidden, cache, 3)
    parts = [cache.truncate([2, 9]), cache.keep_last(2), cache.drop(1, 4), cache.fork()]
    joined = KVCache.concat([*parts, cache.select([1, 0])])
    _, hidden = think(model, align, hidden, joined, 2)
    assert hidden.shape == (2, 1, 16)
    return joined


def test_no_step_waits_for_a_value() -> None:
    """With one `bool(tensor)` per step, a GPU idles while Python prepares the next kernels."""
    assert rollout(Aligner()).lengths == [2 + 2 + 5 + 8 + 5 + 2, 5 + 2 + 2 + 5 + 8 + 2]


@pytest.mark.parametrize(
    "reads",
    [lambda h: h * float(h.norm()), lambda h: h[h > 0], lambda h: h if h.isfinite().all() else -h],
)
def test_a_step_that_reads_a_value_is_detected(reads: Callable[[Tensor], Tensor]) -> None:
    """This is the negative control of the test above."""
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        rollout(reads)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # PyTorch calls it a prototype
def test_no_step_waits_for_a_gpu() -> None:
    """PyTorch reports every operation that waits, including copies from the host."""
    model = tiny_model().to("cuda")
    hidden, cache = remember(model, random_ids(model, 2, 4).cuda(), [4, 2])
    last, align = take_last(hidden, [4, 2]), Aligner.from_model(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        think(model, align, last, cache, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
