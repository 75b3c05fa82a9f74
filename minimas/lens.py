"""See a thought: which tokens it stands for.

A latent thought is a vector. The LM head turns the hidden state that it was made from into
probabilities of the next token, as if the agent had generated one there (the logit lens), and its
embedding has a nearest token. A `Lens` is given to a method as `on_event`. It keeps the states and
computes once per agent, so that a run without one costs nothing. This file does not know printing.

    R rows   n thoughts   D hidden   V vocabulary
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .depth import entropy
from .load import LM, text_tokenizer
from .results import AgentEnd, AgentTrace, Event, Thought

CHUNK_ROWS = 1024  # of the embedding in float32: they stay in the cache of a processor


class ThoughtView(NamedTuple):
    """One thought of one row."""

    tokens: list[tuple[str, float]]  # the likeliest tokens and their probabilities
    entropy: float  # of all probabilities, in nats
    norm: float  # of the embedding that is fed
    cosine_before: float | None  # to the thought before it
    nearest: str  # the token whose embedding is nearest
    cosine_nearest: float


class Lens:
    """Collects the thoughts of a call in `seen`: one entry per agent and question.

    An entry is the agent's trace and its thoughts, in the order of the traces of the events
    `AgentEnd`. Of a call with B questions, the entries of question q are `seen[q::B]`.
    """

    def __init__(self, lm: LM, top: int = 3) -> None:
        """`top` is the number of tokens per thought."""
        self.tokenizer, self.top = text_tokenizer(lm), top
        self.seen: list[tuple[AgentTrace, list[ThoughtView]]] = []
        self._thoughts: list[Thought] = []

    def __call__(self, event: Event) -> None:
        """Keep what one event of a method tells."""
        if isinstance(event, Thought):
            self._thoughts.append(event)
        if isinstance(event, AgentEnd):
            model = event.memory.owner  # that of the agent
            self.seen += [
                (trace, self._views(row, model)) for row, trace in enumerate(event.traces)
            ]
            self._thoughts = []

    def _views(self, row: int, model: Any) -> list[ThoughtView]:
        """Return what one row's thoughts since the last agent's end say.

        The scores of all rows together, (R, n, V), would take gigabytes.
        """
        own = [thought for thought in self._thoughts if thought.running[row]]
        if not own:
            return []
        hidden = torch.cat([thought.hidden[row] for thought in own])  # (n, D)
        fed = torch.cat([thought.embedding[row] for thought in own]).float()  # (n, D)
        size = self.tokenizer.size  # rows of the embedding that no token has are not shown
        logits = model.logits(hidden[None])[0, :, :size].float()  # (n, V)
        chances, tokens = logits.softmax(-1).topk(min(self.top, size))
        entropies = entropy(logits)  # (n,)
        unit = F.normalize(fed)  # (n, D)
        before = [None, *(unit[1:] * unit[:-1]).sum(-1).tolist()]
        # In float32: a CPU without matrix units takes six times as long in bf16.
        table = model.model.embed_tokens.weight[:size].split(CHUNK_ROWS)
        scores = [unit @ F.normalize(rows.float()).T for rows in table]  # (n, CHUNK_ROWS) each
        cosines, nearest = torch.cat(scores, 1).max(-1)
        views = []
        for t, norm in enumerate(fed.norm(dim=-1).tolist()):
            ids = [[token] for token in (*tokens[t].tolist(), int(nearest[t]))]
            *names, near = self.tokenizer.backend.decode_batch(ids, skip_special_tokens=False)
            likely = list(zip(names, chances[t].tolist(), strict=True))
            numbers = float(entropies[t]), norm, before[t]
            views.append(ThoughtView(likely, *numbers, near, float(cosines[t])))
        return views
