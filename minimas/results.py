"""What a team reports: the usage of each agent, the result of each question, and events."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

from .core.cache import KVCache
from .core.rollout import Thought as Thought


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
        """Return the sum of several usages; `memory_bytes` is their maximum."""
        total = cls()
        for entry in fields(Usage):
            setattr(total, entry.name, sum(getattr(usage, entry.name) for usage in usages))
        total.memory_bytes = max(usage.memory_bytes for usage in usages)
        return total


@dataclass
class AgentTrace(Usage):
    """What one agent did on one question.

    `prompt` is the text that was prefilled, `text` what the agent generated ("" if it did not).
    Text of the question or of another agent that looks like a control token was prefilled as
    ordinary text.
    """

    name: str = ""
    prompt: str = ""
    text: str = ""


@dataclass
class Result:
    """The result for one question: the last agent's `text`, and the `answer` in it or None.

    `memory` is the KV cache after the answer (one row), if the call had `keep_memory`.
    """

    question: str
    text: str
    answer: str | None
    finish_reason: str  # "stop", "length" or "interrupted"
    agents: list[AgentTrace]
    memory: KVCache | None = field(default=None, repr=False, compare=False)

    @property
    def usage(self) -> Usage:
        """Return the total usage of all agents."""
        return Usage.total(self.agents)


class AgentStart(NamedTuple):
    """An agent starts. `prompt_tokens` is a sum over all rows, `latent_steps` the limit per row.

    Agents that work side by side share their events; `agent` then names all of them.
    """

    agent: str
    prompt_tokens: int
    latent_steps: int


class Piece(NamedTuple):
    """An agent has generated a token. `text` is new text, or "" while a character is unfinished.

    `final` is True for the agent that answers.
    """

    question: int  # its index in the call
    text: str
    final: bool


class AgentEnd(NamedTuple):
    """An agent is done. There is one trace, and one row of `memory`, per agent and question.

    `memory` is the KV cache itself, which later turns change: `fork` it to keep it. If the agent
    does not hand it over, the last generated tokens may be missing from it.
    """

    agent: str
    traces: list[AgentTrace]
    memory: KVCache


Event = AgentStart | Thought | Piece | AgentEnd
OnEvent = Callable[[Event], Any]
T = TypeVar("T")
Events = Generator[Event, None, T]  # yields events and returns a T


def run_to_end(events: Events[T], on_event: OnEvent | None = None) -> T:
    """Run a generator of events to its end, calling `on_event` with each. Returns its result."""
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if on_event is not None:
            on_event(event)
