"""The gold NLL: the loss of a given text under the last agent, after its prompt and KV cache.

It needs no decoding, and it is a number for each question. It tells two settings apart on 24
questions where the share of right answers needs 200. Above all it rewards copying: a cache that
holds the words of the solution lowers it, whether the model understands them or not.

Does not know: arms, files, what is right.

    R texts   T tokens   D hidden   V vocabulary
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .core.cache import KVCache
from .core.model import Qwen3
from .text.tokenizer import Turn
from .turns import Run


class Loss(NamedTuple):
    """The loss of one text: the sum of −log p over its tokens, in nats, and their number."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Return the loss per token."""
        return self.total / self.tokens


def losses_after(
    run: Run, hidden: Tensor, cache: KVCache, texts: Sequence[Sequence[str]]
) -> list[list[Loss]]:
    """Return the loss of each of a question's texts, as what the last agent would generate.

    `texts` has a list for each question, which is not empty. `hidden` (B, 1, D) is the last state
    of the last agent's prompt, and `cache` the KV cache after it, which is left as it is.
    Raises ValueError naming the question whose text has no token or exceeds the context.
    """
    model = run.lm.model
    limit = model.config.max_position_embeddings
    found: list[list[Loss]] = [[] for _ in texts]
    ids = []
    for q, own in enumerate(texts):
        # All of a text is untrusted: a control token in a solution stays text.
        ids.append([run.tokenizer.encode_turn(Turn(text, ((0, len(text)),))) for text in own])
        if not all(ids[q]):
            raise ValueError(f"question {q + 1}: found an empty solution, expected a text")
        needed = int(cache.lengths[q]) + max(map(len, ids[q]))
        if needed > limit:
            expected = f"expected {limit} or fewer, the context"
            raise ValueError(
                f"question {q + 1}: found {needed} slots with the solution, {expected}"
            )
    # All first texts are one batch, then all second ones: short options would be padded otherwise.
    for column in zip_longest(*ids):
        rows = [q for q, text in enumerate(column) if text]
        chosen = [column[q] for q in rows]
        batch = _batch_losses(model, hidden[rows], cache.select(rows), chosen)
        for q, loss in zip(rows, batch, strict=True):
            found[q].append(loss)
    return found


def _batch_losses(model: Qwen3, hidden: Tensor, cache: KVCache, ids: list[list[int]]) -> list[Loss]:
    """Return the loss of one text per row. `hidden` (R, 1, D) predicts the first tokens."""
    counts = [len(row) - 1 for row in ids]  # the last token predicts nothing
    width = max(counts)
    if width:
        fed = [row[:-1] + [0] * (width - n) for row, n in zip(ids, counts, strict=True)]
        embeds = model.embed(torch.tensor(fed, device=model.device))
        hidden = torch.cat([hidden, model(embeds, cache, counts)], 1)  # (R, T, D)
    losses = []
    for r, row in enumerate(ids):
        # Text by text: the logits of all of them, (R, T, V), would take gigabytes.
        logits = model.logits(hidden[r : r + 1, : len(row)])[0]  # (T, V)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        each = F.cross_entropy(wide, torch.tensor(row, device=wide.device), reduction="none")
        losses.append(Loss(float(each.double().sum()), len(row)))
    return losses
