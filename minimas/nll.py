"""The gold NLL: the loss of a given text under the last agent, after its prompt and KV cache.

It needs no decoding and gives one number per question. It tells two settings apart on 24 questions,
where the share of right answers needs 200. Above all it rewards copying: a cache that holds the
words of the solution lowers the loss, whether the model understands them or not.

This file does not depend on settings, files or grading.

    B questions   T tokens   D hidden   V vocabulary
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .core.cache import KVCache
from .text.tokenizer import PromptText
from .turns import Run


class Loss(NamedTuple):
    """The loss of one text: the sum of −log p over its tokens, in nats, and their number."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Return the loss per token."""
        return self.total / self.tokens


def losses_after(run: Run, hidden: Tensor, cache: KVCache, texts: Sequence[str]) -> list[Loss]:
    """Return the loss of one text per question, as an output of the last agent.

    `hidden` (B, 1, D) is the last state of the last agent's prompt, and `cache` the KV cache after
    it, which does not change. Raises ValueError naming the question whose text has no token or
    exceeds the context.
    """
    model = run.lm.model
    # The whole text is untrusted: a control token in a solution stays text.
    ids = [run.tokenizer.encode_turn(PromptText.from_user(text)) for text in texts]
    for q, row in enumerate(ids):
        needed = cache.lengths[q] + len(row)
        if not row or needed > model.config.max_position_embeddings:
            raise ValueError(
                f"question {q + 1}: found {needed} slots with a solution of {len(row)} tokens, "
                f"expected at most {model.config.max_position_embeddings} (the context), and a "
                "solution of 1 token or more"
            )
    losses = []
    for q, row in enumerate(ids):
        # One text at a time: the logits of all texts, (B, T, V), would take gigabytes.
        states = hidden[q : q + 1]  # (1, 1, D)
        if len(row) > 1:  # the last token predicts nothing
            fed = torch.tensor([row[:-1]], device=model.device)  # (1, T - 1)
            later = model(model.embed(fed), cache.select([q]))
            states = torch.cat([states, later], 1)  # (1, T, D)
        logits = model.logits(states)[0]  # (T, V)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(wide, torch.tensor(row, device=wide.device), reduction="sum")
        losses.append(Loss(float(total), len(row)))
    return losses
