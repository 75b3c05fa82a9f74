"""What the pictures of tools/plot.py show, as plain data: from runs of tools/evaluate.py, or from a model's thoughts.

Data first, then drawing: the numbers lie beside each picture as JSON, and a picture can be drawn again from them.
Does not know: colours, axes, matplotlib.

    N questions   n thoughts   D hidden   V vocabulary
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from audit import ALPHA, Tap, comparisons, verdict, walk
from evaluate import summarize
from feeders import Feeders
from ledger import Record, files, read_head, whole_lines
from stats import by_question, paired, share
from torch import Tensor

from minimas import LM, Team
from minimas.agents import brief
from minimas.teams import TEAMS

Figure = dict[str, Any]  # what is drawn, as JSON
Point = dict[str, Any]
SHOWN_TOKENS = 2_000  # of the embedding, as the background of thoughts
SAME = (
    "model",
    "data",
    "dtype",
    "quantize",
    "temperature",
    "top_p",
    "max_new_tokens",
)  # in all runs of one picture
CONTROLS = {
    "none": "no memory",
    "shuffled": "another question's memory",
    "latents": "thoughts only",
}


def runs(folders: Sequence[Path]) -> list[Record]:
    """All records of some runs of one model on the same questions, `latent_steps` filled in with the model's own.

    A last line that is still being written is left out. Raises ValueError naming the file and what differs.
    """
    found: list[Record] = []
    first: tuple[Path, Record] | None = None
    for folder in folders:
        if not (paths := files(folder)):
            raise FileNotFoundError(
                f"{folder}: found no results*.jsonl, expected a run of tools/evaluate.py"
            )
        for path in paths:
            if (head := read_head(path)) is None:
                continue
            first = first or (path, head)
            for name in SAME:
                if (mine := head["settings"][name]) != (other := first[1]["settings"][name]):
                    raise ValueError(
                        f"{path}: {name}: found {mine}, expected {other} as in {first[0]}"
                    )
            for record in whole_lines(path):
                if record["method"] == "latent_mas" and record["latent_steps"] is None:
                    record["latent_steps"] = head["model"]["steps"]
                found.append(record | {"model": Path(head["model"]["name"]).name})
    if not found:
        raise ValueError(
            f"{', '.join(map(str, folders))}: found no finished batch, expected one at least"
        )
    return found


# -- loss and accuracy by the number of thoughts -----------------------------------------------------------------------


def steps(found: Sequence[Record]) -> Figure:
    """For each metric the maps' points by number of thoughts, and the control arms' at the number they ran with.

    Of the loss, the paired difference to prompts only (0 steps) with its bootstrap interval: questions differ from each
    other by far more than arms do. Of accuracy, the share with its Wilson interval.
    """
    panels: Figure = {}
    varied = _varied(found)
    for metric in ("nll", "accuracy"):
        arms: dict[tuple[str, int], dict[tuple[str, int], float]] = {}
        for r in found:
            field = {"nll": "nll", "accuracy": "correct"}[metric]
            if r["metric"] == metric and r["method"] == "latent_mas" and r.get(field) is not None:
                arms.setdefault(_line(r, varied), {})[r["id"], r["seed"]] = float(r[field])
        zero, lines = arms.get(("", 0)), {}
        maps = sorted(
            {
                name
                for name, count in arms
                if count and not name.startswith(tuple(CONTROLS.values()))
            }
        )
        for (name, count), values in sorted(arms.items()):
            if metric == "nll" and zero is None:
                continue
            point = _paired(values, zero) if metric == "nll" and zero else _share(values)
            for line in [name] if name else maps:  # prompts only are where every map's line begins
                lines.setdefault(line, []).append({"steps": count} | point)
        panels[metric] = lines
    if not any(panels.values()):
        raise ValueError(
            "found no run of latent_mas with several numbers of thoughts; a loss needs 0 among them"
        )
    return {"what": "steps", "panels": panels}


def _line(r: Record, varied: Sequence[str]) -> tuple[str, int]:
    """The line of the picture that a record belongs to, and its place on it; prompts only are on all: ""."""
    name = CONTROLS.get(r["transfer"]) or (r["align"] or "ridge" if r["latent_steps"] else "")
    return ", ".join([*filter(None, [name]), *_unusual(r, varied)]), r["latent_steps"]


def _unusual(r: Record, varied: Sequence[str]) -> list[str]:
    """The settings that most runs leave as they are, where they tell this picture's arms apart."""
    said = {
        "team": r.get("team") or "",
        "transfer": "last memory only" if r.get("transfer") == "last" else "",
    }
    said |= {
        "close": "" if r.get("close") else "turns open",
        "prefix": f"prefix {r.get('prefix')!r}",
    }
    return [said[name] for name in varied if said[name]]


def _varied(found: Sequence[Record]) -> list[str]:
    latent = [r for r in found if r["method"] == "latent_mas"]
    names = ("team", "transfer", "close", "prefix")
    return [name for name in names if len({json.dumps(r.get(name)) for r in latent}) > 1]


def _paired(values: dict[tuple[str, int], float], others: dict[tuple[str, int], float]) -> Point:
    if (line := paired(values, others)) is None:
        raise ValueError("found arms without a question and seed in common, expected the same ones")
    return {
        "n": line["n"],
        "y": line["mean"],
        "low": line["low"],
        "high": line["high"],
        "p": line["p"],
    }


def _share(values: dict[tuple[str, int], float]) -> Point:
    y, low, high = share(graded := by_question(values))
    return {"n": len(graded), "y": y, "low": low, "high": high}


# -- what an answer costs ---------------------------------------------------------------------------------------------


