"""Gold NLL: the loss of a given text under the last agent, teacher-forced after its prompt and its KV cache.

It needs no decoding, and it is paired and continuous: it tells two settings apart on 24 questions where accuracy needs
200. It rewards copying above all: a cache that holds the words of the solution lowers it, understood or not.

Does not know: arms, files, what is right.  R texts   T tokens   D hidden   V vocabulary
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .agents import LastTurn
from .core.cache import KVCache
from .core.model import Qwen3
from .text.tokenizer import Turn
from .turns import Run, prefill_prompts


class Loss(NamedTuple):
    """Of one text: the sum of −log p over its tokens, and how many they are."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.total / self.tokens


def losses(last: LastTurn, texts: Sequence[Sequence[str]]) -> list[list[Loss]]:
    """For each question's texts the loss of each, as what the last agent would write; the briefing is used up.

    Raises ValueError naming the question whose text has no token or does not fit into the context.
    """
    hidden, memory = last.prefill()
    return losses_after(last.run, hidden, memory, texts)


def losses_after(
    run: Run, hidden: Tensor, memory: KVCache, texts: Sequence[Sequence[str]]
) -> list[list[Loss]]:
    """The same after what a briefing has read: states (B, 1, D), and the KV cache, which stays as it is."""
    model = run.lm.model
    if len(texts) != len(run.questions) or not all(texts):
        raise ValueError(
            f"texts: found {len(texts)} lists, expected one for each of {len(run.questions)} questions"
        )
    # As a turn of nothing but untrusted text: a control token in a solution stays text.
    ids = [
        [run.tokenizer.encode_turn(Turn(text, ((0, len(text)),))) for text in several]
        for several in texts
    ]
    for q, several in enumerate(ids):
        if not all(several):
            raise ValueError(f"question {q + 1}: found an empty solution, expected a text")
        needed, limit = (
            int(memory.lengths[q]) + max(map(len, several)),
            model.config.max_position_embeddings,
        )
        if needed > limit:
            found_slots = (
                f"found {needed} slots with the solution, expected {limit} or fewer, the context"
            )
            raise ValueError(f"question {q + 1}: {found_slots}")
    found: list[list[Loss]] = [[] for _ in ids]
    # The questions' first texts together, then their second ones: a solution beside its short options would pad them.
    for column in range(max(map(len, ids))):
        rows = [q for q, several in enumerate(ids) if len(several) > column]
        fed = [ids[q][column] for q in rows]
        for q, loss in zip(
            rows, _together(model, hidden[rows], memory.select(rows), fed), strict=True
        ):
            found[q].append(loss)
    return found


def _together(model: Qwen3, hidden: Tensor, memory: KVCache, ids: list[list[int]]) -> list[Loss]:
    """One text for each row of a memory, which is used up; `hidden` (R, 1, D) predicts the first tokens."""
    width, states = max(map(len, ids)), hidden
    if width > 1:
        fed = torch.tensor(
            [[*row[:-1], *[0] * (width - len(row))] for row in ids], device=model.device
        )
        counts = torch.tensor([len(row) - 1 for row in ids])
        states = torch.cat([hidden, model(model.embed(fed), memory, counts)], 1)  # (R, T, D)
    return [_loss(model.logits(states[r : r + 1, : len(row)])[0], row) for r, row in enumerate(ids)]


def _loss(logits: Tensor, row: list[int]) -> Loss:
    """One text at a time: the logits of all of them, (R, T, V), would be gigabytes."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # (T, V)
    chosen = wide.gather(1, torch.tensor(row, device=wide.device)[:, None])
    return Loss(-float(chosen.double().sum()), len(row))


class PrefillOnce:
    """Prefill prompts into an empty KV cache once for several runs, as `LatentRun(prefill=)`.

    Runs with the same questions and another map or number of thoughts begin with equal prompts.
    Only the clock can tell the difference.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, ...], ...], tuple[Tensor, KVCache]] = {}

    def __call__(
        self, model: Qwen3, ids: list[list[int]], cache: KVCache
    ) -> tuple[Tensor, KVCache]:
        """Return each row's last state (R, 1, D) and the KV cache to continue from."""
        if any(cache.lengths):
            return prefill_prompts(model, ids, cache)
        key = tuple(map(tuple, ids))
        if key not in self._kept:
            self._kept[key] = prefill_prompts(model, ids, cache)
        hidden, kept = self._kept[key]
        return hidden, kept.fork()
