"""Questions in a file: JSON Lines, one object with a question per line.

Does not know: right answers, benchmarks.
"""

import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from .text.tokenizer import is_text, read_text

Row = dict[str, Any]


def parse_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("FILE: line N", parsed JSON value) for each line of a file that is not blank.

    Raises ValueError naming the file and line if the text is not UTF-8 or a line is not JSON.
    """
    # Not `splitlines`: U+2028 and U+0085 may stand inside a JSON text.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not valid JSON ({error})") from error


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file. Every row has a "question", and "choices" if there are options.

    Raises ValueError "FILE: line N: field: found X, expected Y", also for a file without rows.
    """
    rows = []
    for where, row in parse_lines(path):
        question = row.get("question") if isinstance(row, dict) else None
        if not isinstance(question, str) or not question.strip() or not is_text(question):
            raise ValueError(
                f"{where}: question: found {question!a:.80}, expected a text, not empty"
            )
        choices = row.get("choices")
        if choices is not None and not (isinstance(choices, dict) and choices):
            raise ValueError(
                f"{where}: choices: found {choices!r:.80}, expected an object, letter: text"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: found no rows, expected one JSON object with a question a line")
    return rows


def kind_of(row: Row) -> str:
    """Return the kind of a question by the fields of its row.

    "choices" makes it "choice", tests make it "code", a number as "answer" makes it "math".
    Every other row is "free".
    """
    if row.get("choices"):
        return "choice"
    if row.keys() & {"tests", "test_list", "entry_point"}:
        return "code"
    is_number = re.fullmatch(r"\s*[-+]?[\d.,/]+\s*", str(row.get("answer", "")))
    return "math" if is_number else "free"


def batches(rows: list[Row], kind: str | None, size: int) -> Iterator[tuple[str, list[Row]]]:
    """Yield (kind, at most `size` rows of it in order); `kind` None: the row's own."""
    for name, run in groupby(rows, key=lambda row: kind or kind_of(row)):
        group = list(run)
        for start in range(0, len(group), size):
            yield name, group[start : start + size]
