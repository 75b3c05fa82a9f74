"""What a claim is measured on: a model, questions with answers, and their number.

This module does not depend on claims, pictures or the files that are written.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minimas import LM, Sampling, Team, load
from minimas.answers import extract
from minimas.check import ASKED, SOLUTIONS
from minimas.load import text_tokenizer
from tools.evaluation.arms import Arm
from tools.evaluation.bench import Bench
from tools.evaluation.grading import plain_grader
from tools.evaluation.rows import Row, kind_of, read_rows
from tools.evaluation.tasks import tiny_rows
from tools.training.tiny_task import PROMPTS

Record = dict[str, Any]
HOLDS, FAILS, NOT_SHOWN = "holds here", "does not hold here", "not shown here"


@dataclass
class Finding:
    """What was found about one claim: a sentence, a verdict, and all figures as JSON values."""

    sentence: str
    verdict: str
    figures: dict[str, Any]


@dataclass
class Setting:
    """The model and the options of the command line. `limit` None means each claim's own number.

    Raises OSError or ValueError when the model or the data is first used.
    """

    model: str
    data: Path | None = None
    limit: int | None = None
    batch_size: int = 50
    max_new_tokens: int | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"

    @cached_property
    def lm(self) -> LM:
        """Load the model, which needs a tokenizer."""
        lm = load(self.model, device=self.device, dtype=self.dtype)
        text_tokenizer(lm)
        return lm

    @cached_property
    def wide(self) -> LM:
        """Load the model in float64."""
        return load(self.model, device=self.device, dtype="float64")

    @property
    def name(self) -> str:
        """Return the model's name for sentences and pictures."""
        return "weights/tiny" if self.is_tiny else Path(self.model).name

    @cached_property
    def is_tiny(self) -> bool:
        """Return whether the model has the teams of the tiny task, so that the task suits it."""
        team = self.lm.teams.get("sequential")
        return team is not None and team.agents[0].prompt == PROMPTS["planner"]

    @cached_property
    def limit_of_tokens(self) -> int:
        """Return the largest number of generated tokens per answer."""
        return self.max_new_tokens or (24 if self.is_tiny else 256)

    @property
    def sampling(self) -> Sampling:
        """Greedy generation."""
        return Sampling(max_new_tokens=self.limit_of_tokens)

    def count(self, tiny: int, other: int) -> int:
        """Return how many questions a claim uses: --limit, or the claim's default."""
        return self.limit or (tiny if self.is_tiny else other)

    def rows(self, tiny: int, other: int) -> list[Row]:
        """Return questions from the data file, new ones of the tiny task, or built-in ones.

        All of them have the kind of the first one. There are six built-in questions.
        """
        count = self.count(tiny, other)
        if self.data is None:
            return (tiny_rows if self.is_tiny else built_in_rows)(count, self.seed)
        found = read_rows(self.data)
        return [row for row in found if kind_of(row) == kind_of(found[0])][:count]

    def steps(self, most: int = 10) -> int:
        """Return the thoughts per agent: the model's default, limited to `most`.

        There is no limit on weights/tiny. The result is at least 1.
        """
        own = self.lm.default_steps
        return max(1, own if self.is_tiny else min(most, own))

    def bench(self, rows: Sequence[Row], lm: LM | None = None) -> Bench:
        """Return a bench that runs arms on `rows` with a model (None: this setting's model)."""
        return Bench(lm or self.lm, rows, self.batch_size, self.sampling, plain_grader)

    def settings(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        given = asdict(self) | {"data": None if self.data is None else self.data.name}
        return given | {"torch": torch.__version__, "threads": torch.get_num_threads()}


def first_and_last(team: Team) -> Team:
    """Return a team of only the first and the last agent of a team."""
    return Team((team.agents[0], team.agents[-1]), False, team.layout, team.opening)


def run_arms(bench: Bench, arms: Sequence[Arm], warm_up: bool = False) -> list[Record]:
    """Run all arms batch by batch, so that a slow minute affects them alike. Returns the records.

    The order of the arms changes from batch to batch. With `warm_up`, each arm first runs the first
    batch once, without keeping its records.
    """
    records: list[Record] = []
    for arm in arms if warm_up else ():
        bench.compute(0, arm, 0)
    for batch in range(len(bench.batches)):
        first = batch % len(arms)
        for arm in [*arms[first:], *arms[:first]]:
            for record in bench.compute(batch, arm, 0):
                records.append(record | {"model": bench.lm.model.name})
        print(f"claims: batch {batch + 1} of {len(bench.batches)}", file=sys.stderr)
    return records


def values(records: Sequence[Record], field: str, **settings: Any) -> dict[tuple[str, int], float]:
    """Return (question, seed) -> value of the records with these settings, in the data's order."""
    chosen = [r for r in records if all(r[name] == value for name, value in settings.items())]
    return {(r["id"], r["seed"]): float(r[field]) for r in chosen if r[field] is not None}


def built_in_rows(count: int, seed: int) -> list[Row]:
    """Return at most six questions, those of `minimas check`. `seed` has no effect."""
    pairs = zip(ASKED[:count], SOLUTIONS[:count], strict=True)
    return [
        {"id": f"check-{i}", "question": question, "solution": solution, "kind": "math"}
        | {"answer": extract("math", solution)}
        for i, (question, solution) in enumerate(pairs)
    ]
