"""Measure the rows of the model card of weights/tiny, and write its figures.

Every row is measured through the public functions of minimas, on questions that are not in the
training data. The text of the card is written by hand in weights/tiny/README.md. The figures are
inserted between its HTML comments.
"""

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from minimas import LM, Result, Sampling, Team, latent_mas, load, single, text_mas

from .tiny_task import LATENT_STEPS, NO_QUESTION, split_stories, split_team, story

GREEDY = Sampling(temperature=0.0, max_new_tokens=24)
BATCH_SIZE = 250


class Arm(NamedTuple):
    """One row of the card: the method and its options, and the bar in per cent.

    The bar is the limit that the accuracy has to meet, `at_least` or `at_most`.
    """

    name: str
    method: Callable[..., list[Result]]
    options: dict[str, Any]
    at_least: int = 0
    at_most: int = 100
    operations: tuple[int, ...] = (3, 4, 5)
    split: bool = False  # each question has its own team, with one story per expert

    @property
    def bar(self) -> str:
        """Return the bar as text, empty if the row has none."""
        if self.at_least:
            return f"≥ {self.at_least}"
        return f"≤ {self.at_most}" if self.at_most < 100 else ""


def arms(lm: LM) -> list[Arm]:
    """Return all rows of the card. Rows without a bar are for information only."""
    team = lm.teams["sequential"]
    assert isinstance(team, Team)
    judger = team.agents[-1]
    pair = Team((team.agents[0], judger))
    unasked = replace(judger, prompt=judger.prompt.format(question=NO_QUESTION))
    blind = Team((*team.agents[:-1], unasked))
    chain, experts = {"team": "sequential"}, {"team": "hierarchical"}

    def latent(name: str, options: dict[str, Any], at_least: int = 0, at_most: int = 100) -> Arm:
        return Arm(name, latent_mas, options, at_least, at_most)

    return [
        Arm("single", single, {}, at_least=95),
        Arm("text_mas, sequential", text_mas, chain, at_least=95),
        Arm("text_mas, hierarchical", text_mas, experts, at_least=95),
        latent("latent_mas, sequential", chain, at_least=92),
        latent("thoughts only", {**chain, "transfer": "latents"}, at_least=90),
        latent("judger without the question", {"team": blind}, at_least=92),
        latent("planner and judger alone", {"team": pair}),
        latent("latent_mas, hierarchical", experts, at_least=92),
        latent("hierarchical, thoughts only", {**experts, "transfer": "latents"}),
        latent("no memory", {**chain, "transfer": "none"}, at_most=40),
        latent("another question's memory", {**chain, "transfer": "shuffled"}, at_most=15),
        latent("0 steps", {**chain, "latent_steps": 0}, at_most=40),
        latent("hierarchical, 0 steps", {**experts, "latent_steps": 0}),
        latent("identity map", {**chain, "align": "identity"}, at_most=35),
        latent("states fed back raw", {**chain, "align": "none"}, at_most=35),
        latent("random map", {**chain, "align": "random"}, at_most=35),
        latent("no memory, no question", {"team": blind, "transfer": "none"}, at_most=15),
        *(
            latent(f"{n} steps", {**chain, "latent_steps": n})
            for n in (1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 32)
        ),
        *six_operations(),
        *split_facts(),
    ]


def six_operations() -> list[Arm]:
    """Return the rows with the longest questions, of six operations."""
    chain = {"team": "sequential"}
    rows: dict[str, tuple[Callable[..., list[Result]], dict[str, Any]]] = {
        "single": (single, {}),
        "text_mas": (text_mas, chain),
        "latent_mas, 7 steps": (latent_mas, {**chain, "latent_steps": 7}),
        "no memory": (latent_mas, {**chain, "transfer": "none"}),
    }
    return [
        Arm(f"six operations: {name}", method, options, operations=(6,))
        for name, (method, options) in rows.items()
    ]


def split_facts() -> list[Arm]:
    """Return the rows in which each expert has a different story."""
    no_memory = {"transfer": "none"}
    return [
        Arm("split facts: text_mas", text_mas, {}, at_least=90, split=True),
        Arm("split facts: latent_mas", latent_mas, {}, at_least=90, split=True),
        Arm("split facts: thoughts only", latent_mas, {"transfer": "latents"}, split=True),
        Arm("split facts: 0 steps", latent_mas, {"latent_steps": 0}, split=True),
        Arm("split facts: no memory", latent_mas, no_memory, at_most=15, split=True),
    ]


