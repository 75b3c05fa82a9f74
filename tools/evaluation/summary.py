"""A run's summary: each arm's numbers, and as a Markdown table.

Does not know: how records come about.
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
    """Return each arm's numbers: accuracy and loss with 95 % intervals, truncation, costs."""
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
    if losses := values_by_question(records, "nll"):
        line["nll"] = list(bootstrap(losses))
    if "finish_reason" in first:
        line["truncated"] = sum(r["finish_reason"] == "length" for r in records) / total
        line["empty"] = sum(not r["text"].strip() for r in records) / total
    for name in COUNTS:
        line[name] = sum(r[name] for r in records) / total
    # The median: a stall of the machine is not the arm's.
    line["seconds"] = median(r["seconds"] for r in records)
    line["memory_bytes"] = max(r["memory_bytes"] for r in records)
    return line


def values_by_question(found: Sequence[Record], field: str) -> list[float]:
    """Return a field's mean over each question's seeds, of the questions that have it, in order."""
    with_field = [r for r in found if r.get(field) is not None]
    return by_question({(r["id"], r["seed"]): float(r[field]) for r in with_field})


def table(arms: dict[str, Record], rows: Sequence[Row]) -> str:
    """Return the summary as Markdown, with the accuracy of guesses if the rows say it."""
    lines = [HEAD, ["---"] * len(HEAD)]
    lines += [[name, *cells(line)] for name, line in arms.items()]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    chances = [row["chance"] for row in rows if "chance" in row]
    if chances:
        text += f"\n\nA guessed answer is right in {sum(chances) / len(chances):.1%}."
    options = [1 / len(row["choices"]) for row in rows if row.get("choices")]
    if options and any(line["metric"] == "nll" for line in arms.values()):
        # The lowest of a few losses is right more often than a guessed answer.
        chance = sum(options) / len(options)
        text += f"\n\nThe lowest of the options' losses is right by chance in {chance:.1%}."
    return text


def cells(line: Record) -> list[str]:
    """Return one arm's cells of the table, after its name."""
    right = "{:.1%} [{:.1%}, {:.1%}]".format(*line["accuracy"]) if "accuracy" in line else ""
    nll = "{:.3f} [{:.3f}, {:.3f}]".format(*line["nll"]) if "nll" in line else ""
    cut = f"{line['truncated']:.0%}" if "truncated" in line else ""
    counts = [f"{line[name]:,.0f}" for name in COUNTS]
    # Losses share what the first arm on a batch has prefilled: their seconds do not compare.
    seconds = "" if line["metric"] == "nll" else f"{line['seconds']:.3g}"
    return [str(line["n"]), right, nll, cut, *counts, seconds]
