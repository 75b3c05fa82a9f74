"""Rules that stop a row's latent thoughts, for the parameter `until` of `core.rollout.think`.

This file does not depend on agents.

    B rows   n thoughts   D hidden   V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .core.model import Qwen3
from .core.rollout import Until


def entropy_below(model: Qwen3, nats: float) -> Until:
    """Return a rule that stops a row when the entropy of its next token is below `nats`."""
    return lambda hidden, _: entropy(model.logits(hidden)[:, 0]).lt(nats)


def cosine_above(cosine: float) -> Until:
    """Return a rule that stops a row when a thought is too similar to the previous thought."""
    # The first thought has no previous one: its similarities are (B, 0), and any() is False.
    return lambda _, thoughts: torch.any(
        F.cosine_similarity(thoughts[:, -2:-1], thoughts[:, -1:], dim=-1) > cosine, 1
    )


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of scores (…, V), in nats: (…,)."""
    return torch.sum(torch.special.entr(logits.float().softmax(-1)), -1)
