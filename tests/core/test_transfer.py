"""The paper's theorem (section 3.2): a memory handed over equals feeding the same tokens and
thoughts explicitly.

Whole tensors in float64, on any family, for ragged batches and any number of agents, against a
forward without any memory (tests/models.py). Every equality has a negative control that it would
not survive.
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
    """What one agent reads, right-padded, and how often it thinks."""

    ids: Tensor  # (B, T)
    lengths: list[int]
    steps: int


@st.composite
def turns(draw: st.DrawFn, model: Qwen3, most: int = 3) -> list[Turn]:
    """One to `most` agents' turns for the same rows."""
    rows, agents = draw(st.integers(1, 3)), draw(st.integers(1, most))
    drawn = []
    for agent in range(agents):
        lengths = draw(st.lists(st.integers(1, 5), min_size=rows, max_size=rows))
        ids = random_ids(model, rows, max(lengths), draw(st.integers(0, 99)) + 100 * agent)
        drawn.append(Turn(ids, lengths, draw(st.integers(0, 3))))
    return drawn


def take(model: Qwen3, align: Aligner, turn: Turn, cache: KVCache) -> tuple[Tensor, Tensor]:
    """One agent's turn on a memory, as the methods do it: its hidden states (B, T, D) and thoughts
    (B, steps, D).
    """
    hidden = model(model.embed(turn.ids), cache, torch.tensor(turn.lengths))
    thoughts, _ = think(
        model, align, take_last(hidden, torch.tensor(turn.lengths)), cache, turn.steps
    )
    return hidden, thoughts


def explicit(model: Qwen3, align: Aligner, told: list[Turn], row: int) -> Tensor:
    """The inputs (T, D) of one row alone, tokens and thoughts, each thought from a forward over all
    before it.
    """
    x = torch.empty(0, model.config.hidden_size, dtype=torch.float64)
    for turn in told:
        x = torch.cat([x, model.embed(turn.ids[row, : turn.lengths[row]])])
        for _ in range(turn.steps):
            x = torch.cat([x, align(reference(model, x)[-1:])])
    return x


@given(models(), st.data())
def test_memory_equals_feeding_the_inputs(model: Qwen3, data: st.DataObject) -> None:
    """Sequential: whatever the last agent reads gives the states it would have after reading
    everything itself.
    """
    told, align, question = (
        data.draw(turns(model)),
        Aligner.from_model(model),
        random_ids(model, 1, 4, seed=999),
    )
    rows = len(told[0].lengths)
    cache = model.new_cache(rows)
    for turn in told:
        take(model, align, turn, cache)
    hidden = model(model.embed(question.expand(rows, -1)), cache)
    for row in range(rows):
        x = torch.cat([explicit(model, align, told, row), model.embed(question[0])])
        expected = reference(model, x)[-4:]
        assert apart(hidden[row], expected) <= CLOSE
        assert apart(model.logits(hidden[row]), model.logits(expected)) <= CLOSE
        fresh = model.new_cache(1)  # and slot by slot, in every layer
        model(x[None], fresh)
        for stores, others in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
            for store, other in zip(stores, others, strict=True):
                assert apart(store[row, :, : len(x)], other[0, :, : len(x)]) <= CLOSE


@given(models(), st.data())
def test_any_split_of_the_reading_gives_the_same_states(model: Qwen3, data: st.DataObject) -> None:
    """Chunks of 512 bound the mask of a long prompt; is_causal aligned to the wrong corner shows
    only when T ≠ S.
    """
    ids = random_ids(model, 2, 9, data.draw(st.integers(0, 99)))
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, 8), max_size=4))), 9]
    whole, _ = remember(model, ids)
    cache = model.new_cache(2)
    parts = [model(model.embed(ids[:, a:b]), cache) for a, b in itertools.pairwise(edges)]
    assert apart(torch.cat(parts, 1), whole) <= CLOSE


