"""The report of an audit: comparisons, diagnostics and the verdict as numbers and as Markdown.

Does not know: how records and diagnostics come about.
"""

import math
from collections.abc import Sequence
from typing import Any

from .probe import HOST
from .stats import p_value
from .verdict import AGAINST, ALPHA, comparisons, verdict

Record = dict[str, Any]
CAPTION = (
    "Paired differences of each arm to three others, with a bootstrap interval "
    "(a lower loss is better):"
)
LIMITS = (
    f"p below {ALPHA:g} counts as found; with many arms, read single ones with care. "
    "The loss finds small effects but rewards whatever brings the solution's words near, as a copy "
    "in memory does; accuracy says what an effect is worth, and needs many questions. Neither "
    "speaks of other questions or models."
)


def report(found: Sequence[Record], diagnostics: Record) -> tuple[Record, str]:
    """Return an audit's numbers, and its Markdown, which ends with the verdict."""
    compared, sentence = comparisons(found), verdict(found)
    lines = [CAPTION, "", *comparison_table(compared)]
    if diagnostics:
        lines += diagnostic_tables(diagnostics)
    lines += ["", " ".join([LIMITS, *few_questions(compared)]), "", sentence]
    numbers = {"comparisons": compared, "diagnostics": diagnostics, "verdict": sentence}
    return numbers, "\n".join(lines)


def few_questions(compared: Record) -> list[str]:
    """Return the sentence that an audit of few questions needs: nothing can be found in them.

    Both tests are exact there, and the smallest p of n pairs is that all go one way, 2 / 2ⁿ.
    """
    pairs = max((line["n"] for line in compared.values()), default=0)
    enough = 1 + math.floor(math.log2(2 / ALPHA))
    if not 0 < pairs < enough:
        return []
    smallest = f"On {pairs} {'question' if pairs == 1 else 'questions'} no p below {2 / 2**pairs:g}"
    known = " (on 5, none below 0.0625)" if pairs < 5 else ""
    return [f"{smallest} is possible{known}, so nothing can be found with fewer than {enough}."]


def comparison_table(compared: Record) -> list[str]:
    """Return a Markdown table with a line for each arm."""
    names = dict.fromkeys(name.split(" − ")[0] for name in compared)
    lines = markdown_head(["", *(f"− {other}" for other in AGAINST)])
    for name in names:
        cells = [cell(name, compared.get(f"{name} − {other}")) for other in AGAINST]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def cell(name: str, line: Record | None) -> str:
    """Return a paired difference as text; accuracy in points."""
    if line is None:
        return ""
    scale, unit = (1, "") if name.startswith("nll") else (100, " points")
    low, mean, high = (f"{scale * line[field]:+.3g}" for field in ("low", "mean", "high"))
    return f"{mean}{unit} [{low}, {high}], {p_value(line)}"


def diagnostic_tables(seen: Record) -> list[str]:
    """Return the Markdown tables of attention, transplant and geometry."""
    lines = ["", f"On the first {seen['questions']} questions:", ""]
    lines += markdown_head(["the last agent attends to", "layer 0", "mean of all"])
    for name, shares in seen["attention"].items():
        lines.append(f"| {name} | {shares[0]:.3f} | {sum(shares) / len(shares):.3f} |")
    lines += ["", *markdown_head([f"full's thoughts in the memory of {HOST}", "gold NLL"])]
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
