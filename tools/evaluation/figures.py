"""Compute the numbers of the pictures of tools/plot.py, from runs or from a model's thoughts.

The numbers are stored as JSON next to each picture, so that it can be drawn again from them. This
module does not use matplotlib.

    N questions   n thoughts   D hidden   V vocabulary
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimas import LM, Team
from minimas.teams import TEAMS

from .feeders import Feeders
from .last_turn import latent_turn
from .ledger import Record, files, read_head, whole_lines
from .probe import Tap, walk
from .stats import Values, by_question, paired, share
from .summary import summarize
from .verdict import ALPHA, comparisons, verdict

Figure = dict[str, Any]  # the numbers of a picture, as JSON
Point = dict[str, Any]
SHOWN_TOKENS = 2_000  # token embeddings that are drawn with the thoughts
# Settings that must be the same in all runs of one picture.
SAME = ("model", "data", "dtype", "quantize", "temperature", "top_p", "max_new_tokens")
CONTROLS = {
    "none": "no memory",
    "shuffled": "another question's memory",
    "latents": "thoughts only",
}


def runs(folders: Sequence[Path]) -> list[Record]:
    """Return all records of several runs of one model on the same questions.

    If `latent_steps` is None, it is replaced by the model's default. An incomplete last line is
    left out. Raises ValueError naming the file and the setting that differs.
    """
    found: list[Record] = []
    heads: list[tuple[Path, Record]] = []
    for folder in folders:
        if not (paths := files(folder)):
            expected = "expected a run of tools/evaluate.py"
            raise FileNotFoundError(f"{folder}: found no results*.jsonl, {expected}")
        heads += [(path, head) for path in paths if (head := read_head(path)) is not None]
    for path, head in heads:
        first_path, first = heads[0]
        for name in SAME:
            mine, other = head["settings"][name], first["settings"][name]
            if mine != other:
                expected = f"expected {other} as in {first_path}"
                raise ValueError(f"{path}: {name}: found {mine}, {expected}")
        for record in whole_lines(path):
            if record["method"] == "latent_mas" and record["latent_steps"] is None:
                record["latent_steps"] = head["model"]["steps"]
            found.append(record | {"model": Path(head["model"]["name"]).name})
    if not found:
        names = ", ".join(map(str, folders))
        raise ValueError(f"{names}: found no finished batch, expected at least one")
    return found


# -- loss and accuracy by the number of latent steps ------------------------------------------


def steps(found: Sequence[Record]) -> Figure:
    """Return the points of each map and control arm by number of latent steps, for each metric.

    For the loss, a point is the paired difference from prompts only (0 steps) with its bootstrap
    interval, because questions differ from each other far more than arms do. For accuracy, it is
    the share of right answers with its interval. Raises ValueError if there is nothing to draw.
    """
    panels = {"nll": loss_lines(found), "accuracy": accuracy_lines(found)}
    if not any(panels.values()):
        expected = "for --metric nll one of them must be 0"
        raise ValueError(f"found no run of latent_mas with several --latent-steps; {expected}")
    return {"what": "steps", "panels": panels}


def loss_lines(found: Sequence[Record]) -> dict[str, list[Point]]:
    """Return name -> points of the loss, or {} if there is no arm with prompts only."""
    arms = values_of_arms(found, "nll", "nll")
    zeros = {place.rare: values for place, values in arms.items() if not place.kind}
    if not zeros:
        return {}
    any_zero = zeros.get("", next(iter(zeros.values())))  # for settings without one of their own
    return lines_of(
        {
            place: paired_point(values, zeros.get(place.rare, any_zero))
            for place, values in arms.items()
        }
    )


def accuracy_lines(found: Sequence[Record]) -> dict[str, list[Point]]:
    """Return name -> points of accuracy."""
    arms = values_of_arms(found, "accuracy", "correct")
    return lines_of({place: share_point(values) for place, values in arms.items()})


class Place(NamedTuple):
    """The line of an arm, and its number of latent steps."""

    kind: str  # a map or a control; "" for prompts only, which belongs to all maps
    rare: str  # the less common settings
    steps: int


def values_of_arms(
    found: Sequence[Record], metric: str, field: str
) -> dict[Place, dict[tuple[str, int], float]]:
    """Return place -> the values of an arm by question and seed."""
    varied = varied_settings(found)
    arms: dict[Place, dict[tuple[str, int], float]] = {}
    for r in found:
        if r["metric"] == metric and r["method"] == "latent_mas" and r.get(field) is not None:
            kind = CONTROLS.get(r["transfer"]) or (map_of(r) if r["latent_steps"] else "")
            place = Place(kind, ", ".join(unusual(r, varied)), r["latent_steps"])
            arms.setdefault(place, {})[r["id"], r["seed"]] = float(r[field])
    return arms


def lines_of(points: dict[Place, Point]) -> dict[str, list[Point]]:
    """Return name -> points in order. The line of each map begins with prompts only."""
    lines: dict[str, list[Point]] = {}
    for place, point in sorted(points.items(), key=lambda item: item[0]):
        kinds = [place.kind]
        if not place.kind:
            same = {other.kind for other in points if other.rare == place.rare}
            kinds = sorted(same - {"", *CONTROLS.values()}) or ["prompts only"]
        for kind in kinds:
            name = ", ".join([kind] + [place.rare] * bool(place.rare))
            lines.setdefault(name, []).append({"steps": place.steps} | point)
    return lines


def map_of(r: Record) -> str:
    """Return the kind of map in a record."""
    return r["align"] or "ridge"


def unusual(r: Record, varied: Sequence[str]) -> list[str]:
    """Return texts of the less common settings that distinguish the arms of a picture."""
    said = {
        "team": r.get("team") or "",
        "transfer": "last memory only" if r.get("transfer") == "last" else "",
        "layout": f"layout {r.get('layout')}" if r.get("layout") else "",
        "close": "turns open" if r.get("close") is False else "",
        "prefix": f"prefix {r.get('prefix')!r}",
    }
    return [said[name] for name in varied if said[name]]


def varied_settings(found: Sequence[Record]) -> list[str]:
    """Return the names of the less common settings that have several values in the records."""
    latent = [r for r in found if r["method"] == "latent_mas"]
    names = ("team", "transfer", "layout", "close", "prefix")
    return [name for name in names if len({json.dumps(r.get(name)) for r in latent}) > 1]


def paired_point(values: Values, others: Values) -> Point:
    """Return the paired difference between two arms, `values` − `others`.

    Raises ValueError if they have no common question and seed.
    """
    line = paired(values, others)
    if line is None:
        raise ValueError("found arms without a common question and seed, expected the same ones")
    point = {name: line[name] for name in ("n", "low", "high", "p")}
    return point | {"y": line["mean"]}


def share_point(values: Values) -> Point:
    """Return the share of right answers with its interval."""
    graded = by_question(values)
    y, low, high = share(graded)
    return {"n": len(graded), "y": y, "low": low, "high": high}


# -- what an answer costs ---------------------------------------------------------------------


def costs(found: Sequence[Record], paper: Record | None = None, task: str = "GSM8K") -> Figure:
    """Return accuracy, generated tokens and seconds of each arm, and the paper's table if given.

    Raises ValueError if no answer is graded, or if the paper's table does not have the task.
    """
    varied = varied_settings(found)
    graded = [r | {"arm": label(r, varied)} for r in found if r["metric"] == "accuracy"]
    methods = {r["arm"]: r["method"] for r in graded}
    arms = []
    for name, line in summarize(graded).items():
        if "accuracy" in line:
            y, low, high = line["accuracy"]
            arm = {"name": name, "method": methods[name], "y": y, "low": low, "high": high}
            for what in ("n", "read", "thought", "written", "seconds", "truncated"):
                arm[what] = line[what]
            arms.append(arm)
    if not arms:
        raise ValueError("found no graded answer, expected a run with --metric accuracy")
    return {
        "what": "costs",
        "model": found[0]["model"],
        "task": task,
        "arms": arms,
        "paper": [] if paper is None else paper_points(paper, task),
    }


def paper_points(paper: Record, task: str) -> list[Point]:
    """Return the points of the paper's table for one task. Raises ValueError if it is missing."""
    try:
        table = paper["sequential"][task]
    except KeyError as error:
        expected = f"expected sequential: {task}"
        raise ValueError(f"paper (--paper): found no {error.args[0]!r}, {expected}") from error
    points = []
    for size in table["acc"]:
        numbers = (table[what][size] for what in ("acc", "tokens", "seconds"))
        columns = zip(("single", "text_mas", "latent_mas"), *numbers, strict=True)
        for name, accuracy, tokens, seconds in columns:
            point = {"name": name, "model": size, "y": accuracy / 100}
            points.append(point | {"written": tokens, "seconds": seconds})
    return points


