"""Add thoughts and attention to the records of a batch, for --lens.

Each agent of a record gets two more fields:

    thoughts     one object per thought: the likeliest tokens and their probabilities, entropy,
                 norm, and cosines, as in `minimas.lens.ThoughtView`
    attention    part of the agent's turn ("prompt", "thoughts", "text") -> the share of the last
                 agent's attention, as a list of layers, each a list of key-value heads

The attention is a mean over the tokens of the last agent's prompt and of the text after it, which
is the generated text or, for the metric nll, the gold solution. The remaining attention, up to 1,
goes to the last agent's own turn. Numbers have four significant digits. If no agent has latent
steps, nothing is added. This module does not use arms or result files.

    S slots   K key-value heads
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minimas import KVCache
from minimas.lens import Lens, ThoughtView
from minimas.text.tokenizer import PromptText

from .attention import attention_weights
from .last_turn import LastTurn

MAX_TOKENS = 512  # limit of the text after the last prompt; RAM grows with tokens × slots
Record = dict[str, Any]


class Look:
    """Collects thoughts and attention in one call of a method.

    It is made before the last agent's turn. If `lens` is None, it does nothing.
    """

    def __init__(self, last: LastTurn, lens: Lens | None) -> None:
        self.last, self.lens = last, lens
        thought = lens is not None and any(thoughts for _, thoughts in lens.seen)
        # The last agent's turn appends to the KV cache, so a copy is kept.
        self.memory = last.memory.fork() if thought else None

    def add_to(self, records: Sequence[Record], texts: Sequence[str]) -> None:
        """Add thoughts and attention to the agents in the record of each question.

        `texts` are the texts after the last agent's prompts. The states that the lens has kept are
        removed from it.
        """
        if self.lens is None:
            return
        for q, (record, text) in enumerate(zip(records, texts, strict=True)):
            seen = self.lens.seen[q :: len(records)]
            for agent, (_, thoughts) in zip(record["agents"], seen, strict=False):
                if thoughts:
                    agent["thoughts"] = [plain(thought) for thought in thoughts]
            self._add_attention(record["agents"], text, q)
        self.lens.seen.clear()

    def _add_attention(self, agents: Sequence[Record], text: str, q: int) -> None:
        if self.memory is None or not (parts := self.last.parts(q)):
            return
        weights = attention_by_head(self.last, self.memory, text, q, MAX_TOKENS)  # (layers, K, S)
        for number, what, start, end in parts:
            shares = weights[:, :, start:end].sum(-1).tolist()
            rows = [[rounded(share) for share in layer] for layer in shares]
            agents[number].setdefault("attention", {})[what] = rows


def attention_by_head(
    last: LastTurn, memory: KVCache, text: str, question: int = 0, limit: int | None = None
) -> Tensor:
    """Return the attention of the last agent on each slot of one question, (layers, K, S).

    The prompt of the last agent and the first `limit` tokens of `text` (None: all) are prefilled.
    The weights are means over these tokens and over the query heads that share a key-value head.
    """
    encode = last.tokenizer.encode_turn
    ids = encode(last.prompts[question]) + encode(PromptText.from_user(text))[:limit]
    return attention_weights(last.model, ids, memory.select([question]))


def plain(thought: ThoughtView) -> Record:
    """Return a thought as JSON values, with rounded numbers."""
    fields = thought._asdict()
    made = {name: rounded(x) if isinstance(x, float) else x for name, x in fields.items()}
    return made | {"tokens": [[token, rounded(chance)] for token, chance in thought.tokens]}


def rounded(value: float) -> float:
    """Return a number rounded to four significant digits."""
    return float(f"{value:.4g}")
