"""The forward pass, compared with a second one written from the papers (tests/models.py).

Other guarantees of a model are tested too.
"""

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimas import Qwen3
from minimas.core.config import FAMILIES
from minimas.core.model import finite

from ..models import apart, models, random_ids, reference, remember, tiny_config, tiny_model

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ragged = st.lists(st.integers(1, 6), min_size=1, max_size=3)
seeds = st.integers(0, 99)


@given(models(), ragged, seeds)
def test_each_row_equals_the_papers_whatever_else_is_in_the_batch(
    model: Qwen3, lengths: list[int], seed: int
) -> None:
    """Leaking padding cost LatentMAS two thirds of its accuracy at batch 8 (#25: 0.621 became
    0.219).
    """
    x = model.embed(random_ids(model, len(lengths), max(lengths), seed))
    hidden = model(x, lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        assert apart(hidden[row, :length], reference(model, x[row, :length])) <= 1e-12


@given(models(), ragged, seeds)
def test_the_values_of_padding_do_not_matter(model: Qwen3, lengths: list[int], seed: int) -> None:
    """States are equal bit for bit, now and after the next append.

    Slots after a row's length are never used.
    """
    x = model.embed(random_ids(model, len(lengths), max(lengths), seed))
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    results = []
    for noise in (x, x.masked_fill(padding[..., None], 1e6)):
        cache = model.new_cache(len(lengths))
        hidden = model(noise, cache, torch.tensor(lengths))
        results.append((hidden[~padding], model(x[:, :2], cache), model(x[:, :1], cache)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_heads_equal_repeated_heads(family: str) -> None:
    """If query heads are folded in the wrong order, they use the keys of another group.

    Only a model with more than one group shows this.
    """
    grouped = tiny_model(family)
    full = tiny_model(family, num_key_value_heads=4)
    state = grouped.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            heads = state[name].unflatten(0, (2, 6))
            state[name] = heads.repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = grouped.embed(random_ids(grouped, 2, 5))
    assert apart(full(x), grouped(x)) <= 1e-13


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_have_the_names_of_hugging_face(family: str, tied: bool) -> None:
    """Checkpoints then load here and in transformers without a weight map."""
    attention = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    attention += [f"self_attn.{name}_proj.bias" for name in "qkv" if family == "qwen2"]
    attention += [f"self_attn.{name}_norm.weight" for name in "qk" if family == "qwen3"]
    block = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    block += ["input_layernorm.weight", "post_attention_layernorm.weight", *attention]
    expected = {f"model.layers.{i}.{name}" for i in range(2) for name in block}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"} | (
        set() if tied else {"lm_head.weight"}
    )
    assert set(Qwen3(tiny_config(family, tie_word_embeddings=tied)).state_dict()) == expected


@given(models(), seeds)
def test_logits_come_from_the_right_matrix(model: Qwen3, seed: int) -> None:
    """A tied model that uses an untrained lm_head generates noise."""
    hidden = model(model.embed(random_ids(model, 2, 3, seed)))
    state = model.state_dict()
    head = state[
        "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    ]
    torch.testing.assert_close(model.logits(hidden), hidden @ head.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_off_until_they_are_switched_on(family: str) -> None:
    """With gradients, 40 thoughts hold 40 graphs.

    A trainer switches them on, and then every parameter gets one.
    """
    model = tiny_model(family)
    assert not any(weight.requires_grad for weight in model.parameters())
    model.requires_grad_(True)
    with torch.enable_grad():
        model.logits(model(model.embed(random_ids(model, 2, 4)))).square().sum().backward()
    for name, weight in model.named_parameters():
        # Without RoPE, a bias on the keys shifts all scores of a query equally. With RoPE, its
        # gradient is small, but not zero.
        assert weight.grad is not None, name
        assert bool(weight.grad.abs().max() > 1e-12), name


WIDE = (
    torch.float32,
    torch.float64,
)  # float16 rounds these differently than bf16, so it makes another model


@pytest.mark.parametrize(
    ("stored", "loaded"),
    [(a, b) for a in DTYPES for b in DTYPES if not (a in WIDE and b == torch.float16)],
)
def test_a_fingerprint_does_not_depend_on_the_dtype(
    stored: torch.dtype, loaded: torch.dtype
) -> None:
    """A cache saved with --dtype float32 belongs to the same model with --dtype bfloat16."""
    checkpoint = tiny_model(dtype=stored, vocab_size=400, hidden_size=64)
    assert copy.deepcopy(checkpoint).to(loaded).fingerprint() == checkpoint.fingerprint()


@given(models(), st.data())
def test_a_fingerprint_depends_on_every_parameter(model: Qwen3, data: st.DataObject) -> None:
    """If only the first tensor were sampled, a fine-tuned model would pass for its base model."""
    name = data.draw(st.sampled_from(sorted(dict(model.named_parameters()))))
    before = model.fingerprint()
    weight = model.get_parameter(name)
    weight.data.mul_(1.1)
    assert model.fingerprint() != before
    assert re.fullmatch("[0-9a-f]{16}", before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_lower_precision_keeps_its_dtype_and_is_close(family: str, dtype: torch.dtype) -> None:
    """A norm or rotation that returns float32 doubles the size of every later activation."""
    exact, low = tiny_model(family), tiny_model(family, dtype=dtype)
    ids = random_ids(exact, 2, 6)
    hidden, cache = remember(low, ids, [6, 3])
    assert hidden.dtype == cache.keys[0].dtype == low.logits(hidden).dtype == dtype
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-5}[dtype]
    assert apart(hidden[0].double(), exact(exact.embed(ids))[0]) < tolerance


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_state_that_is_not_finite_is_refused_with_the_name_of_the_model(bad: float) -> None:
    """Otherwise NaN weights give an empty answer, because argmax of NaN is token 0."""
    with pytest.raises(ValueError, match="some model: found a state that is not finite"):
        finite(torch.tensor([1.0, bad]), "some model")
    assert torch.equal(finite(torch.ones(2), "some model"), torch.ones(2))


@pytest.mark.parametrize("shape", [(3, 1, 16), (1, 1, 16), (1, 2, 16)])
def test_inputs_for_another_number_of_rows_are_refused(
    shape: tuple[int, ...], model: Qwen3
) -> None:
    """One row would silently be broadcast over all rows of the cache."""
    with pytest.raises(ValueError, match="expected 2 as in the cache"):
        model(torch.zeros(shape, dtype=torch.float64), model.new_cache(2))


def test_random_models_are_large_enough_to_show_bugs() -> None:
    """With weights of 0.02, attention adds 1e-4 to its residual, which is below many tolerances."""
    model = tiny_model()
    one, two = (remember(model, random_ids(model, 1, 5, seed))[0] for seed in (0, 1))
    assert apart(one, two) > 0.1
    x = model.embed(random_ids(model, 1, 5))[0]
    alone = reference(model, x, visible=torch.eye(5).bool())
    assert apart(alone[1:], reference(model, x)[1:]) > 0.05


def test_head_dim_comes_from_the_config() -> None:
    """In Qwen3, head_dim is not hidden_size // heads, but gpt-fast overwrites it with that."""
    model = tiny_model(hidden_size=16, num_attention_heads=4, head_dim=10)
    assert tuple(model.model.layers[0].self_attn.q_proj.weight.shape) == (40, 16)


def test_shards_of_an_attention_layer_sum_to_the_layer(model: Qwen3) -> None:
    """The number of heads comes from the weights.

    A shard by key-value heads returns a partial sum.
    """
    x = model.embed(random_ids(model, 2, 5))
    layer = model.model.layers[0].self_attn
    parts = []

    def attention(layer: Any) -> torch.Tensor:
        cache = model.new_cache(2)
        found: torch.Tensor = layer(x, cache.next_positions(2, 5), cache, 0)
        return found

    for half in range(2):
        shard = tiny_model().model.layers[0].self_attn
        for name, rows in (("q_proj", 12), ("k_proj", 6), ("v_proj", 6)):
            part = getattr(layer, name).weight[half * rows : (half + 1) * rows]
            getattr(shard, name).weight = torch.nn.Parameter(part, requires_grad=False)
        part = layer.o_proj.weight[:, half * 12 : (half + 1) * 12]
        shard.o_proj.weight = torch.nn.Parameter(part, requires_grad=False)
        parts.append(attention(shard))
    assert apart(parts[0] + parts[1], attention(layer)) <= 1e-12
