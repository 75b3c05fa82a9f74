"""What thoughts could carry at most: thoughts that are optimized for one question each.

They start as the thoughts of a map. Adam then changes every number of them, for the solution of the
question itself, or for that of another question. If its own solution becomes no likelier than
another one, no map can help; if both become certain, thoughts are a channel for anything, and what
a link reaches is a question of learning. Does not know: training a link.

    R rows of a turn   D hidden
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minimas import LM
from minimas.agents import hand_over
from minimas.results import AgentStart, Thought, finish
from tools.evaluation.last_turn import PrefillOnce
from tools.evaluation.rows import Row

from .data import rotated
from .link import Feeder
from .rollout import Align, How, nll, start_run


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
        """Raise: a turn asks for its map when it starts."""
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
def thoughts_of(lm: LM, rows: Sequence[Row], how: How, align: Align) -> FreeThoughts:
    """Return the thoughts of a map on some questions, as parameters."""
    turns: list[list[Tensor]] = []

    def listen(event: Any) -> None:
        if isinstance(event, AgentStart):
            turns.append([])
        elif isinstance(event, Thought):
            turns[-1].append(event.embedding)

    finish(hand_over(start_run(lm, rows, how, align)), listen)
    return FreeThoughts([torch.cat(steps, 1) for steps in turns])


def optimize(
    lm: LM, rows: Sequence[Row], how: How, align: Align, updates: int, rate: float
) -> list[list[float]]:
    """Return the gold NLL per token of each question, before each update and after the last.

    Each question's thoughts depend on its own loss alone: Adam divides by every number's own
    gradients, and there is no clipping.
    """
    free = thoughts_of(lm, rows, how, align)
    how = how._replace(once=PrefillOnce())  # the first prompts are the same in every update
    adam = torch.optim.Adam(free.parameters(), lr=rate)
    losses = []
    for update in range(updates + 1):
        each = torch.stack([tokens.mean() for tokens in nll(lm, rows, how, free.feeder())])  # (B,)
        losses.append(each.tolist())
        if update < updates:
            adam.zero_grad()
            each.sum().backward()
            adam.step()
    return [list(one) for one in zip(*losses, strict=True)]


def ceiling(
    lm: LM, rows: Sequence[Row], how: How, align: Align, updates: int, rate: float
) -> list[dict[str, Any]]:
    """Return a record per question: losses by update for its own solution, and for the next one's.

    Thoughts for another question's solution are optimized from the same start.
    """
    own_losses = optimize(lm, rows, how, align, updates, rate)
    other_losses = optimize(lm, rotated(rows), how, align, updates, rate)
    return [
        {"id": row["id"], "own": own, "other": other}
        for row, own, other in zip(rows, own_losses, other_losses, strict=True)
    ]
