"""Show which tokens a latent thought stands for.

A latent thought is a vector. The LM head turns the hidden state that it was made from into
probabilities of the next token, as if the agent had generated a token there (the logit lens). The
thought's embedding also has a nearest token. Pass a `Lens` to a method as `on_event`. It collects
the states and computes once per agent, so a run without a lens has no cost. This file does not
depend on printing.

    R rows   n thoughts   D hidden   V vocabulary
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .depth import entropy
from .load import LM, text_tokenizer
from .results import AgentEnd, AgentStart, AgentTrace, Event, Thought

CHUNK_ROWS = 1024  # embedding rows that are multiplied at a time: they stay in a CPU's cache


class ThoughtView(NamedTuple):
    """One thought of one row."""

    tokens: list[tuple[str, float]]  # the likeliest tokens and their probabilities
    entropy: float  # of the next token's distribution, in nats
    norm: float  # of the thought's embedding
    cosine_before: float | None  # between this embedding and the previous thought's
    nearest: str  # the token whose embedding is nearest
    cosine_nearest: float  # between this embedding and that token's


class Lens:
    """Collect the thoughts of a call in `seen`: one entry per agent and question.

    An entry is the agent's trace and its thoughts. Entries are in the order of the traces in the
    `AgentEnd` events, so in a call with B questions, those of question q are `seen[q::B]`.
    """

    def __init__(self, lm: LM, top: int = 3) -> None:
        """`top` is the number of likeliest tokens to show per thought."""
        self.tokenizer = text_tokenizer(lm)
        self.top = top
        self.seen: list[tuple[AgentTrace, list[ThoughtView]]] = []
        self._thoughts: list[Thought] = []

    def __call__(self, event: Event) -> None:
        """Handle one event of a method."""
        if isinstance(event, AgentStart):  # an earlier call may have stopped before its end
            self._thoughts = []
        if isinstance(event, Thought):
            self._thoughts.append(event)
        if isinstance(event, AgentEnd):
            # The owner of the KV cache is the agent's model.
            self.seen += [
                (trace, self._views(row, event.memory.owner))
                for row, trace in enumerate(event.traces)
            ]

    def _views(self, row: int, model: Any) -> list[ThoughtView]:
        """Return the views of one row's thoughts since the previous agent's end.

        One row at a time, because the logits of all rows, (R, n, V), would take gigabytes.
        """
        own = [thought for thought in self._thoughts if thought.running[row]]
        if not own:
            return []
        hidden = torch.cat([thought.hidden[row] for thought in own])  # (n, D)
        fed = torch.cat([thought.embedding[row] for thought in own]).float()  # (n, D)
        size = self.tokenizer.size  # embedding rows without a token are not shown
        logits = model.logits(hidden[None])[0, :, :size].float()  # (n, V)
        chances, tokens = logits.softmax(-1).topk(min(self.top, size))
        entropies = entropy(logits)  # (n,)
        unit = F.normalize(fed)  # (n, D)
        to_previous = [None, *(unit[1:] * unit[:-1]).sum(-1).tolist()]
        # In float32: a CPU without matrix units takes six times as long in bf16.
        scores = [  # (n, CHUNK_ROWS) each
            unit @ F.normalize(rows.float()).T
            for rows in model.model.embed_tokens.weight[:size].split(CHUNK_ROWS)
        ]
        cosines, nearest = torch.cat(scores, 1).max(-1)
        views = []
        for t, norm in enumerate(fed.norm(dim=-1).tolist()):
            ids = [[token] for token in (*tokens[t].tolist(), int(nearest[t]))]
            *names, near = self.tokenizer.backend.decode_batch(ids, skip_special_tokens=False)
            likely = list(zip(names, chances[t].tolist(), strict=True))
            views.append(
                ThoughtView(
                    likely, float(entropies[t]), norm, to_previous[t], near, float(cosines[t])
                )
            )
        return views
