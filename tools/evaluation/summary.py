"""Summarize a run: the numbers of each arm, and a Markdown table.

This module uses only records and rows.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

from .rows import Row
from .stats import bootstrap, by_question, share

Record = dict[str, Any]
COUNTS = ("read", "thought", "written")
HEAD = [
    "arm", "n", "right, 95 %", "gold NLL, 95 %", "cut off", "prefilled", "thoughts", "generated",
    "s per question",
]  # fmt: skip


def summarize(found: Sequence[Record]) -> dict[str, Record]:
    """Return the numbers of each arm: accuracy and loss with 95 % intervals, cut answers, costs."""
    by_arm: dict[str, list[Record]] = {}
    for record in found:
        by_arm.setdefault(record["arm"], []).append(record)
    return {name: summarize_arm(records) for name, records in by_arm.items()}


def summarize_arm(records: Sequence[Record]) -> Record:
    """Return the numbers of one arm. Costs are per question and seed."""
    first, total = records[0], len(records)
    n = len({record["id"] for record in records})
    line: Record = {"n": n, "metric": first["metric"], "seeds": total // n}
    if graded := values_by_question(records, "correct"):
        line["accuracy"] = share(graded)
        line["graded"] = len(graded)  # programs are not graded unless they are run
    if losses := values_by_question(records, "nll"):
        line["nll"] = list(bootstrap(losses))
    if "finish_reason" in first:
        line["truncated"] = sum(r["finish_reason"] == "length" for r in records) / total
        line["empty"] = sum(not r["text"].strip() for r in records) / total
    for name in COUNTS:
        line[name] = sum(r[name] for r in records) / total
    # The median ignores a short stall of the machine.
    line["seconds"] = median(r["seconds"] for r in records)
    line["memory_bytes"] = max(r["memory_bytes"] for r in records)
    return line


def values_by_question(found: Sequence[Record], field: str) -> list[float]:
    """Return the mean of a field over the seeds of each question that has it, in order."""
    with_field = [r for r in found if r.get(field) is not None]
    return by_question({(r["id"], r["seed"]): float(r[field]) for r in with_field})


def table(arms: dict[str, Record], rows: Sequence[Row]) -> str:
    """Return the summary as Markdown, with the accuracy of guesses if the rows have it."""
    lines = [HEAD, ["---"] * len(HEAD)]
    lines += [[name, *cells(line)] for name, line in arms.items()]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    chances = [row["chance"] for row in rows if "chance" in row]
    if chances:
        text += f"\n\nA guess is right for {sum(chances) / len(chances):.1%} of the questions."
    options = [1 / len(row["choices"]) for row in rows if row.get("choices")]
    if options and any(line["metric"] == "nll" for line in arms.values()):
        # The option with the lowest loss is right by chance more often than a guessed answer.
        chance = sum(options) / len(options)
        text += "\n\nBy chance, the option with the lowest loss is right for "
        text += f"{chance:.1%} of the questions."
    return text


def cells(line: Record) -> list[str]:
    """Return the cells of one arm in the table, after its name."""
    right = "{:.1%} [{:.1%}, {:.1%}]".format(*line["accuracy"]) if "accuracy" in line else ""
    nll = "{:.3f} [{:.3f}, {:.3f}]".format(*line["nll"]) if "nll" in line else ""
    cut = f"{line['truncated']:.0%}" if "truncated" in line else ""
    counts = [f"{line[name]:,.0f}" for name in COUNTS]
    # Arms that measure losses share prefilled prompts, so their seconds cannot be compared.
    seconds = "" if line["metric"] == "nll" else f"{line['seconds']:.3g}"
    n = line["n"]
    graded = line.get("graded", n)
    return [str(n) if graded == n else f"{graded} of {n}", right, nll, cut, *counts, seconds]
