"""Read questions and their right answers from a JSONL file.

A row is read by `minimas.rows` and has "id", "question" and "answer". It may have "solution" (a
worked answer, for the loss), "choices" (letter -> text), "tests" (a program), "entry_point",
"kind", "chance" (the probability that a guess is right), and "team" (agents for this row only). The
formats of MBPP+, HumanEval+ and GSM8K are accepted too: tests in "answer" or "test_list",
"canonical_solution", and an answer that is a solution with "#### 9" at its end. Errors name the
line and the field. This module does not use tasks, models or grading.
"""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

from minimas import Team, rows
from minimas.answers import extract
from minimas.rows import NUMBER, Row, kind_of
from minimas.text.tokenizer import read_text

__all__ = ["Row", "kind_of", "option_of", "own_team", "read_rows"]

FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str, int), "answer": (str, int, Decimal), "solution": (str,), "tests": (str,),
    "test_list": (list,), "entry_point": (str,), "chance": (int, Decimal), "team": (dict,),
    "canonical_solution": (str,), "test_imports": (list,),
}  # fmt: skip
MAY_NOT_BE_EMPTY = ("id", "answer", "tests")
TYPE_NAMES = {str: "text", int: "a number", dict: "an object", list: "a list"}
SHOWN_TESTS = 3  # a question of MBPP+ does not name the function, but its first tests do


def read_rows(path: str | Path) -> list[Row]:
    """Read and check all rows of a JSONL file, and return them in one format.

    Empty lines are skipped. Raises ValueError with the text "FILE: line N: FIELD: found X, expected
    Y", and FileNotFoundError if the file is missing.
    """
    path, lines = Path(path), dict[str, int]()
    if not path.exists():
        raise FileNotFoundError(f"{path}: found no such file, expected JSON lines")
    found = rows.read_rows(path)
    sources = enumerate(read_text(path).split("\n"), start=1)
    numbers = [line for line, source in sources if source.strip()]  # blank lines are not rows
    for i, line in enumerate(numbers):
        try:
            found[i] = checked_row(found[i])
            first = lines.setdefault(found[i]["id"], line)
            if first != line:
                expected = f"expected it only once (it is also in line {first})"
                raise ValueError(f"id: found {found[i]['id']!r} again, {expected}")
        except ValueError as error:
            raise ValueError(f"{path}: line {line}: {error}") from error
    return found


def wrong(field: str, found: Any, expected: str) -> ValueError:
    """Return the error for one field of a row."""
    shown = "nothing" if found is None else f"{found!r:.80}"
    return ValueError(f"{field}: found {shown}, expected {expected}")


def checked_row(row: Row) -> Row:
    """Return a row in the format of the tools. Raises ValueError naming a wrong field."""
    if not row.keys() & {"answer", "tests", "test_list"}:
        raise wrong("answer", None, "text")
    for field, types in FIELD_TYPES.items():
        value = row.get(field, "-")
        if field in row and (not isinstance(value, types) or isinstance(value, bool)):
            raise wrong(field, value, TYPE_NAMES[types[0]])
        if field in MAY_NOT_BE_EMPTY and not str(value).strip():
            raise wrong(field, value, "one that is not empty")
        if isinstance(value, list) and {*map(type, value)} - {str}:
            raise wrong(field, value, "a list of texts")
    if not 0 <= row.get("chance", 0) <= 1:
        raise wrong("chance", row["chance"], "0 to 1")
    if isinstance(row.get("answer"), Decimal):
        row["answer"] = f"{row['answer']:f}"  # with the digits of the file, without an exponent
    row = json.loads(json.dumps(row, default=float))  # other numbers become int and float
    row["id"] = str(row["id"])
    if kind_of(row) == "choice":
        answer = str(row.get("answer"))
        options = row.get("choices") or dict.fromkeys("abcdefghij", "")
        if option_of(answer, options) is None:
            raise wrong("answer", answer, f"one of {', '.join(options)}")
    if kind_of(row) == "code":
        return code_row(row)
    row["answer"] = str(row["answer"])
    number = NUMBER.fullmatch(row["answer"])
    if kind_of(row) == "math" and number and number[1]:  # in GSM8K the answer is a solution
        row = {"solution": row["answer"]} | row | {"answer": number[2]}
    return row


def code_row(row: Row) -> Row:
    """Return a row of a programming task with "tests", "answer" and, if known, "solution"."""
    row.setdefault("tests", row.get("answer", "\n".join(row.get("test_list", []))))
    row.setdefault("answer", row["tests"])
    if not isinstance(row["tests"], str):
        raise wrong("tests", row["tests"], "a program, as text")
    if "test_list" in row:
        shown = "\n".join(row["test_list"][:SHOWN_TESTS])
        row["question"] = f"{row['question'].rstrip()}\nIt must pass these tests:\n{shown}"
    if "canonical_solution" in row:
        # A solution of HumanEval continues the question.
        head = row["question"] if "entry_point" in row else ""
        row.setdefault("solution", f"```python\n{(head + row['canonical_solution']).strip()}\n```")
    return row


def own_team(row: Row) -> Team:
    """Return the team in a row. Raises ValueError naming the row if it is not valid."""
    return Team.from_dict(row["team"], f"{row['id']}: team")


def option_of(answer: str, choices: dict[str, str]) -> str | None:
    """Return the key of the option that an answer names, or None if it names no option.

    The answer may be "B", "(b)", or the text of the option.
    """
    said = extract("choice", rf"\boxed{{{answer}}}", choices)
    return next((key for key in choices if key.strip().lower() == said), None)
