"""Rows that stop thinking at different steps, compared with each row alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minimas import Aligner, Qwen3, think
from minimas.core.model import take_last
from minimas.core.rollout import rollout
from minimas.depth import cosine_above, entropy_below

from ..models import apart, distance, random_ids, remember

LENGTHS = [4, 2, 5]


def prefilled(model: Qwen3) -> tuple[Tensor, Any]:
    hidden, cache = remember(model, random_ids(model, 3, 5), LENGTHS)
    return take_last(hidden, LENGTHS), cache


@pytest.mark.parametrize("counts", [[2, 0, 4], [4, 4, 4], [0, 0, 1], [0, 0, 0], [1, 9, 2]])
def test_a_row_that_stops_early_equals_the_same_row_alone(model: Qwen3, counts: list[int]) -> None:
    """Its cache and state stay unchanged, other rows continue, and only fed embeddings count."""
    align = Aligner.from_model(model)
    hidden, cache = prefilled(model)
    limits = torch.tensor(counts)
    thoughts, last = think(
        model, align, hidden, cache, 5, until=lambda _, fed: fed.shape[1] > limits
    )
    expected = [min(count, 5) for count in counts]
    assert cache.lengths == [n + count for n, count in zip(LENGTHS, expected, strict=True)]
    assert thoughts.shape == (3, max(expected), 16)
    for row, count in enumerate(expected):
        start, alone = prefilled(model)
        alone = alone.select([row])
        own, end = think(model, align, start[row : row + 1], alone, count)
        assert distance(cache.select([row]), alone) < 1e-12
        assert torch.allclose(thoughts[row, :count], own[0], atol=1e-12)
        assert not thoughts[row, count:].any()
        assert apart(last[row], end[0]) < 1e-12


def test_more_than_one_state_per_row_is_refused(model: Qwen3) -> None:
    """Without `take_last`, each step fed as many thoughts as the prompt has tokens."""
    hidden, cache = remember(model, random_ids(model, 2, 5))
    with pytest.raises(ValueError, match=r"^hidden: found .*\(2, 5, 16\), expected .*\(2, 1, 16\)"):
        think(model, Aligner.from_model(model), hidden, cache, 2)
    assert cache.lengths == [5, 5]


def test_a_rule_sees_the_embeddings_that_were_fed(model: Qwen3) -> None:
    """It saw what the map returned for rows that had stopped, although they were fed zeros."""
    hidden, cache = prefilled(model)
    given: list[Tensor] = []

    def stops(_: Tensor, thoughts: Tensor) -> Tensor:
        given.append(thoughts)
        return torch.tensor([thoughts.shape[1] > 1, False, False])

    fed, _ = think(model, Aligner.from_model(model), hidden, cache, 4, until=stops)
    assert not fed[0, 1:].any() and fed[1:].all()
    for n, thoughts in enumerate(given):
        assert torch.equal(thoughts[:, :n], fed[:, :n])


def test_a_row_that_has_stopped_does_not_start_again(model: Qwen3) -> None:
    """If a rule says stop once and then go on, slots in between would be missing."""
    hidden, cache = prefilled(model)
    align, row = Aligner.from_model(model), torch.tensor([True, False, False])
    steps = list(rollout(model, align, hidden, cache, 4, lambda _, fed: row & (fed.shape[1] == 2)))
    assert [step.running.tolist() for step in steps] == [[True] * 3] + [[False, True, True]] * 3
    assert cache.lengths == [4 + 1, 2 + 4, 5 + 4]
    assert torch.equal(steps[1].after[0], steps[1].hidden[0])


def test_the_entropy_of_the_next_token_stops_a_row(model: Qwen3) -> None:
    """The reference is -Σ p ln p, with a threshold between the values of the rows."""
    align, entropies = Aligner.from_model(model), []
    hidden, cache = prefilled(model)
    for step in rollout(model, align, hidden, cache, 4):
        probabilities = model.logits(step.hidden)[:, 0].softmax(-1)
        entropies.append(-(probabilities * probabilities.log()).sum(-1))
    values = torch.stack(entropies, 1)  # (B, steps)
    threshold = float(values.median()) - 1e-4  # between two values
    below = [(row < threshold).tolist() for row in values]
    expected = [row.index(True) if any(row) else 4 for row in below]
    assert len(set(expected)) > 1
    hidden, cache = prefilled(model)
    think(model, align, hidden, cache, 4, until=entropy_below(model, threshold))
    assert [n - old for n, old in zip(cache.lengths, LENGTHS, strict=True)] == expected


def test_a_thought_similar_to_the_previous_one_stops_a_row(model: Qwen3) -> None:
    """The first thought has no previous one, so it never stops. The similar thought is not fed."""
    flags = torch.tensor([True, False, False])[:, None, None]

    def align(hidden: Tensor) -> Tensor:
        return torch.where(flags, torch.ones_like(hidden), hidden)

    hidden, cache = prefilled(model)
    think(model, align, hidden, cache, 3, until=cosine_above(0.999))
    assert cache.lengths[0] == 4 + 1
    assert cache.lengths[1:] == [2 + 3, 5 + 3]


@pytest.mark.parametrize(
    "rule",
    [
        lambda h, t: h[:, 0],
        lambda h, t: True,
        lambda h, t: h[:, :1, 0] > 0,
        lambda h, t: h[:1, 0, 0] > 0,
    ],
)
def test_a_rule_without_one_bool_per_row_is_named(
    rule: Callable[[Tensor, Tensor], Any], model: Qwen3
) -> None:
    """A single value would silently stop all rows or none."""
    hidden, cache = prefilled(model)
    with pytest.raises(ValueError, match=r"^until: found .*expected torch.bool of shape \(3,\)"):
        think(model, Aligner(), hidden, cache, 2, until=rule)
    assert cache.lengths == LENGTHS
