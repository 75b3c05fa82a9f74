"""The paper's theorem (section 3.2): a working memory that is handed over equals feeding the same
tokens and thoughts explicitly.

The tests compare whole tensors in float64, for any family, ragged batches and any number of agents,
with a forward pass without a KV cache (tests/models.py). Every equality has a negative control that
breaks it.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minimas import Aligner, KVCache, Qwen3, think
from minimas.core.config import FAMILIES
from minimas.core.model import take_last

from ..models import LAYOUTS, apart, models, random_ids, reference, remember, tiny_model

CLOSE, FAR = 1e-9, 1e-3


class Turn(NamedTuple):
    """One agent's prompt tokens, right-padded, and its number of latent steps."""

    ids: Tensor  # (B, T)
    lengths: list[int]
    steps: int


@st.composite
def turns(draw: st.DrawFn, model: Qwen3, most: int = 3) -> list[Turn]:
    """Draw the turns of one to `most` agents for the same rows."""
    rows, agents = draw(st.integers(1, 3)), draw(st.integers(1, most))
    drawn = []
    for agent in range(agents):
        lengths = draw(st.lists(st.integers(1, 5), min_size=rows, max_size=rows))
        ids = random_ids(model, rows, max(lengths), draw(st.integers(0, 99)) + 100 * agent)
        drawn.append(Turn(ids, lengths, draw(st.integers(0, 3))))
    return drawn


def take(model: Qwen3, align: Aligner, turn: Turn, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Run one agent's turn on a cache, as the methods do.

    Returns its hidden states (B, T, D) and its thoughts (B, steps, D).
    """
    hidden = model(model.embed(turn.ids), cache, torch.tensor(turn.lengths))
    thoughts, _ = think(
        model, align, take_last(hidden, torch.tensor(turn.lengths)), cache, turn.steps
    )
    return hidden, thoughts


def explicit(model: Qwen3, align: Aligner, all_turns: list[Turn], row: int) -> Tensor:
    """Return the inputs (T, D) of one row alone: tokens and thoughts.

    Each thought comes from a forward pass over everything before it.
    """
    x = torch.empty(0, model.config.hidden_size, dtype=torch.float64)
    for turn in all_turns:
        x = torch.cat([x, model.embed(turn.ids[row, : turn.lengths[row]])])
        for _ in range(turn.steps):
            x = torch.cat([x, align(reference(model, x)[-1:])])
    return x


@given(models(), st.data())
def test_memory_equals_feeding_the_inputs(model: Qwen3, data: st.DataObject) -> None:
    """Sequential: the last agent's states equal those after feeding it everything before them."""
    all_turns, align, question = (
        data.draw(turns(model)),
        Aligner.from_model(model),
        random_ids(model, 1, 4, seed=999),
    )
    rows = len(all_turns[0].lengths)
    cache = model.new_cache(rows)
    for turn in all_turns:
        take(model, align, turn, cache)
    hidden = model(model.embed(question.expand(rows, -1)), cache)
    for row in range(rows):
        x = torch.cat([explicit(model, align, all_turns, row), model.embed(question[0])])
        expected = reference(model, x)[-4:]
        assert apart(hidden[row], expected) <= CLOSE
        assert apart(model.logits(hidden[row]), model.logits(expected)) <= CLOSE
        fresh = model.new_cache(1)  # and slot by slot, in every layer
        model(x[None], fresh)
        for stores, others in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
            for store, other in zip(stores, others, strict=True):
                assert apart(store[row, :, : len(x)], other[0, :, : len(x)]) <= CLOSE


@given(models(), st.data())
def test_prefill_in_any_chunks_gives_the_same_states(model: Qwen3, data: st.DataObject) -> None:
    """Chunks of 512 limit the mask of a long prompt.

    An is_causal aligned to the wrong corner shows only if T ≠ S.
    """
    ids = random_ids(model, 2, 9, data.draw(st.integers(0, 99)))
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, 8), max_size=4))), 9]
    whole, _ = remember(model, ids)
    cache = model.new_cache(2)
    parts = [model(model.embed(ids[:, a:b]), cache) for a, b in itertools.pairwise(edges)]
    assert apart(torch.cat(parts, 1), whole) <= CLOSE


@given(models(), st.data())
def test_joined_caches_equal_the_block_masked_forward(model: Qwen3, data: st.DataObject) -> None:
    """Hierarchical: no expert sees another one.

    Their caches follow each other, and the summarizer sees all of them.
    """
    all_turns, align, question = (
        data.draw(turns(model)),
        Aligner.from_model(model),
        random_ids(model, 1, 4, seed=999),
    )
    rows = len(all_turns[0].lengths)
    caches = [model.new_cache(rows) for _ in all_turns]
    for turn, cache in zip(all_turns, caches, strict=True):
        take(model, align, turn, cache)
    joined = KVCache.concat(caches)
    hidden = model(model.embed(question.expand(rows, -1)), joined)
    for row in range(rows):
        blocks = [
            *(explicit(model, align, [turn], row) for turn in all_turns),
            model.embed(question[0]),
        ]
        visible = torch.block_diag(*(torch.ones(len(b), len(b)) for b in blocks)).bool()
        visible[-4:] = True
        expected = reference(model, torch.cat(blocks), visible=visible.tril())[-4:]
        assert apart(hidden[row], expected) <= CLOSE


