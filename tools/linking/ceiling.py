"""Measure how much thoughts can carry at most, by optimizing the thoughts of each single question.

The thoughts start as those of a map. Adam then changes all their numbers, either for the solution
of the question itself or for that of another question. If a question's own solution becomes no
likelier than another one, no map can help. If both become certain, thoughts can carry anything, and
only learning limits what a link reaches. This module does not train a link.

    R rows of a turn   D hidden
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minimas import LM
from minimas.agents import hand_over
from minimas.results import AgentStart, Thought, run_to_end
from tools.evaluation.last_turn import PrefillOnce
from tools.evaluation.rows import Row

from .link import Feeder
from .rollout import Align, TeamSettings, nll, start_run


class FreeThoughts(nn.Module):
    """The embeddings of all thoughts of a rollout, one tensor (R, steps, D) per turn."""

    def __init__(self, turns: Sequence[Tensor]) -> None:
        super().__init__()
        self.turns = nn.ParameterList(nn.Parameter(turn.clone()) for turn in turns)

    def feeder(self) -> "FreeFeeder":
        """Return what `latent_mas` takes as `align`, for one rollout."""
        return FreeFeeder(list(self.turns))


class FreeFeeder:
    """Feeds given embeddings turn by turn, whatever the states are."""

    def __init__(self, turns: Sequence[Tensor]) -> None:
        self._turns = iter(turns)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Raise TypeError, because each turn must ask for its own map (`with_generators`)."""
        raise TypeError("free thoughts are fed turn by turn")

    def with_generators(self, generators: Any) -> Feeder:
        """Return the map of the next turn, which feeds its embeddings (R, 1, D) in order."""
        # The last agent's turn has no thoughts.
        turn, steps = next(self._turns, None), itertools.count()

        def feed(hidden: Tensor) -> Tensor:
            assert turn is not None, "a rollout has more turns than thoughts"
            step = next(steps)
            return turn[:, step : step + 1].to(hidden.dtype)

        return feed


@torch.no_grad()
def thoughts_of(lm: LM, rows: Sequence[Row], settings: TeamSettings, align: Align) -> FreeThoughts:
    """Return the thoughts of a map on some questions, as parameters."""
    turns: list[list[Tensor]] = []

    def listen(event: Any) -> None:
        if isinstance(event, AgentStart):
            turns.append([])
        elif isinstance(event, Thought):
            turns[-1].append(event.embedding)

    run_to_end(hand_over(start_run(lm, rows, settings, align)), listen)
    return FreeThoughts([torch.cat(steps, 1) for steps in turns])


def optimize(
    lm: LM, rows: Sequence[Row], settings: TeamSettings, align: Align, updates: int, rate: float
) -> list[list[float]]:
    """Return the gold NLL per token of each question, before each update and after the last one.

    The thoughts of a question depend only on its own loss, because Adam scales each number by that
    number's gradients and nothing is clipped.
    """
    free = thoughts_of(lm, rows, settings, align)
    # The first prompts are the same in every update.
    settings = settings._replace(once=PrefillOnce())
    adam = torch.optim.Adam(free.parameters(), lr=rate)
    losses = []
    for update in range(updates + 1):
        found = nll(lm, rows, settings, free.feeder())
        each = torch.stack([tokens.mean() for tokens in found])  # (B,)
        losses.append(each.tolist())
        if update < updates:
            adam.zero_grad()
            each.sum().backward()
            adam.step()
    return [list(one) for one in zip(*losses, strict=True)]


def ceiling(
    lm: LM,
    pairs: Sequence[tuple[Row, Row]],
    settings: TeamSettings,
    align: Align,
    updates: int,
    rate: float,
) -> list[dict[str, Any]]:
    """Return a record per question, with losses by update for its own and for another solution.

    `pairs` has each row twice: with its own solution, and with another one (see `data.rotated`).
    Both optimizations have the same start.
    """
    losses = [
        optimize(lm, rows, settings, align, updates, rate) for rows in zip(*pairs, strict=True)
    ]
    return [
        {"id": row["id"], "own": own, "other": other}
        for (row, _), own, other in zip(pairs, *losses, strict=True)
    ]
