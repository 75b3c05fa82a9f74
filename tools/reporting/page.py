"""Render records as one HTML file: a table of records, and their compressed details.

The details are JSON, compressed in groups of records. The page decompresses a group when one of its
records is opened, so a page with a thousand records and their thoughts loads quickly. This module
does not read records from files.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from tools.evaluation.summary import HEAD, cells

from .records import Report

Record = dict[str, Any]
GROUP = 20  # records that are decompressed together


def render(report: Report) -> str:
    """Return the HTML of a report. All texts of records are escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"setting": setting_text, "number": number_text}
    entries = report.entries
    graded = [entry["correct"] for entry in entries if entry.get("correct") is not None]
    html = made.get_template("page.html").render(
        report=report,
        questions=len({entry["id"] for entry in entries}),
        right=sum(graded),
        graded=len(graded),
        has_losses=any(entry.get("nll") is not None for entry in entries),
        seeds=len({entry["seed"] for entry in entries}),
        arms_table=arms_table(report),
        arms=list(report.arms),
        details=packed([details(entry) for entry in entries]),
        group=GROUP,
    )
    return html.encode(errors="replace").decode()  # a lone surrogate cannot be written as UTF-8


def arms_table(report: Report) -> list[list[str]]:
    """Return the header and one line per arm, whose last cell has the names of its agents.

    Columns without values are left out. The last cell is empty if the agents are the same as in the
    line above.
    """
    lines = [HEAD, *([name, *cells(line)] for name, line in report.arms.items())]
    used = [i for i in range(len(HEAD)) if any(line[i] for line in lines[1:])]
    agents, before = {entry["arm"]: entry["agents"] for entry in report.entries}, ""
    table = [[*(HEAD[i] for i in used), ""]]
    for line in lines[1:]:
        team = " → ".join(agent["name"] for agent in agents[line[0]])
        table.append([*(line[i] for i in used), "" if team == before else team])
        before = team
    return table


def setting_text(value: Any) -> str:
    """Return the value of a setting as text, or "" if there is none."""
    if isinstance(value, list):
        return ", ".join(setting_text(one) or "default" for one in value) if value != [None] else ""
    if isinstance(value, dict):
        return ", ".join(f"{name} {setting_text(one)}" for name, one in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value).strip(" ,")


def number_text(value: float, digits: int = 0) -> str:
    """Return a number with thousands separators and `digits` decimal places."""
    return f"{value:,.{digits}f}"


# -- details ----------------------------------------------------------------------------------


def details(entry: Record) -> Record:
    """Return what the page shows when a record is opened, in a compact form."""
    kept = ("finish_reason", "gold_tokens", "nll", "options", "votes", "memory_bytes")
    found = {name: entry[name] for name in kept if entry.get(name)}
    found["agents"] = [
        {name: agent[name] for name in ("name", "prompt", "text", "read", "thought", "written")}
        | {"seconds": round(agent["seconds"], 4), "memory_bytes": agent["memory_bytes"]}
        | {"thoughts": [thought(one) for one in agent.get("thoughts", [])]}
        | {"attention": {p: layer_means(x) for p, x in agent.get("attention", {}).items()}}
        for agent in entry["agents"]
    ]
    return found


def thought(seen: Record) -> list[Any]:
    """Return a thought as a list.

    Its items are the likeliest tokens, the entropy, the norm, the cosine to the thought before, the
    nearest token, and the cosine to it.
    """
    tokens = [[token, round(chance, 3)] for token, chance in seen["tokens"]]
    names = ("entropy", "norm", "cosine_before", "cosine_nearest")
    entropy, norm, before, near = (
        None if seen.get(name) is None else float(f"{seen[name]:.3g}") for name in names
    )
    return [tokens, entropy, norm, before, seen["nearest"], near]


def layer_means(layers: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over the heads, one number per layer."""
    return [round(sum(heads) / len(heads), 4) for heads in layers]


def packed(found: Sequence[Record]) -> list[str]:
    """Return groups of records as compressed JSON in base64."""
    groups = [found[start : start + GROUP] for start in range(0, len(found), GROUP)]
    texts = [json.dumps(group, separators=(",", ":")).encode() for group in groups]
    return [base64.b64encode(gzip.compress(text, mtime=0)).decode() for text in texts]