def label(r: Record, varied: Sequence[str]) -> str:
    """Return a name from the settings of an arm, because runs may give different arms one name."""
    parts = [str(r["method"])]
    if r["samples"] > 1:
        parts.append(f"vote of {r['samples']}")
    if r["method"] == "latent_mas":
        if r["transfer"] != "none":
            steps = r["latent_steps"]
            parts.append(f"{steps} × {map_of(r)}" if steps else "prompts only")
        if r["transfer"] in CONTROLS:
            parts.append(CONTROLS[r["transfer"]])
    return ", ".join([*parts, *unusual(r, varied)])


# -- an audit ---------------------------------------------------------------------------------


def forest(found: Sequence[Record]) -> Figure:
    """Return the paired differences of an audit, and its verdict.

    Losses are compared with prompts only, and accuracies with none. Raises ValueError if the run is
    not an audit.
    """
    if not all(r["arm"].startswith(f"{r['metric']}: ") for r in found):
        raise ValueError(f"found the arm {found[0]['arm']!r}, expected a run with --audit")
    panels: Figure = {
        "nll": {"against": "prompts only", "arms": {}},
        "accuracy": {"against": "none", "arms": {}},
    }
    for name, line in comparisons(found).items():
        metric, _, pair = name.partition(": ")
        arm, _, other = pair.partition(" − ")
        if other == panels[metric]["against"]:
            panels[metric]["arms"][arm] = line
    if not any(panel["arms"] for panel in panels.values()):
        raise ValueError("found no arm to compare with prompts only or none, expected more --arms")
    return {"what": "forest", "panels": panels, "alpha": ALPHA, "verdict": verdict(found)}


