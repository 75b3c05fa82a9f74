"""Questions in a file: JSON Lines, one object with a question per line.

This file does not depend on benchmarks or on grading.
"""

import json
import re
import sys
from decimal import Decimal
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Any

from .answers import KINDS
from .text.tokenizer import is_text, read_text

Row = dict[str, Any]
# A gold answer that is a number, alone or at the end of a solution in GSM8K's form, where it may
# have a unit. The groups are the solution and the number. (?>…) is not searched again, or a long
# run of "#" would take minutes.
NUMBER = re.compile(
    r"""(?isx) (?>(.*\#{4})?) \s* ([-+]?[$€£]?[-+]? (?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+|(?=\.\d))
      (?:\.\d*)? (?:e[-+]?\d+)? (?:/\d+)? \ ?%?) \.?\s*
    | (?>.*\#{4})[^\n]*?\d[^\n]*\s*"""
)


def number(text: str) -> Decimal:
    """Convert a JSON number. Raises ValueError for NaN, Infinity and values beyond float."""
    if not isfinite(float(text)):
        raise ValueError(f"found {text:.40}, expected a finite number")
    return Decimal(text)  # keeps every digit of a gold answer


def checked_row(row: Any, line: int) -> Row:
    """Return a row with an "id" and without fields that are null.

    "choices" become a dict letter -> text. Raises ValueError "FIELD: found X, expected Y".
    """
    if not isinstance(row, dict):
        raise ValueError(f"found {type(row).__name__}, expected an object")
    found = {"id": f"line-{line}"} | {name: row[name] for name in row if row[name] is not None}
    question = found.get("question")
    kind = found.get("kind", "free")
    if not is_text(question):
        raise ValueError(
            f"question: found {'nothing' if question is None else repr(question)[:80]}, "
            "expected text that is not blank"
        )
    if kind not in KINDS:
        raise ValueError(f"kind: found {kind!r:.80}, expected one of {', '.join(KINDS)}")
    if "choices" in found:
        found["choices"] = options(found["choices"])
    return found


def options(choices: Any) -> dict[str, str]:
    """Return a dict letter -> text, also from {"text": […], "label": […]}, without null texts."""
    match choices:
        case {"text": [*texts], "label": [*labels]}:
            named = dict(zip(map(str, labels), texts, strict=False))
            if len(named) == len(labels) == len(texts):
                choices = named
    if isinstance(choices, dict):
        found = {letter: text for letter, text in choices.items() if text is not None}
        if {type(text) for text in found.values()} == {str}:
            return found
    raise ValueError(f"choices: found {choices!r:.80}, expected an object, letter: text")


def read_input(path: Path) -> str:
    """Return the text of a file, or of standard input for "-"."""
    return sys.stdin.read() if str(path) == "-" else read_text(path)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, or of standard input for "-"; see `checked_row`.

    A number with a fraction or an exponent is a Decimal. Raises OSError, or ValueError "FILE: line
    N: FIELD: found X, expected Y", also for a file without rows.
    """
    rows = []
    # Not `splitlines`: U+2028 and U+0085 may be inside a JSON text.
    for line, source in enumerate(read_input(path).split("\n"), start=1):
        try:
            if source.strip():
                row = json.loads(source, parse_float=number, parse_constant=number)
                rows.append(checked_row(row, line))
        except (ValueError, RecursionError) as error:
            ours = type(error) is ValueError  # from `number` or `checked_row`
            problem = error if ours else f"found bad JSON ({error}), expected an object"
            raise ValueError(f"{path}: line {line}: {problem}") from error
    if not rows:
        raise ValueError(f"{path}: found no rows, expected a JSON object with a question per line")
    return rows


def kind_of(row: Row) -> str:
    """Return a row's own kind, else the kind that its fields imply.

    "choices" make it "choice", tests make it "code", a number as "answer" makes it "math". Every
    other row is "free".
    """
    if "kind" in row:
        return str(row["kind"])
    if row.get("choices"):
        return "choice"
    if row.keys() & {"tests", "test_list", "entry_point"}:
        return "code"
    return "math" if NUMBER.fullmatch(str(row.get("answer", ""))) else "free"


def batches(rows: list[Row], kind: str | None, size: int) -> list[tuple[str, list[Row]]]:
    """Return batches (kind, at most `size` rows) in order; `kind=None` means each row's own."""
    return [
        (name, list(run))
        for start in range(0, len(rows), size)
        for name, run in groupby(rows[start : start + size], lambda row: kind or kind_of(row))
    ]
