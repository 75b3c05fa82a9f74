"""Gold NLL: what a text costs the last agent, teacher-forced behind its turn and the memory it was given.

No decoding, paired and continuous: it tells arms apart on 24 questions that accuracy cannot on 200. It rewards copying
above all: a memory that holds the words of the solution lowers it, whether or not anything was understood.

Does not know: arms, files, what is right.  R texts   T tokens   D hidden   V vocabulary
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minimas.agents import Briefing
from minimas.tokenizer import Turn


class Loss(NamedTuple):
    """Of one text: the sum of −log p over its tokens, and how many they are."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.total / self.tokens


def losses(briefing: Briefing, texts: Sequence[Sequence[str]]) -> list[list[Loss]]:
    """For each question's texts the loss of each, as what the last agent would write; the briefing is used up.

    Raises ValueError naming the question whose text has no token or does not fit into the context.
    """
    run, model = briefing.run, briefing.run.lm.model
    if len(texts) != len(run.questions) or not all(texts):
        raise ValueError(f"texts: found {len(texts)} lists, expected one for each of {len(run.questions)} questions")
    rows = [q for q, several in enumerate(texts) for _ in several]
    # As a turn of nothing but untrusted text: a control token in a solution stays text.
    ids = [run.tokenizer.encode_turn(Turn(text, ((0, len(text)),))) for several in texts for text in several]
    hidden, memory = briefing.read()
    for q, row in zip(rows, ids, strict=True):
        if not row:
            raise ValueError(f"question {q + 1}: found an empty solution, expected a text")
        if (needed := int(memory.lengths[q]) + len(row)) > (limit := model.config.max_position_embeddings):
            raise ValueError(f"question {q + 1}: found {needed} slots with the solution, expected {limit} at most")
    if rows != list(range(len(run.questions))):
        memory, hidden = memory.select(rows), hidden[rows]
    width = max(map(len, ids))
    states = hidden  # (R, 1, D): what predicts the first token
    if width > 1:
        fed = torch.tensor([[*row[:-1], *[0] * (width - len(row))] for row in ids], device=model.device)
        counts = torch.tensor([len(row) - 1 for row in ids])
        states = torch.cat([hidden, model(model.embed(fed), memory, counts)], 1)  # (R, T, D)
    found = iter([_loss(model.logits(states[r : r + 1, : len(row)])[0], row) for r, row in enumerate(ids)])
    return [[next(found) for _ in several] for several in texts]


def _loss(logits: Tensor, row: list[int]) -> Loss:
    """One text at a time: the logits of all of them, (R, T, V), would be gigabytes."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # (T, V)
    chosen = wide.gather(1, torch.tensor(row, device=wide.device)[:, None])
    return Loss(-float(chosen.double().sum()), len(row))