def costs(found: Sequence[Record], paper: Record | None = None, task: str = "GSM8K") -> Figure:
    """Accuracy beside written tokens and seconds a question, of each arm; beside it the paper's own table, if given."""
    varied = _varied(found)
    arms, graded = [], [r | {"arm": label(r, varied)} for r in found if r["metric"] == "accuracy"]
    methods = {r["arm"]: r["method"] for r in graded}
    for name, line in summarize(graded).items():
        if "accuracy" in line:
            y, low, high = line["accuracy"]
            kept = {
                what: line[what]
                for what in ("n", "read", "thought", "written", "seconds", "truncated")
            }
            arms.append(
                {"name": name, "method": methods[name], "y": y, "low": low, "high": high} | kept
            )
    if not arms:
        raise ValueError("found no graded answer, expected a run with --metric accuracy")
    theirs = []
    if paper is not None:
        try:
            table = paper["sequential"][task]
        except KeyError as error:
            raise ValueError(
                f"paper (--paper): found no {error.args[0]!r}, expected sequential: {task}"
            ) from error
        for size in table["acc"]:
            numbers = (table[what][size] for what in ("acc", "tokens", "seconds"))
            columns = zip(("single", "text_mas", "latent_mas"), *numbers, strict=True)
            for name, accuracy, tokens, seconds in columns:
                theirs.append(
                    {
                        "name": name,
                        "model": size,
                        "y": accuracy / 100,
                        "written": tokens,
                        "seconds": seconds,
                    }
                )
    return {
        "what": "costs",
        "model": found[0]["model"],
        "task": task,
        "arms": arms,
        "paper": theirs,
    }


def label(r: Record, varied: Sequence[str]) -> str:
    """What an arm is, from its settings: runs may call two arms the same, or one arm two names."""
    name = f"{r['method']}, vote of {r['samples']}" if r["samples"] > 1 else str(r["method"])
    if r["method"] == "latent_mas":
        thoughts = (
            f"{r['latent_steps']} × {r['align'] or 'ridge'}"
            if r["latent_steps"]
            else "prompts only"
        )
        control = CONTROLS.get(r["transfer"], "")
        name = ", ".join(
            [name, *([thoughts] if r["transfer"] != "none" else []), *filter(None, [control])]
        )
    return ", ".join([name, *_unusual(r, varied)])


# -- an audit ---------------------------------------------------------------------------------------------------------


def forest(found: Sequence[Record]) -> Figure:
    """An audit's paired differences: of the loss to prompts only, of accuracy to no memory; with its verdict."""
    if not all(r["arm"].startswith(f"{r['metric']}: ") for r in found):
        raise ValueError(f"found the arm {found[0]['arm']!r}, expected a run with --audit")
    compared, against = comparisons(found), {"nll": "prompts only", "accuracy": "none"}
    panels = {
        metric: {
            "against": other,
            "arms": {
                name.split(": ")[1].split(" − ")[0]: line
                for name, line in compared.items()
                if name.startswith(f"{metric}: ") and name.endswith(f" − {other}")
            },
        }
        for metric, other in against.items()
    }
    if not any(panel["arms"] for panel in panels.values()):
        raise ValueError("found no arm beside prompts only or none, expected a run with --audit")
    return {"what": "forest", "panels": panels, "alpha": ALPHA, "verdict": verdict(found)}


# -- where thoughts lie -----------------------------------------------------------------------------------------------


def thoughts(
    lm: LM, questions: Sequence[str], kinds: Sequence[str], count: int, kind: str = "math"
) -> Figure:
    """The first agent's `count` thoughts on some questions under each map, beside the embeddings of tokens.

    All in the plane of the two main directions of token embeddings and thoughts together; by step, means over the
    questions of the norm before and after rescaling, the cosine to the thought before, and to the nearest token.
    """
    planner, *_, last = (lm.teams.get("sequential") or TEAMS["sequential"]()).agents
    pair = Team((planner, last))
    w_in = lm.model.model.embed_tokens.weight[
        : lm.tokenizer.size if lm.tokenizer else None
    ]  # (V, D)
    taps, feeder = {}, Feeders(lm)
    for name in kinds:
        taps[name] = Tap(feeder(name))
        brief(lm, questions, team=pair, latent_steps=count, align=taps[name], kind=kind)
    several = {name: torch.cat(tap.thoughts, 1).float() for name, tap in taps.items()}  # (N, n, D)
    source = torch.Generator().manual_seed(0)
    shown = w_in[torch.randperm(len(w_in), generator=source)[:SHOWN_TOKENS].to(w_in.device)].float()
    place = plane(torch.cat([shown, *(thought.flatten(0, 1) for thought in several.values())]))
    maps = {
        name: {what: _rounded(value.mean(0).tolist()) for what, value in walk(tap, w_in).items()}
        | {"places": place(several[name])}
        for name, tap in taps.items()
    }
    return {
        "what": "thoughts", "model": Path(lm.model.name).name, "questions": len(questions), "steps": count,
        "tokens": {"places": place(shown), "norm": float(w_in.float().norm(dim=-1).mean())}, "maps": maps,
    }  # fmt: skip


def plane(points: Tensor) -> Callable[[Tensor], list[Any]]:
    """The plane of the two main directions of points (n, D); what is returned gives (…, D) points' places in it."""
    middle = points.mean(0)
    axes = torch.linalg.svd(points - middle, full_matrices=False).Vh[:2].T  # (D, 2)
    return lambda points: _rounded(((points - middle) @ axes).cpu().tolist())


def _rounded(values: Any) -> Any:
    return [_rounded(x) for x in values] if isinstance(values, list) else float(f"{values:.5g}")