@given(models(), st.data())
def test_a_truncated_cache_equals_a_forward_over_what_is_left(
    model: Qwen3, data: st.DataObject
) -> None:
    """truncate: as if the rest had never been fed.

    The cut may fall inside the prompt or the thoughts.
    """
    [turn], align = data.draw(turns(model, most=1)), Aligner.from_model(model)
    cache = model.new_cache(len(turn.lengths))
    take(model, align, turn, cache)
    kept = torch.tensor([data.draw(st.integers(0, int(n))) for n in cache.lengths])
    ids = random_ids(model, len(kept), 3, seed=999)
    hidden = model(model.embed(ids), cache.truncate(kept))
    for row, length in enumerate(kept.tolist()):
        x = torch.cat([explicit(model, align, [turn], row)[:length], model.embed(ids[row])])
        assert apart(hidden[row], reference(model, x)[-3:]) <= CLOSE


@given(models(), st.data())
def test_kept_thoughts_equal_a_forward_that_masks_the_prompt(
    model: Qwen3, data: st.DataObject
) -> None:
    """keep_last (transfer="latents"): thoughts keep their information from the removed prompt."""
    [turn], align = data.draw(turns(model, most=1)), Aligner.from_model(model)
    cache = model.new_cache(len(turn.lengths))
    take(model, align, turn, cache)
    ids = random_ids(model, len(turn.lengths), 3, seed=999)
    hidden = model(model.embed(ids), cache.keep_last(turn.steps))
    for row, dropped in enumerate(turn.lengths):
        x = torch.cat([explicit(model, align, [turn], row), model.embed(ids[row])])
        visible = torch.ones(len(x), len(x)).bool().tril()
        visible[-3:, :dropped] = False
        assert apart(hidden[row], reference(model, x, visible=visible)[-3:]) <= CLOSE


@given(models(layers=1), st.data())
def test_dropping_a_span_in_a_model_of_one_layer_equals_feeding_what_is_left(
    model: Qwen3, data: st.DataObject
) -> None:
    """Keys and values of the first layer depend only on their own input, so no trace is left."""
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    start = data.draw(st.integers(0, 7))
    stop = start + data.draw(st.integers(0, 7))
    ids, new = random_ids(model, len(lengths), max(lengths)), random_ids(model, 1, 3, seed=999)
    _, cache = remember(model, ids, lengths)
    hidden = model(model.embed(new.expand(len(lengths), -1)), cache.drop(start, stop))
    for row, length in enumerate(lengths):
        left = [*range(length)[:start], *range(length)[stop:]]
        x = model.embed(torch.cat([ids[row, left], new[0]]))
        assert apart(hidden[row], reference(model, x)[-3:]) <= CLOSE


@given(models(), st.data())
def test_dropping_one_expert_equals_not_joining_it(model: Qwen3, data: st.DataObject) -> None:
    """Experts do not see each other, so dropping one leaves no trace of it."""
    rows = data.draw(st.integers(1, 3))
    parts = []
    for seed in range(3):
        lengths = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
        ids = random_ids(model, rows, 4, seed)
        parts.append(remember(model, ids, lengths)[1])
    gone = data.draw(st.integers(0, 2))
    starts = [sum(part.lengths[row] for part in parts[:gone]) for row in range(rows)]
    stops = [start + n for start, n in zip(starts, parts[gone].lengths, strict=True)]
    x = model.embed(random_ids(model, rows, 2, seed=999))
    dropped = model(x, KVCache.concat(parts).drop(starts, stops))
    kept = model(x, KVCache.concat([part for i, part in enumerate(parts) if i != gone]))
    assert apart(dropped, kept) <= CLOSE


# -- negative controls: changes that break these equalities ----------------------------------------


@pytest.fixture(params=[(family, layout) for family in FAMILIES for layout in LAYOUTS], ids=str)
def any_model(request: pytest.FixtureRequest) -> Qwen3:
    family, (heads, kv_heads, head_dim) = request.param
    return tiny_model(
        family, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim
    )


def test_moving_only_the_new_tokens_changes_the_output(any_model: Qwen3) -> None:
    """Moving all tokens changes nothing.

    A control that shifts all of them would pass with any bug in positions.
    """
    x, positions = any_model.embed(random_ids(any_model, 1, 9))[0], torch.arange(9)
    right = reference(any_model, x)
    assert apart(reference(any_model, x, positions + 1000), right) <= CLOSE
    assert apart(reference(any_model, x, positions + (positions >= 6)), right) > FAR


