"""What a team reports: each agent's bill, each question's result, what happens on the way. Does not know: printing."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from .core.cache import KVCache


@dataclass
class Usage:
    """The bill: tokens read, thought and written, seconds (this question's share of its batch's, so that sums over
    questions are wall time), and the largest memory in bytes.
    """

    prompt_tokens: int = 0
    latent_steps: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0

    @classmethod
    def total(cls, usages: Sequence["Usage"]) -> "Usage":
        """Several bills added up; memory is the largest of them."""
        total = cls(
            *(
                sum(getattr(usage, field.name) for usage in usages)
                for field in dataclasses.fields(Usage)
            )
        )
        return dataclasses.replace(total, memory_bytes=max(usage.memory_bytes for usage in usages))


@dataclass
class AgentTrace(Usage):
    """What one agent did on one question. `prompt` is its turn as read, `text` what it wrote ("" if it did not)."""

    name: str = ""
    prompt: str = ""
    text: str = ""


@dataclass
class Result:
    """The outcome of one question: `text` as the last agent wrote it, `answer` as extracted from it, or None."""

    question: str
    text: str
    answer: str | None
    finish_reason: str  # "stop" | "length"
    agents: list[AgentTrace]

    @property
    def usage(self) -> Usage:
        """The agents' bills added up."""
        return Usage.total(self.agents)


class Watcher:
    """Told what happens while a team works; override what you want to see. `question` counts from 0 in the call."""

    def begin(self, agent: str, reads: int, thinks: int) -> None:
        """An agent starts: how many tokens it will read, and how many thoughts it will think."""

    def thought(self) -> None:
        """One latent step begins."""

    def text(self, question: int, piece: str) -> None:
        """The last agent wrote a piece of text."""

    def memory(self, memory: KVCache) -> None:
        """An agent's turn is over, and this is its memory, a row for each trace of `end`: to look at, not to keep.

        Of an agent who hands no memory over, the last tokens that it generated may be missing.
        """

    def end(self, traces: Sequence[AgentTrace]) -> None:
        """An agent is done, one trace per question."""