@given(models(), st.data())
def test_joined_memories_equal_the_block_masked_forward(model: Qwen3, data: st.DataObject) -> None:
    """Hierarchical: no expert sees another one, their caches follow each other, and the summarizer
    sees all of them.
    """
    told, align, question = (
        data.draw(turns(model)),
        Aligner.from_model(model),
        random_ids(model, 1, 4, seed=999),
    )
    rows = len(told[0].lengths)
    memories = [model.new_cache(rows) for _ in told]
    for turn, memory in zip(told, memories, strict=True):
        take(model, align, turn, memory)
    joined = KVCache.concat(memories)
    hidden = model(model.embed(question.expand(rows, -1)), joined)
    for row in range(rows):
        blocks = [*(explicit(model, align, [turn], row) for turn in told), model.embed(question[0])]
        visible = torch.block_diag(*(torch.ones(len(b), len(b)) for b in blocks)).bool()
        visible[-4:] = True
        expected = reference(model, torch.cat(blocks), visible=visible.tril())[-4:]
        assert apart(hidden[row], expected) <= CLOSE


@given(models(), st.data())
def test_cut_memories_equal_the_forward_that_reads_what_is_left(
    model: Qwen3, data: st.DataObject
) -> None:
    """truncate: as if the rest had never been read. The cut may fall inside the prompt or the
    thoughts.
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
def test_kept_thoughts_equal_the_forward_that_hides_what_was_dropped(
    model: Qwen3, data: st.DataObject
) -> None:
    """keep_last (transfer="latents"): thoughts keep what they took in from the prompt, which itself
    is gone.
    """
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
def test_a_dropped_span_of_one_layer_equals_feeding_what_is_left(
    model: Qwen3, data: st.DataObject
) -> None:
    """Keys and values of the first layer know their own input only: nothing of the span is left."""
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
def test_a_dropped_part_that_nobody_saw_equals_not_joining_it(
    model: Qwen3, data: st.DataObject
) -> None:
    """Experts do not see each other: without one of them, its memory is as if it had never been."""
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


# -- negative controls: what these equalities would not survive ------------------------------------


@pytest.fixture(params=[(family, layout) for family in FAMILIES for layout in LAYOUTS], ids=str)
def any_model(request: pytest.FixtureRequest) -> Qwen3:
    family, (heads, kv_heads, head_dim) = request.param
    return tiny_model(
        family, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim
    )


def test_moving_only_the_new_tokens_changes_the_output(any_model: Qwen3) -> None:
    """And moving all of them changes nothing: a control that shifts everything passes with any bug
    in positions.
    """
    x, positions = any_model.embed(random_ids(any_model, 1, 9))[0], torch.arange(9)
    right = reference(any_model, x)
    assert apart(reference(any_model, x, positions + 1000), right) <= CLOSE
    assert apart(reference(any_model, x, positions + (positions >= 6)), right) > FAR


def test_joining_without_turning_the_keys_changes_the_output(any_model: Qwen3) -> None:
    """The second memory would stand where the first one stands."""
    ids = random_ids(any_model, 2, 5)
    memories = [remember(any_model, part)[1] for part in ids.split(1)]
    right, wrong = KVCache.concat(memories), any_model.new_cache(1)
    for memory in memories:
        positions = wrong.next_positions(1, 5)
        for layer, (keys, values) in enumerate(zip(memory.keys, memory.values, strict=True)):
            wrong.append(layer, keys[:, :, :5], values[:, :, :5], positions)
        wrong.advance(memory.lengths, most=5)
    x = any_model.embed(ids[:1])
    assert apart(any_model(x, wrong), any_model(x, right)) > FAR


def test_cutting_without_turning_the_keys_changes_the_output(any_model: Qwen3) -> None:
    """The authors truncate a cache whose later positions follow its length: its keys then come from
    the future.
    """
    ids = random_ids(any_model, 1, 8)
    _, cache = remember(any_model, ids)
    right, wrong = cache.keep_last(3), cache.truncate(3)
    for mine, theirs in ((wrong.keys, cache.keys), (wrong.values, cache.values)):
        mine[:] = [store[:, :, 5:8].clone() for store in theirs]
    x = any_model.embed(ids[:, :3])
    assert apart(any_model(x, wrong), any_model(x, right)) > FAR


def test_dropping_without_turning_the_keys_changes_the_output(any_model: Qwen3) -> None:
    """The gap would stay in the distances: later slots would come after the new tokens."""
    ids = random_ids(any_model, 1, 8)
    _, cache = remember(any_model, ids)
    right, wrong = cache.drop(1, 6), cache.drop(1, 6)
    wrong.keys[:] = [torch.cat([keys[:, :, :1], keys[:, :, 6:8]], 2) for keys in cache.keys]
    x = any_model.embed(ids[:, :3])
    assert apart(any_model(x, wrong), any_model(x, right)) > FAR


def test_a_dropped_span_that_was_seen_is_an_approximation(any_model: Qwen3) -> None:
    """With two layers, later slots have taken the span in: it is not as if it had not been read."""
    ids, new = random_ids(any_model, 1, 8), any_model.embed(random_ids(any_model, 1, 2, seed=1))
    dropped = remember(any_model, ids)[1].drop(2, 5)
    left = remember(any_model, torch.cat([ids[:, :2], ids[:, 5:]], 1))[1]
    assert apart(any_model(new, dropped), any_model(new, left)) > FAR
    first = [stores[0][:, :, :5] for stores in (dropped.keys, left.keys)]
    assert apart(*first) <= 1e-12  # the first layer of both is the same


def test_joined_is_not_chained(any_model: Qwen3) -> None:
    """An expert on another's memory is the authors' "hierarchical" (#32): the prompts change, the
    cache is chained.
    """
    first, second, question = random_ids(any_model, 3, 5).split(1)
    chained = remember(any_model, torch.cat([first, second], 1))[1]
    joined = KVCache.concat([remember(any_model, ids)[1] for ids in (first, second)])
    x = any_model.embed(question)
    assert apart(any_model(x, joined), any_model(x, chained)) > FAR


def test_another_prompt_gives_another_output(any_model: Qwen3) -> None:
    """Tiny initialisations hide bugs below the tolerance: here, what one agent reads decides the
    next one's states.
    """
    first, second, question = random_ids(any_model, 3, 5).split(1)
    x, align = any_model.embed(question), Aligner.from_model(any_model)
    outputs = []
    for ids in (first, second, first.flip(1)):
        cache = any_model.new_cache(1)
        take(any_model, align, Turn(ids, [5], 2), cache)
        outputs.append(any_model(x, cache.keep_last(2)))  # through two thoughts alone
    assert min(apart(outputs[0], outputs[1]), apart(outputs[0], outputs[2])) > FAR


def test_padding_that_is_seen_changes_the_output(any_model: Qwen3) -> None:
    """The same rows with the pads counted as read, as ones over past caches do in the authors'
    code.
    """
    ids, x = random_ids(any_model, 2, 6), any_model.embed(random_ids(any_model, 2, 2, seed=1))
    hidden, seen = (
        any_model(x, remember(any_model, ids, lengths)[1]) for lengths in ([6, 3], [6, 6])
    )
    assert torch.equal(hidden[0], seen[0]) or apart(hidden[0], seen[0]) <= CLOSE
    assert apart(seen[1], hidden[1]) > FAR


def test_a_causal_mask_is_aligned_to_the_memorys_end(model: Qwen3) -> None:
    """is_causal=True aligns its triangle to the top left, which is right for T = S only.

    T new tokens on a memory would then see too few slots.
    """
    ids = random_ids(model, 1, 9)
    whole, _ = remember(model, ids)
    _, cache = remember(model, ids[:, :6])
    assert apart(model(model.embed(ids[:, 6:]), cache), whole[:, 6:]) <= 1e-12
    visible = torch.ones(9, 9).bool().tril()
    visible[6:] = torch.ones(3, 9).bool().tril()
    assert apart(reference(model, model.embed(ids)[0], visible=visible)[6:], whole[0, 6:]) > FAR
