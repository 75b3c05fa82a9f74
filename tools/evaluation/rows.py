"""Questions from a JSONL file, checked, with every mistake named by its line and field.

A row is {"id", "question", "answer"} and, if present: "solution" (a worked answer, for the loss),
"choices" (letter -> text), "tests" (a program), "entry_point", "kind", "chance" (the probability
that a guess is right), "team" (agents for this row alone). The shapes of MBPP+ and HumanEval+ are
accepted too: tests in "answer" or "test_list", and "canonical_solution".

Does not know: tasks, models, grading.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimas.answers import KINDS, extract

Row = dict[str, Any]
FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str, int), "question": (str,), "answer": (str, int, float), "solution": (str,),
    "choices": (dict,), "tests": (str,), "test_list": (list,), "entry_point": (str,),
    "kind": (str,), "chance": (int, float), "team": (dict,),
}  # fmt: skip
MAY_NOT_BE_EMPTY = ("id", "question", "answer", "tests", "choices")
TYPE_NAMES = {
    str: "text", int: "a number", float: "a number", dict: "an object", list: "a list",
}  # fmt: skip
SHOWN_TESTS = 3  # MBPP+ questions do not name the function; their first tests do


def read_rows(path: str | Path) -> list[Row]:
    """Read every row of a JSONL file, checked and in one shape. Empty lines are skipped.

    Raises ValueError "FILE: line N: FIELD: found X, expected Y", FileNotFoundError for a missing
    file.
    """
    rows: dict[str, Row] = {}
    lines: dict[str, int] = {}
    for number, found in json_lines(Path(path)):
        where = f"{path}: line {number}"
        row = checked_row(found, where)
        id_ = row["id"]
        if id_ in rows:
            expected = f"expected it once (first in line {lines[id_]})"
            raise ValueError(f"{where}: id: found {id_!r} again, {expected}")
        rows[id_], lines[id_] = row, number
    if not rows:
        raise ValueError(f"{path}: found no rows, expected one JSON object a line")
    return list(rows.values())


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, value) of every line that is not empty. Raises as `read_rows`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: found no such file, expected JSON lines") from error
    except UnicodeDecodeError as error:
        problem = f"found bytes that are not UTF-8 ({error}), expected JSON lines"
        raise ValueError(f"{path}: {problem}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"found bad JSON ({error}), expected an object"
            raise ValueError(f"{path}: line {number}: {problem}") from error


def checked_row(row: Any, where: str) -> Row:
    """Return a row in the one shape that the tools use. Raises ValueError starting with `where`."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {type(row).__name__}, expected an object")
    for field in ("id", "question", "answer"):
        if row.get(field) is None and not (field == "answer" and row.get("tests") is not None):
            expected = TYPE_NAMES[FIELD_TYPES[field][0]]
            raise ValueError(f"{where}: {field}: found nothing, expected {expected}")
    row = {field: value for field, value in row.items() if value is not None}
    for field, types in FIELD_TYPES.items():
        if field not in row:
            continue
        value = row[field]
        if not isinstance(value, types) or isinstance(value, bool):
            expected = TYPE_NAMES[types[0]]
            raise ValueError(f"{where}: {field}: found {value!r:.80}, expected {expected}")
        if field in MAY_NOT_BE_EMPTY and (value in ("", {}) or str(value).isspace()):
            problem = f"found {value!r:.80}, expected one that is not empty"
            raise ValueError(f"{where}: {field}: {problem}")
    row["id"] = str(row["id"])
    if "choices" in row:
        check_choices(row, where)
    if "kind" in row and row["kind"] not in KINDS:
        problem = f"found {row['kind']!r:.80}, expected one of {', '.join(KINDS)}"
        raise ValueError(f"{where}: kind: {problem}")
    return code_row(row) if kind_of(row) == "code" else row | {"answer": str(row["answer"])}


def check_choices(row: Row, where: str) -> None:
    """Raise ValueError if the options are not texts, or a choice's answer is none of them."""
    for letter, text in row["choices"].items():
        if not letter.strip() or not isinstance(text, str):
            problem = f"found {letter!r:.20}: {text!r:.60}, expected a letter and a text"
            raise ValueError(f"{where}: choices: {problem}")
    answer = str(row.get("answer"))
    if row.get("kind", "choice") == "choice" and option_of(answer, row["choices"]) is None:
        expected = f"expected one of {', '.join(row['choices'])}"
        raise ValueError(f"{where}: answer: found {answer!r:.60}, {expected}")


def code_row(row: Row) -> Row:
    """Return a row of MBPP+ or HumanEval+ with "tests", "answer" and, if known, "solution"."""
    row.setdefault("tests", row.get("answer"))
    row.setdefault("answer", row["tests"])
    if "test_list" in row:
        shown = "\n".join(str(test) for test in row["test_list"][:SHOWN_TESTS])
        row["question"] = f"{row['question'].rstrip()}\nIt must pass these tests:\n{shown}"
    if "canonical_solution" in row:
        # A solution of HumanEval continues the question.
        head = row["question"] if "entry_point" in row else ""
        row.setdefault("solution", f"```python\n{(head + row['canonical_solution']).strip()}\n```")
    return row


def kind_of(row: Row) -> str:
    """Return a row's own kind, else the one that its fields imply.

    Choices imply a choice, tests code, and a numeric answer math. Anything else is free.
    """
    if "kind" in row:
        return str(row["kind"])
    if row.get("choices"):
        return "choice"
    if row.keys() & {"tests", "test_list", "entry_point"}:
        return "code"
    return "math" if re.fullmatch(r"\s*[-+]?[\d.,/]+\s*", str(row.get("answer", ""))) else "free"


def option_of(answer: str, choices: dict[str, str]) -> str | None:
    """Return the key of the option that a right answer names, None if it names no option.

    It may be named as "B", "(b)", or by the option's text.
    """
    said = extract("choice", rf"\boxed{{{answer}}}", choices)
    return next((key for key in choices if key.strip().lower() == said), None)
