"""Report an audit: comparisons, diagnostics and the verdict, as numbers and as Markdown.

This module uses only records and the diagnostics of probe.py.
"""

import math
from collections.abc import Sequence
from typing import Any

from .probe import HOST
from .stats import p_value
from .verdict import AGAINST, ALPHA, comparisons, verdict

Record = dict[str, Any]
CAPTION = (
    "Paired differences between each arm and three other arms, with bootstrap intervals "
    "(a lower loss is better):"
)
LIMITS = (
    f"An effect with p below {ALPHA:g} counts as found; with many arms, a few may be found by "
    "chance. The loss finds small effects, but it rewards whatever makes the words of the "
    "solution likelier, such as a copy of them in the KV cache. Accuracy shows how much an effect "
    "matters, but needs many questions. Neither applies to other questions or models."
)


def report(found: Sequence[Record], diagnostics: Record) -> tuple[Record, str]:
    """Return the numbers of an audit, and its Markdown, which ends with the verdict."""
    compared, sentence = comparisons(found), verdict(found)
    lines = [CAPTION, "", *comparison_table(compared)]
    if diagnostics:
        lines += diagnostic_tables(diagnostics)
    lines += ["", " ".join([LIMITS, *few_questions(compared)]), "", sentence]
    numbers = {"comparisons": compared, "diagnostics": diagnostics, "verdict": sentence}
    return numbers, "\n".join(lines)


def few_questions(compared: Record) -> list[str]:
    """Return a sentence if an audit has too few questions to find anything, or an empty list.

    With few pairs both tests are exact. The smallest possible p of n pairs is 2 / 2ⁿ, if all
    differences have the same sign.
    """
    pairs = max((line["n"] for line in compared.values()), default=0)
    enough = 1 + math.floor(math.log2(2 / ALPHA))
    if not 0 < pairs < enough:
        return []
    questions = f"{pairs} question{'' if pairs == 1 else 's'}"
    smallest = f"With {questions} the smallest possible p is {2 / 2**pairs:g}"
    known = " (with 5 questions, 0.0625)" if pairs < 5 else ""
    return [f"{smallest}{known}. At least {enough} questions are needed to find anything."]


def comparison_table(compared: Record) -> list[str]:
    """Return the lines of a Markdown table with one line per arm."""
    names = dict.fromkeys(name.split(" − ")[0] for name in compared)
    lines = markdown_head(["", *(f"− {other}" for other in AGAINST)])
    for name in names:
        cells = [cell(name, compared.get(f"{name} − {other}")) for other in AGAINST]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def cell(name: str, line: Record | None) -> str:
    """Return a paired difference as text. Accuracy is in percentage points."""
    if line is None:
        return ""
    scale, unit = (1, "") if name.startswith("nll") else (100, " points")
    low, mean, high = (f"{scale * line[field]:+.3g}" for field in ("low", "mean", "high"))
    return f"{mean}{unit} [{low}, {high}], {p_value(line)}"


def diagnostic_tables(seen: Record) -> list[str]:
    """Return the lines of the Markdown tables of attention, transplants and geometry."""
    lines = ["", f"On the first {seen['questions']} questions:", ""]
    lines += markdown_head(["attention of the last agent on", "layer 0", "mean of all"])
    for name, shares in seen["attention"].items():
        lines.append(f"| {name} | {shares[0]:.3f} | {sum(shares) / len(shares):.3f} |")
    lines += ["", *markdown_head([f"thoughts of full in the KV cache of {HOST}", "gold NLL"])]
    lines += [f"| {name} | {value:.3f} |" for name, value in seen["transplant"].items()]
    heads = list(next(iter(seen["geometry"].values()), {}))
    lines += ["", *markdown_head(["thoughts of", *heads])]
    for name, values in seen["geometry"].items():
        cells = ["" if value is None else f"{value:.3f}" for value in values.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def markdown_head(titles: Sequence[str]) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
