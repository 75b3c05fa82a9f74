"""Agents and teams as data: the two teams of the paper, and a user's own teams from JSON.

This file does not depend on models or on methods.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from . import prompts
from .core.config import read_json
from .core.errors import ParameterError

LAYOUTS = ("turn", "chat")
EXPECTED = {  # by the type of a field
    bool: "true or false",
    str: "text",
    str | None: "text",
    int | None: "a whole number, 0 or more",
}


def require_types(made: Any) -> None:
    """Raise ValueError naming a field that has another type, or a number below 0."""
    for field, hint in get_type_hints(type(made)).items():
        value = getattr(made, field)
        is_flag = type(value) is bool  # bool is a subclass of int
        wrong = hint in EXPECTED and (not isinstance(value, hint) or is_flag != (hint is bool))
        if wrong or (type(value) is int and value < 0):
            raise ValueError(f"{field}: found {value!r:.80}, expected {EXPECTED[hint]}")


@dataclass(frozen=True)
class Agent:
    """One role in a team.

    `prompt` is the user message, or in layout "turn" a paragraph of it. `{question}`, `{form}` and
    `{context}` (empty in `latent_mas`) are filled in. `latent_steps` is the number of thoughts if
    the call gives none (None: that of the call's model folder).
    `writes` makes an agent other than the last one generate text into its KV cache before it hands
    over. `prefix` is text after the assistant header, such as "<think>\\n". `model` is a name in
    the call's `models` (None: the call's own model). The last agent always generates text, and
    thinks only if its own `latent_steps` is above 0. Raises ValueError naming a field of another
    type, or `latent_steps` below 0.
    """

    name: str
    prompt: str
    system: str | None = None
    latent_steps: int | None = None
    writes: bool = False
    prefix: str = ""
    model: str | None = None

    def __post_init__(self) -> None:
        require_types(self)


@dataclass(frozen=True)
class Team:
    """Agents in order; the last one answers.

    If `parallel`, all agents but the last one work side by side, each from an empty KV cache or
    from the call's `memory`. `layout` says where the prompts of `latent_mas` go in the
    conversation:

    - "chat": every agent has a chat turn, as in the paper. It is closed before the hand-over.
    - "turn": all agents share one user turn. Each adds a paragraph and its thoughts, and only the
      last agent opens an assistant turn. On the real models that were measured, thoughts do less
      harm in this layout (docs/results.md).

    `opening` is the text with which every agent's prompt begins; it may hold `{question}`. In
    layout "turn" it comes at the start of the user turn, and again before the last agent's
    paragraph. Raises ValueError naming a field of another type, or the field of an agent that the
    layout does not allow.
    """

    agents: tuple[Agent, ...]
    parallel: bool = False
    layout: str = "chat"
    opening: str = ""

    def __post_init__(self) -> None:
        agents = [self.agents] if isinstance(self.agents, Agent) else self.agents
        object.__setattr__(self, "agents", tuple(agents))
        if {*map(type, self.agents)} != {Agent}:
            raise ParameterError(
                "team", f"found {self.agents or 'no agents'!s:.80}, expected at least one Agent"
            )
        if self.layout not in LAYOUTS:
            raise ParameterError(
                "layout", f"found {self.layout!r}, expected one of {', '.join(LAYOUTS)}"
            )
        require_types(self)
        if self.layout == "turn":
            # One user turn has one system message, and no assistant turn before the last agent's.
            needed = {"writes": False, "prefix": "", "system": self.agents[-1].system}
            for agent in self.agents[:-1]:
                for field, value in needed.items():
                    found = getattr(agent, field)
                    if found != value:
                        raise ParameterError(
                            "layout",
                            f"found 'turn' with agent {agent.name!r}, {field}: found "
                            f"{json.dumps(found):.40}, expected 'chat', or {field}: "
                            f"{json.dumps(value):.40}, as all agents share one user turn",
                        )

    def with_layout(self, layout: str | None) -> "Team":
        """Return the same team in another layout; None keeps the team's own.

        Raises ValueError if the layout does not allow a field of an agent.
        """
        return self if layout is None else replace(self, layout=layout)

    def require_question(self) -> None:
        """Raise ValueError if no agent sees the question, for example after a typo: {Question}."""
        if "{question}" not in "".join([self.opening, *(agent.prompt for agent in self.agents)]):
            raise ParameterError(
                "team", "found no agent who sees the question, expected {question} in a prompt"
            )

    @classmethod
    def from_json(cls, path: str | Path) -> "Team":
        """Read a file such as {"parallel": false, "agents": [{"name": …, "prompt": …}, …]}.

        Raises FileNotFoundError, or ValueError naming the file and the field.
        """
        return cls.from_dict(read_json(Path(path)), str(path))

    @classmethod
    def from_dict(cls, raw: Any, source: str) -> "Team":
        """Read a team from a parsed JSON object.

        Raises ValueError naming `source` and the field.
        """
        if not isinstance(raw, dict) or not isinstance(raw.get("agents"), list):
            raise ValueError(f"{source}: found {raw!r:.80}, expected an object with an agents list")
        agents = [
            _build(Agent, fields, f"{source}: agents[{i}]")
            for i, fields in enumerate(raw["agents"])
        ]
        return _build(cls, raw | {"agents": agents}, source)  # type: ignore[no-any-return]


def sequential() -> Team:
    """Return planner → critic → refiner → judger (paper, figure 2 left).

    Each agent works on the KV cache of all agents before it.
    """
    return _built_in(prompts.SEQUENTIAL)


def hierarchical(chained: bool = False) -> Team:
    """Return three experts and a summarizer that gets all their KV caches (paper, figure 2 right).

    The experts work side by side and do not see each other. `chained` makes them work one after the
    other on one KV cache, as in the authors' code (its issue 32).
    """
    return _built_in(prompts.HIERARCHICAL, parallel=not chained)


def _built_in(texts: dict[str, str], parallel: bool = False) -> Team:
    agents = tuple(Agent(name, prompt) for name, prompt in texts.items())
    return Team(agents, parallel, "turn", prompts.OPENING)


TEAMS = {"sequential": sequential(), "hierarchical": hierarchical()}
# The one agent of `single`, with the opening and answer form of the other teams
SINGLE = Team((Agent("single", prompts.SINGLE),), opening=prompts.OPENING)


def _build(kind: type[Any], raw: Any, where: str) -> Any:
    """Return an agent or team with the fields `raw`. Raises ValueError naming `where` and field."""
    try:
        made = kind(**raw)
        if kind is Team:
            made.require_question()
        return made
    except TypeError as error:  # a field is missing or unknown
        raise ValueError(
            f"{where}: found {raw!r:.80}, "
            f"expected an object of {', '.join(get_type_hints(kind))} ({error})"
        ) from error
    except ValueError as error:  # a type, the layout, or a field that the layout does not allow
        raise ValueError(f"{where}: {error}") from error
