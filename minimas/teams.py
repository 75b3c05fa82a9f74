"""Agents and teams as values: the paper's two, and anybody's own from JSON. Does not know: models, how a team works."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import prompts
from .core.config import read_json

LAYOUTS = ("turn", "chat")


@dataclass(frozen=True)
class Agent:
    """One role: `prompt` is the user's turn, with `{question}`, `{context}` and `{form}` filled in where they stand.

    `latent_steps` None: the method's or folder's number. `writes` lets an agent in mid-chain write text into its
    memory before it hands over. `prefix` is text put after the assistant header, such as "<think>\\n". The last agent
    of a team always writes, and thinks only if its own `latent_steps` says so.
    """

    name: str
    prompt: str
    system: str | None = None
    latent_steps: int | None = None
    writes: bool = False
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.latent_steps is not None and self.latent_steps < 0:
            raise ValueError(
                f"latent_steps: found {self.latent_steps}, expected 0 or more for agent {self.name!r}"
            )


@dataclass(frozen=True)
class Team:
    """Agents in order, the last of which answers.

    `parallel`: the agents before the last work side by side, each from an empty KV cache. `layout` says where the
    prompts of `latent_mas` stand in the conversation:

    - "chat": every agent has a chat turn of its own, which is closed before the hand-over (the paper's form).
    - "turn": all agents share one user turn. Each adds a paragraph and its thoughts, and only the last agent opens an
      assistant turn. On real models answers survive this layout and not the other one (docs/results.md).

    `opening` is text that every agent's prompt begins with; {question} may stand there. In layout "turn" it stands at
    the start of the user turn, where every `transfer` keeps it, and again before the last agent's paragraph.
    """

    agents: tuple[Agent, ...]
    parallel: bool = False
    layout: str = "chat"
    opening: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "agents", tuple(self.agents))
        if not self.agents:
            raise ValueError("team (--team): found no agents, expected at least one")
        if self.layout not in LAYOUTS:
            raise ValueError(
                f"layout (--layout): found {self.layout!r}, expected one of {', '.join(LAYOUTS)}"
            )
        if self.layout == "turn":
            self._require_one_turn()

    def _require_one_turn(self) -> None:
        """Raise ValueError naming the agent and field that cannot be in a user turn shared by all agents."""
        *earlier, last = self.agents
        for agent in earlier:
            problem = {
                "writes": "writes: found true" if agent.writes else "",
                "prefix": f"prefix: found {agent.prefix!r:.40}" if agent.prefix else "",
            }
            for found in filter(None, problem.values()):
                raise ValueError(
                    f"layout (--layout): found 'turn' with agent {agent.name!r}, {found}, expected 'chat': before the "
                    "last agent there is no assistant turn"
                )
            if agent.system != last.system:
                raise ValueError(
                    f"layout (--layout): found 'turn' with the system message {agent.system!r:.40} of agent "
                    f"{agent.name!r} and {last.system!r:.40} of agent {last.name!r}, expected 'chat', or one system "
                    "message for all agents"
                )

    def with_layout(self, layout: str | None) -> "Team":
        """Return the same team in another layout; None keeps its own. Raises ValueError where that cannot work."""
        return self if layout is None else replace(self, layout=layout)

    @classmethod
    def from_json(cls, path: str | Path) -> "Team":
        """Read {"parallel": false, "agents": [{"name": …, "prompt": …}, …]}; errors name the file and the field."""
        return cls.from_dict(read_json(Path(path)), str(path))

    @classmethod
    def from_dict(cls, raw: Any, source: str) -> "Team":
        """Read a team from a parsed JSON object; `source` is named in errors."""
        _check(
            raw,
            {"parallel": bool, "agents": list, "layout": str, "opening": str},
            {"agents"},
            source,
        )
        types = {
            "name": str,
            "prompt": str,
            "system": str,
            "latent_steps": int,
            "writes": bool,
            "prefix": str,
        }
        for i, fields in enumerate(raw["agents"]):
            _check(fields, types, {"name", "prompt"}, f"{source}: agents[{i}]")
        agents = tuple(Agent(**fields) for fields in raw["agents"])
        try:
            return cls(agents, **{name: value for name, value in raw.items() if name != "agents"})
        except ValueError as error:  # a layout that is unknown, or that these agents cannot have
            raise ValueError(f"{source}: {error}") from error


def sequential() -> Team:
    """Planner → critic → refiner → judger, each on the KV cache of all before it (paper, figure 2 left)."""
    agents = tuple(Agent(name, prompt) for name, prompt in prompts.SEQUENTIAL.items())
    return Team(agents, layout="turn", opening=prompts.OPENING)


def hierarchical(chained: bool = False) -> Team:
    """Three experts who work side by side and do not see each other, then a summarizer with their memories (paper,
    figure 2 right). `chained` runs them one after the other on one memory, as the authors' code does (LatentMAS #32).
    """
    agents = tuple(Agent(name, prompt) for name, prompt in prompts.HIERARCHICAL.items())
    return Team(agents, parallel=not chained, layout="turn", opening=prompts.OPENING)


def single_agent() -> Team:
    """One agent, for `single`: the same question and the same form of the answer as the teams'."""
    return Team((Agent("single", prompts.SINGLE),), opening=prompts.OPENING)


EXPECTED = {
    int: "a whole number, 0 or more",
    list: "a list, not empty",
    str: "text",
    bool: "true or false",
}
TEAMS: dict[str, Callable[[], Team]] = {"sequential": sequential, "hierarchical": hierarchical}


def _check(raw: Any, types: Mapping[str, type], needed: set[str], where: str) -> None:
    """Raise ValueError unless `raw` is an object with all `needed` fields, and no field but those of `types`."""
    if not isinstance(raw, dict) or not needed <= raw.keys():
        raise ValueError(
            f"{where}: found {raw!r:.80}, expected an object with {' and '.join(sorted(needed))}"
        )
    for field, value in raw.items():
        wanted = types.get(field)
        wrong = type(value) is not wanted and not (
            value is None and field in ("system", "latent_steps")
        )
        if wrong or value == [] or (field == "latent_steps" and value is not None and value < 0):
            expected = EXPECTED[wanted] if wanted else f"one of the fields {', '.join(types)}"
            raise ValueError(f"{where}: {field}: found {value!r:.80}, expected {expected}")