# -- how thoughts drift, and the attention on them ----------------------------------------------


def drift(found: Sequence[Record]) -> Figure:
    """Return the cosine of successive thoughts and the attention on all thoughts, per arm.

    The cosine is that of each thought to the previous one. The attention is the share of the last
    agent's attention on the thoughts of all agents, per layer. Both are means over the questions.
    Raises ValueError for a run without `--lens`.
    """
    varied = varied_settings(found)
    arms: Figure = {}
    for record in found:
        thinking = [agent for agent in record["agents"] if "thoughts" in agent]
        arm = arms.setdefault(label(record, varied), {"cosines": [], "attention": []})
        for agent in thinking:
            arm["cosines"].append([one["cosine_before"] for one in agent["thoughts"][1:]])
        shares = [agent["attention"]["thoughts"] for agent in thinking if "attention" in agent]
        if shares:  # agents × layers × heads
            arm["attention"].append(torch.tensor(shares).sum(0).mean(-1).tolist())
    arms = {name: arm for name, arm in arms.items() if arm["cosines"] and arm["attention"]}
    if not arms:
        raise ValueError("found no thoughts in the records, expected a run with --lens")
    for arm in arms.values():
        for what, rows in arm.items():
            arm[what] = rounded(torch.tensor(rows).mean(0).tolist())
    questions = len({record["id"] for record in found})
    return {"what": "drift", "questions": questions, "arms": arms}


# -- where thoughts lie -----------------------------------------------------------------------


def thoughts(
    lm: LM, questions: Sequence[str], kinds: Sequence[str], count: int, kind: str = "math"
) -> Figure:
    """Return the first agent's `count` thoughts with each map, and embeddings of tokens.

    All are projected onto the first two principal directions of embeddings and thoughts together.
    The measures of `walk` are means over the questions, per step.
    """
    planner, *_, last = (lm.teams.get("sequential") or TEAMS["sequential"]).agents
    pair, feeders = Team((planner, last)), Feeders(lm)
    w_in = lm.model.model.embed_tokens.weight  # (V, D)
    if lm.tokenizer:
        w_in = w_in[: lm.tokenizer.size]
    taps = {name: Tap(feeders(name)) for name in kinds}
    for tap in taps.values():
        latent_turn(lm, questions, team=pair, latent_steps=count, align=tap, kind=kind)
    kept = {name: torch.cat(tap.thoughts, 1).float() for name, tap in taps.items()}  # (N, n, D)
    source = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(w_in), generator=source)[:SHOWN_TOKENS].to(w_in.device)
    shown = w_in[chosen].float()
    place = plane(torch.cat([shown, *(thought.flatten(0, 1) for thought in kept.values())]))
    maps: Figure = {}
    for name, tap in taps.items():
        means = {what: value.mean(0).tolist() for what, value in walk(tap, w_in).items()}
        maps[name] = rounded(means) | {"places": place(kept[name])}
    norm = float(w_in.float().norm(dim=-1).mean())
    return {
        "what": "thoughts",
        "model": Path(lm.model.name).name,
        "questions": len(questions),
        "steps": count,
        "tokens": {"places": place(shown), "norm": norm},
        "maps": maps,
    }


def plane(points: Tensor) -> Callable[[Tensor], list[Any]]:
    """Return a function that projects points (…, D) onto a plane.

    The plane has the first two principal directions of `points` (n, D).
    """
    middle = points.mean(0)
    axes = torch.linalg.svd(points - middle, full_matrices=False).Vh[:2].T  # (D, 2)

    def places(points: Tensor) -> list[Any]:
        found: list[Any] = rounded(((points - middle) @ axes).cpu().tolist())
        return found

    return places


def rounded(values: Any) -> Any:
    """Round every number in nested lists and dicts to five significant digits."""
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.5g}")
