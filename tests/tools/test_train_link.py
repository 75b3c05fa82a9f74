"""tools/train_link.py: gradients are those of the library's own rollout, and a link is learned.

Gradients are compared with differences of the losses that the fast cache gives, in float64.
"""

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minimas import LM, Aligner, KVCache, Team, latent_mas, load
from minimas.core.cache import Positions
from minimas.teams import TEAMS
from tools.linking import command, rollout
from tools.linking.cache import GradCache
from tools.linking.ceiling import ceiling, optimize, thoughts_of
from tools.linking.data import Data, from_file, generator, read_data, rotated
from tools.linking.link import Link, vectors_path
from tools.linking.rollout import How, last_turn, nll, require_alike, solution_scores
from tools.linking.train import Settings, Training, batch_of, in_batches

from ..models import TINY
from ..processes import Process
from ..text import load_text_lm

ROOT = Path(__file__).resolve().parents[2]
ROWS = [  # of unequal length
    {"id": "a", "question": "Eva has 2 cards. She finds 7 more. How many?", "solution": " 2 9",
     "answer": "9", "kind": "math"},
    {"id": "b", "question": "Tom has 5 coins. How many?", "solution": " 5", "answer": "5",
     "kind": "math"},
    {"id": "c", "question": "Ann has 3 plums. She doubles the plums. How many plums?",
     "solution": " 3 6 6", "answer": "6", "kind": "math"},
]  # fmt: skip


@pytest.fixture(scope="module")
def lm() -> LM:
    """Return a random float64 model."""
    return load_text_lm(TINY)


@pytest.fixture(scope="module")
def tiny() -> LM:
    return load(TINY, device="cpu", dtype="float32")


def how(**changes: Any) -> How:
    """Return three agents who think four steps each, before a fourth one."""
    return How(TEAMS["sequential"](), 4)._replace(**changes)


def loss(lm: LM, aligner: Any, how: How, rows: Sequence[Any] = ROWS) -> Tensor:
    return torch.cat(nll(lm, rows, how, aligner)).mean()


def slope(lm: LM, start: Aligner, direction: Tensor, how: How, step: float = 1e-4) -> float:
    """Return the derivative along `direction`, from four losses with the fast cache."""
    assert start.matrix is not None
    losses = {}
    with torch.no_grad():
        for n in (-2, -1, 1, 2):
            moved = Aligner(start.matrix + n * step * direction, start.norm, start.scale)
            losses[n] = loss(lm, moved, how).item()
    return (8 * (losses[1] - losses[-1]) - (losses[2] - losses[-2])) / (12 * step)


def gradient(lm: LM, start: Aligner, how: How) -> Tensor:
    assert start.matrix is not None
    matrix = start.matrix.clone().requires_grad_()
    loss(lm, Aligner(matrix, start.norm, start.scale), how).backward()
    assert matrix.grad is not None
    return matrix.grad


def directions(start: Aligner) -> list[Tensor]:
    assert start.matrix is not None
    source = torch.Generator().manual_seed(1)
    shape = (2, *start.matrix.shape)
    drawn = list(torch.randn(shape, generator=source, dtype=torch.float64))
    one = torch.zeros_like(start.matrix)
    one[3, 5] = 1
    return [*drawn, one]


CASES = [
    how(layout=layout, transfer=transfer)
    for layout, transfer in itertools.product(("turn", "chat"), ("full", "latents", "last"))
]
CASES += [how(team=TEAMS["hierarchical"](), layout=layout) for layout in ("turn", "chat")]


@pytest.mark.parametrize("how", CASES, ids=lambda how: f"{how.layout}-{how.transfer}")
def test_the_gradient_through_three_agents_is_that_of_the_fast_caches_losses(
    lm: LM, how: How
) -> None:
    """A slot that is copied without its graph, or written over, changes no loss but the gradient;
    a row with another length has other slots.
    """
    start = Aligner.from_model(lm.model, "prenorm")
    found = gradient(lm, start, how)
    for direction in directions(start):
        expected = slope(lm, start, direction, how)
        assert abs((found * direction).sum().item() - expected) <= 1e-6 * abs(expected)


def test_a_gradient_that_ends_at_a_hand_over_is_found_wrong(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: without the cache's part the gradient has another size."""

    class Detached(GradCache):
        def append(self, layer: int, keys: Tensor, values: Tensor, at: Positions) -> Any:
            # Gradients of earlier positions reach later ones in the first layer only.
            return super().append(layer, keys if layer else keys.detach(), values, at)

    start = Aligner.from_model(lm.model, "prenorm")
    monkeypatch.setattr(rollout, "GradCache", Detached)
    found = gradient(lm, start, how())
    for direction in directions(start):
        expected = slope(lm, start, direction, how())
        assert abs((found * direction).sum().item() - expected) > 1e-3 * abs(expected)


def test_the_fast_cache_refuses_gradients(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes over what attention has saved; autograd must say so, and not be wrong silently."""
    monkeypatch.setattr(rollout, "GradCache", KVCache)
    with pytest.raises(RuntimeError, match="inplace operation"):
        gradient(lm, Aligner.from_model(lm.model, "prenorm"), how())
