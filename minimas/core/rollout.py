"""The latent loop: run the model on its own states instead of tokens. Each row may stop early.

This file does not depend on tokens, prompts, agents or sampling.

    B rows   n thoughts   D hidden
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import KVCache
from .errors import ParameterError
from .model import Qwen3, finite

Align = Callable[[Tensor], Tensor]  # hidden states (B, 1, D) -> embeddings (B, 1, D), same dtype
# Hidden states (B, 1, D), embeddings (B, n, D) -> (B,) bool: rows that stop. See `think`.
Until = Callable[[Tensor, Tensor], Tensor]


class Thought(NamedTuple):
    """One latent step that is done. Rows that have stopped do not change."""

    hidden: Tensor  # (B, 1, D): the states that the step started from
    embedding: Tensor  # (B, 1, D): the embeddings fed, zeros in rows that have stopped
    running: Tensor  # (B,) bool: the rows that have not stopped
    after: Tensor  # (B, 1, D): the states after the step


def think(
    model: Qwen3,
    align: Align,
    hidden: Tensor,
    cache: KVCache,
    steps: int,
    until: Until | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `steps` latent steps from `hidden` (B, 1, D), the state at each row's last position.

    Each step maps the last hidden state to an embedding with `align` and feeds it in place of a
    token's, so that `cache` grows by one slot. `align` is any callable from (B, 1, D) to (B, 1, D)
    in the same dtype, such as an `Aligner`. Returns the embeddings fed, (B, steps, D), and the
    state after the last one, (B, 1, D). Decode from that state, or leave it and append the next
    prompt to `cache`. With 0 steps nothing changes.

    `until` lets each row stop before it has `steps` thoughts. It is any callable that
    takes the hidden states (B, 1, D) and the embeddings (B, n, D): those fed so far, followed by
    the one about to be fed. It returns (B,) bool. Where it returns True, this embedding is not fed,
    the row's state and cache no longer change, and its further embeddings in the result are zeros.
    The result (B, n, D) has as many embeddings as the row with the most thoughts.

    Raises ValueError for negative steps, `hidden` of another shape, a map or a rule that returns
    another shape or dtype, or, on a CPU, a state that is not finite.
    """
    thoughts = list(rollout(model, align, hidden, cache, steps, until))
    fed = torch.cat([hidden[:, :0], *(thought.embedding for thought in thoughts)], 1)
    return fed, thoughts[-1].after if thoughts else hidden


def rollout(
    model: Qwen3,
    align: Align,
    hidden: Tensor,
    cache: KVCache,
    steps: int,
    until: Until | None = None,
) -> Iterator[Thought]:
    """Yield each latent step of `think` once it is done. Parameters and errors are the same."""
    if steps < 0:
        raise ParameterError("latent_steps", f"found {steps}, expected 0 or more")
    finite(_checked("hidden", hidden, hidden[:, :1]), model.name)  # both are (B, 1, D)
    running = torch.ones_like(hidden[:, 0, 0], dtype=torch.bool)  # (B,)
    made = list[Tensor]()
    for _ in range(steps):
        embedding = _checked("align", align(hidden), hidden)
        finite(embedding, "align", "the map has returned it")
        if until is None:
            after = model(embedding, cache)
        else:
            running = running & ~_checked(
                "until", until(hidden, torch.cat([*made, embedding], 1)), running
            )
            # New slots per row: 0 in a stopped one. On a GPU, the only wait in a step.
            lengths = running.tolist()
            if not any(lengths):
                return
            rows = running[:, None, None]  # (B, 1, 1)
            embedding = embedding.where(rows, 0)
            made.append(embedding)
            after = model(embedding, cache, lengths).where(rows, hidden)
        yield Thought(hidden, embedding, running, finite(after, model.name))
        hidden = after


def _checked(parameter: str, returned: Any, like: Tensor) -> Tensor:
    """Return `returned`, a result of the callable `parameter` or the parameter itself.

    Raises ValueError if it does not have the dtype and the shape of `like`.
    """
    found, expected = (
        f"{getattr(x, 'dtype', type(x))} of shape {tuple(getattr(x, 'shape', ()))}"
        for x in (returned, like)
    )
    if found != expected:
        raise ParameterError(parameter, f"found {found}, expected {expected}")
    return returned  # type: ignore[no-any-return]