def test_joining_without_rotating_the_keys_changes_the_output(any_model: Qwen3) -> None:
    """The second cache would have the positions of the first one."""
    ids = random_ids(any_model, 2, 5)
    caches = [remember(any_model, part)[1] for part in ids.split(1)]
    right, wrong = KVCache.concat(caches), any_model.new_cache(1)
    for cache in caches:
        positions = wrong.next_positions(1, 5)
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            wrong.append(layer, keys[:, :, :5], values[:, :, :5], positions)
        wrong.advance(cache.lengths, most=5)
    x = any_model.embed(ids[:1])
    assert apart(any_model(x, wrong), any_model(x, right)) > FAR


def test_cutting_without_rotating_the_keys_changes_the_output(any_model: Qwen3) -> None:
    """The authors truncate a cache whose later positions follow its length.

    Its keys then have positions in the future.
    """
    ids = random_ids(any_model, 1, 8)
    _, cache = remember(any_model, ids)
    right, wrong = cache.keep_last(3), cache.truncate(3)
    for mine, theirs in ((wrong.keys, cache.keys), (wrong.values, cache.values)):
        mine[:] = [store[:, :, 5:8].clone() for store in theirs]
    x = any_model.embed(ids[:, :3])
    assert apart(any_model(x, wrong), any_model(x, right)) > FAR


def test_dropping_without_rotating_the_keys_changes_the_output(any_model: Qwen3) -> None:
    """The gap would remain in the distances, so later slots would come after the new tokens."""
    ids = random_ids(any_model, 1, 8)
    _, cache = remember(any_model, ids)
    right, wrong = cache.drop(1, 6), cache.drop(1, 6)
    wrong.keys[:] = [torch.cat([keys[:, :, :1], keys[:, :, 6:8]], 2) for keys in cache.keys]
    x = any_model.embed(ids[:, :3])
    assert apart(any_model(x, wrong), any_model(x, right)) > FAR


def test_dropping_a_span_that_later_slots_attended_to_is_an_approximation(any_model: Qwen3) -> None:
    """With two layers, later slots contain information from the span, so a trace of it remains."""
    ids, new = random_ids(any_model, 1, 8), any_model.embed(random_ids(any_model, 1, 2, seed=1))
    dropped = remember(any_model, ids)[1].drop(2, 5)
    left = remember(any_model, torch.cat([ids[:, :2], ids[:, 5:]], 1))[1]
    assert apart(any_model(new, dropped), any_model(new, left)) > FAR
    first = [stores[0][:, :, :5] for stores in (dropped.keys, left.keys)]
    assert apart(*first) <= 1e-12  # the first layer of both is the same


def test_joined_caches_differ_from_chained_ones(any_model: Qwen3) -> None:
    """In the authors' "hierarchical" (#32), only the prompts change.

    Each expert continues another's cache, so the caches are chained.
    """
    first, second, question = random_ids(any_model, 3, 5).split(1)
    chained = remember(any_model, torch.cat([first, second], 1))[1]
    joined = KVCache.concat([remember(any_model, ids)[1] for ids in (first, second)])
    x = any_model.embed(question)
    assert apart(any_model(x, joined), any_model(x, chained)) > FAR


def test_another_prompt_gives_another_output(any_model: Qwen3) -> None:
    """The prompt of one agent must change the next one's states.

    With tiny initial weights, bugs would be below the tolerance.
    """
    first, second, question = random_ids(any_model, 3, 5).split(1)
    x, align = any_model.embed(question), Aligner.from_model(any_model)
    outputs = []
    for ids in (first, second, first.flip(1)):
        cache = any_model.new_cache(1)
        take(any_model, align, Turn(ids, [5], 2), cache)
        outputs.append(any_model(x, cache.keep_last(2)))  # through two thoughts alone
    assert min(apart(outputs[0], outputs[1]), apart(outputs[0], outputs[2])) > FAR


def test_attending_to_padding_changes_the_output(any_model: Qwen3) -> None:
    """The same rows, with padding counted as tokens.

    In the authors' code, a mask of ones over past caches does that.
    """
    ids, x = random_ids(any_model, 2, 6), any_model.embed(random_ids(any_model, 2, 2, seed=1))
    hidden, seen = (
        any_model(x, remember(any_model, ids, lengths)[1]) for lengths in ([6, 3], [6, 6])
    )
    assert torch.equal(hidden[0], seen[0]) or apart(hidden[0], seen[0]) <= CLOSE
    assert apart(seen[1], hidden[1]) > FAR


def test_a_causal_mask_is_aligned_to_the_end_of_the_cache(model: Qwen3) -> None:
    """is_causal=True aligns its triangle to the top left, which is right only for T = S.

    T new tokens on a cache would then see too few slots.
    """
    ids = random_ids(model, 1, 9)
    whole, _ = remember(model, ids)
    _, cache = remember(model, ids[:, :6])
    assert apart(model(model.embed(ids[:, 6:]), cache), whole[:, 6:]) <= 1e-12
    visible = torch.ones(9, 9).bool().tril()
    visible[6:] = torch.ones(3, 9).bool().tril()
    assert apart(reference(model, model.embed(ids)[0], visible=visible)[6:], whole[0, 6:]) > FAR
