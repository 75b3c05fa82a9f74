"""Questions in a file: JSON Lines, one object with a question per line.

Does not know: benchmarks, and which gold answers can be graded.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from .answers import KINDS
from .text.tokenizer import is_text, read_text

Row = dict[str, Any]
# A number as a gold answer, alone or at the end of a solution as in GSM8K.
NUMBER = re.compile(r"(?is)(.*\n\s*####)?\s*([-+]?[\d.,/]+(e[-+]?\d+)?)\s*")


def finite(text: str) -> float:
    """Convert a number of JSON. Raises ValueError for NaN, Infinity and what no float can hold."""
    if not math.isfinite(float(text)):
        raise ValueError(f"found {text:.40}, expected a finite number")
    return float(text)


def wrong(where: str, field: str, found: Any, expected: str) -> ValueError:
    """Return the error for one field of a row."""
    shown = "nothing" if found is None else f"{found!r:.80}"
    return ValueError(f"{where}: {field}: found {shown}, expected {expected}")


def checked_row(row: Any, where: str) -> Row:
    """Return a row without the fields that are null, and with "choices" as letter -> text.

    Raises ValueError "FILE: line N: FIELD: found X, expected Y"; `where` is "FILE: line N".
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {type(row).__name__}, expected an object")
    found: Row = {field: value for field, value in row.items() if value is not None}
    question, kind = found.get("question"), found.get("kind", "free")
    if not isinstance(question, str) or not is_text(question):
        raise wrong(where, "question", question, "text")
    if not question.strip():
        raise wrong(where, "question", question, "one that is not empty")
    if kind not in KINDS:
        raise wrong(where, "kind", kind, f"one of {', '.join(KINDS)}")
    if "choices" in found:
        found["choices"] = options(found["choices"], where)
    return found


def options(choices: Any, where: str) -> dict[str, str]:
    """Return letter -> text, also from {"text": […], "label": […]}, without texts that are null."""
    if not isinstance(choices, dict) or not choices:
        raise wrong(where, "choices", choices, "an object, letter: text")
    texts, labels = choices.get("text"), choices.get("label")
    if isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels):
        choices = dict(zip(map(str, labels), texts, strict=True))
    found = {letter: text for letter, text in choices.items() if text is not None}
    for letter, text in found.items():
        if not letter.strip() or not isinstance(text, str) or not is_text(text):
            problem = f"found {letter!r:.20}: {text!r:.60}, expected a letter and a text"
            raise ValueError(f"{where}: choices: {problem}")
    return found


def read_rows(
    path: str | Path,
    check: Callable[[Any, str], Row] = checked_row,
    number: Callable[[str], Any] = finite,
) -> list[Row]:
    """Return the rows of a file, or of standard input for "-", each one as `check` returns it.

    Every row has a "question". `number` converts a number with a fraction or an exponent. Raises
    OSError, or ValueError naming the file and line, also for a file without rows.
    """
    text = sys.stdin.read() if str(path) == "-" else read_text(Path(path))
    rows = []
    # Not `splitlines`: U+2028 and U+0085 may stand inside a JSON text.
    for count, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}: line {count}"
            try:
                row = json.loads(line, parse_float=number, parse_constant=finite)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where}: found bad JSON ({error}), expected an object"
                ) from error
            rows.append(check(row, where))
    if not rows:
        raise ValueError(f"{path}: found no rows, expected one JSON object with a question a line")
    return rows


def kind_of(row: Row) -> str:
    """Return a row's own kind, else the one that its fields imply.

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


def batches(rows: list[Row], kind: str | None, size: int) -> Iterator[tuple[str, list[Row]]]:
    """Yield (kind, at most `size` rows of it in order); `kind` None: the row's own."""
    for name, run in groupby(rows, key=lambda row: kind or kind_of(row)):
        group = list(run)
        for start in range(0, len(group), size):
            yield name, group[start : start + size]
