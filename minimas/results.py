"""What a team reports: each agent's usage, each question's result, and what happens on the way.

This file does not know printing.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from .core.cache import KVCache


@dataclass
class Usage:
    """Tokens, seconds and bytes of one agent on one question.

    `seconds` is this question's share of its batch's time, so that sums over questions are wall
    time. `memory_bytes` is the size of the KV cache at its largest.
    """

    prompt_tokens: int = 0
    latent_steps: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0

    @classmethod
    def total(cls, usages: Sequence["Usage"]) -> "Usage":
        """Return the sum of several usages; `memory_bytes` is that of the largest."""
        names = [field.name for field in dataclasses.fields(Usage)]
        total = cls(*(sum(getattr(usage, name) for usage in usages) for name in names))
        total.memory_bytes = max(usage.memory_bytes for usage in usages)
        return total


@dataclass
class AgentTrace(Usage):
    """What one agent did on one question.

    `prompt` is the text that was prefilled, `text` what the agent generated ("" if it did not).
    """

    name: str = ""
    prompt: str = ""
    text: str = ""


@dataclass
class Result:
    """The outcome of one question: the last agent's `text`, and the `answer` in it, or None."""

    question: str
    text: str
    answer: str | None
    finish_reason: str  # "stop" | "length"
    agents: list[AgentTrace]

    @property
    def usage(self) -> Usage:
        """Return the agents' usage in total."""
        return Usage.total(self.agents)


class Watcher:
    """Is told what happens while a team works; override the methods of interest.

    `question` is the number of the question in the call, from 0.
    """

    def begin(self, agent: str, reads: int, thinks: int) -> None:
        """An agent starts, with `reads` prompt tokens and `thinks` latent steps to do."""

    def thought(self) -> None:
        """One latent step begins."""

    def generated(self) -> None:
        """An agent has generated one token."""

    def text(self, question: int, piece: str) -> None:
        """The last agent has generated a piece of text."""

    def memory(self, memory: KVCache) -> None:
        """An agent's turn is over, with this KV cache, one row per trace of `end`; do not keep it.

        The last generated tokens may be missing if the agent does not hand its KV cache over.
        """

    def end(self, traces: Sequence[AgentTrace]) -> None:
        """An agent is done; there is one trace per question."""
