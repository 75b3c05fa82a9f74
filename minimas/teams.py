"""Agents and teams as values: the two of the paper, and anybody's own from JSON.

Does not know: models, memories, how a team works.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import prompts
from .config import read_json


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
            raise ValueError(f"latent_steps: found {self.latent_steps}, expected 0 or more for agent {self.name!r}")


@dataclass(frozen=True)
class Team:
    """Agents in order, the last of which answers; `parallel`: those before it work side by side from empty memory."""

    agents: tuple[Agent, ...]
    parallel: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "agents", tuple(self.agents))
        if not self.agents:
            raise ValueError("team (--team): found no agents, expected at least one")

    @classmethod
    def from_json(cls, path: str | Path) -> "Team":
        """Read {"parallel": false, "agents": [{"name": …, "prompt": …}, …]}.

        Raises FileNotFoundError, or ValueError naming the file and field, what was found and what was expected.
        """
        return cls.from_dict(read_json(Path(path)), str(path))

    @classmethod
    def from_dict(cls, raw: Any, source: str) -> "Team":
        """Read a team from a parsed JSON object; `source` is named in errors."""
        if not isinstance(raw, dict) or not {"agents"} <= raw.keys() <= {"agents", "parallel"}:
            raise ValueError(f"{source}: found {raw!r:.80}, expected an object with agents, and parallel or not")
        if not isinstance(raw["agents"], list) or not raw["agents"]:
            raise ValueError(f"{source}: agents: found {raw['agents']!r:.80}, expected a list of at least one agent")
        if not isinstance(raw.get("parallel", False), bool):
            raise ValueError(f"{source}: parallel: found {raw['parallel']!r:.80}, expected true or false")
        types = {"name": str, "prompt": str, "system": str, "latent_steps": int, "writes": bool, "prefix": str}
        agents = []
        for i, fields in enumerate(raw["agents"]):
            where = f"{source}: agents[{i}]"
            if not isinstance(fields, dict) or not {"name", "prompt"} <= fields.keys():
                raise ValueError(f"{where}: found {fields!r:.80}, expected an object with name and prompt")
            for field, value in fields.items():
                wanted = types.get(field)
                if type(value) is not wanted and not (value is None and field in ("system", "latent_steps")):
                    expected = f"type {wanted.__name__}" if wanted else f"one of the fields {', '.join(types)}"
                    raise ValueError(f"{where}: {field}: found {value!r:.80}, expected {expected}")
            try:
                agents.append(Agent(**fields))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        return cls(tuple(agents), raw.get("parallel", False))


def sequential() -> Team:
    """Planner → critic → refiner → judger, each on the memory of all before it (paper, figure 2 left)."""
    return Team(tuple(Agent(name, prompt) for name, prompt in prompts.SEQUENTIAL.items()))


def hierarchical(chained: bool = False) -> Team:
    """Three experts, then a summarizer with all three memories (paper, figure 2 right).

    The experts work side by side and do not see each other; `chained` runs them one after the other on one memory, as
    the authors' repository does (LatentMAS #32).
    """
    return Team(tuple(Agent(name, prompt) for name, prompt in prompts.HIERARCHICAL.items()), parallel=not chained)


TEAMS: dict[str, Callable[[], Team]] = {"sequential": sequential, "hierarchical": hierarchical}