def accuracy(lm: LM, arm: Arm, count: int) -> float:
    """Return the percentage of right answers to `count` new questions, with greedy decoding."""
    rng = random.Random("fresh")
    size = 1 if arm.split else BATCH_SIZE
    right = 0
    for start in range(0, count, size):
        options = dict(arm.options)
        if arm.split:
            stories, asked = split_stories(rng, fresh=True)
            options["team"] = Team.from_dict(split_team([told.text for told in stories]), "split")
            told, questions = [asked], [asked.ask]
        else:
            batch = range(min(size, count - start))
            told = [story(rng, rng.choice(arm.operations), fresh=True) for _ in batch]
            questions = [one.question for one in told]
        results = arm.method(lm, questions, kind="math", sampling=GREEDY, **options)
        for result, one in zip(results, told, strict=True):
            right += result.answer == str(one.totals[-1])
    return 100 * right / count


def measure(folder: Path, seed: int, count: int) -> dict[str, float]:
    """Return the accuracy of every row in per cent, by name.

    Rows with a lower bar are also measured in float32. Each value is saved in `folder` as soon as
    it is known, so that an interrupted run can continue.
    """
    saved = folder / f"figures-{count}.json"
    figures: dict[str, float] = json.loads(saved.read_text()) if saved.exists() else {}
    stored, wide = load(folder, device="cpu"), load(folder, device="cpu", dtype="float32")
    for arm in arms(stored):
        models = {arm.name: stored}
        if arm.at_least:
            models[f"{arm.name}, float32"] = wide
        for name, lm in models.items():
            if name in figures:
                continue
            figures[name] = accuracy(lm, arm, count)
            saved.write_text(json.dumps(figures, indent=1))
            line = f"seed {seed}: {name}: {figures[name]:.1f} %  {arm.bar}"
            print(line, file=sys.stderr, flush=True)
    return figures


def misses(figures: dict[str, float], rows: list[Arm]) -> list[str]:
    """Return one line for each bar that the figures miss."""
    found = []
    for arm in rows:
        value = figures[arm.name]
        if not arm.at_least <= value <= arm.at_most:
            found.append(f"{arm.name}: {value:.1f} %, expected {arm.bar}")
        if arm.at_least and abs(value - figures[f"{arm.name}, float32"]) > 2:
            found.append(f"{arm.name}: float32 and bf16 differ by more than 2 points")
    return found


# -- the card --------------------------------------------------------------------------------------


class Run(NamedTuple):
    """The folder of one seed's model, the counts of its training, and its figures."""

    folder: Path
    took: dict[str, float]
    figures: dict[str, float]


def card(prose: str, runs: dict[int, Run], best: int, rows: list[Arm], count: int) -> str:
    """Return `prose` with the figures of all runs.

    They replace the text between `<!-- name -->` and the next `<!-- end -->`.
    """
    figures = runs[best].figures
    swept = [arm for arm in rows if re.fullmatch(r"[1-9]\d* steps", arm.name)]
    by_steps = {int(arm.name.split()[0]): figures[arm.name] for arm in swept}
    by_steps[0] = figures["0 steps"]
    by_steps[LATENT_STEPS] = figures["latent_mas, sequential"]
    counts = sorted(by_steps)
    table = [["", "bar", *(f"seed {seed}" for seed in runs)]]
    for arm in rows:
        if arm not in swept:
            values = [f"{run.figures[arm.name]:.1f}" for run in runs.values()]
            table.append([arm.name, arm.bar, *values])
    wide = [f"{arm.name} {figures[f'{arm.name}, float32']:.1f}" for arm in rows if arm.at_least]
    steps = [["steps", *map(str, counts)], ["right", *(f"{by_steps[n]:.0f}" for n in counts)]]
    lines = [
        f"- seed {seed}: {run.took['steps']:,} steps, {run.took['tokens'] / 1e6:.1f} M tokens"
        for seed, run in runs.items()
    ]
    blocks = {
        "asked": f"{count:,} questions per row. Shipped: seed {best}.",
        "table": markdown(table),
        "float32": "In float32: " + "; ".join(wide),
        "steps": markdown(steps),
        "runs": "\n".join(lines),
    }
    for name, text in blocks.items():
        before, mark, rest = prose.partition(f"<!-- {name} -->\n")
        prose = before + mark + text + "\n" + rest[rest.index("<!-- end -->") :]
    return prose


def markdown(table: list[list[str]]) -> str:
    """Return a Markdown table. The first line of `table` is its header."""
    head, *rest = table
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])
