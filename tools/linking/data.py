"""Read or generate questions with solutions, on which a link is trained.

    tiny[:OPS]              stories of tools/training/tiny_task.py with OPS operations (3,4,5)
    notes:N                 each of N readers has a number, and the question asks for one of them
    split_evidence[_2|_3]   as in tools/evaluation/tasks.py, but not the rows of evaluations
    FILE.jsonl              as tools/evaluate.py reads it, with a solution in each row

Generated rows for training and for testing are drawn separately: the texts of stories have other
checksums, and other rows have another seed. This module does not use models.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tools.evaluation.rows import Row, read_rows
from tools.evaluation.tasks import COLOURS, LEVELS, LOWEST, VALUES, split_row
from tools.training.tiny_task import MAX_OPERATIONS, story

EXPECTED = "FILE.jsonl, tiny[:OPS], notes:N or split_evidence[_2|_3]"
TRAIN, HELD_OUT, TEST = 11, 12, 13  # seeds of generated rows; evaluations use smaller ones
# Short and without a system message, because prefilling is most of the work of an update.
NOTE = "Remember: The {colour} box holds {number} coins."


class Data(NamedTuple):
    """Rows to train on, rows for the held-out loss, and rows for the final test."""

    train: list[Row]
    held_out: list[Row]
    test: list[Row]


def read_data(
    name: str, train: int, held_out: int, test: int, limits: slice, seed: int = 0
) -> Data:
    """Return the rows of a file or generator.

    From a file, only rows in `limits` are used: the last `held_out` rows for the held-out loss, the
    `test` rows before them for the test, and all others for training, whatever `train` is. Raises
    ValueError for an unknown name, a row without a solution or too few rows, and FileNotFoundError
    for a missing file.
    """
    if name.endswith(".jsonl"):
        return from_file(name, held_out, test, limits)
    if limits != slice(None):
        raise ValueError(f"--rows: found with --data {name}, expected a file: FILE.jsonl")
    make = generator(name)

    def rows(count: int, part: int) -> list[Row]:
        return [make(part, seed, i) for i in range(count)]

    return Data(rows(train, TRAIN), rows(held_out, HELD_OUT), rows(test, TEST))


def from_file(name: str, held_out: int, test: int, limits: slice) -> Data:
    """Return the rows of a file in three parts. See `read_data`."""
    rows = read_rows(name)[limits]
    for row in rows:
        if not str(row.get("solution", "")).strip():
            raise ValueError(
                f"{name}: {row['id']}: solution: found nothing, expected a worked answer"
            )
    kept = held_out + test
    if len(rows) <= kept:
        raise ValueError(
            f"{name}: found {len(rows)} rows, expected more than {kept}, "
            "those of --held-out and --test"
        )
    end = len(rows) - held_out
    return Data(rows[: end - test], rows[end:], rows[end - test : end])


def rotated(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, each with the solution of the next row, as a control."""
    solutions = [row["solution"] for row in rows]
    pairs = zip(rows, [*solutions[1:], solutions[0]], strict=True)
    return [{**row, "solution": solution} for row, solution in pairs]


def generator(name: str) -> Callable[[int, int, int], Row]:
    """Return a function (part, seed, number) -> row. Raises ValueError for an unknown name."""
    kind, _, value = name.partition(":")
    if kind == "tiny":
        numbers = value.split(",") if value else ["3", "4", "5"]
        known = [str(n) for n in range(MAX_OPERATIONS + 1)]
        if all(number in known for number in numbers):
            return lambda part, seed, i: tiny_row(list(map(int, numbers)), part, seed, i)
    if kind == "notes" and value.isdecimal() and 1 <= int(value) <= len(COLOURS):
        return lambda part, seed, i: notes_row(int(value), part, seed, i)
    levels = {f"split_evidence{f'_{level}' * (level > 1)}": level for level in LEVELS}
    if name in levels:
        return lambda part, seed, i: split_row(1000 * seed + part, levels[name], i)
    raise ValueError(f"--data: found {name!r}, expected {EXPECTED}")


def tiny_row(operations: list[int], part: int, seed: int, i: int) -> Row:
    """Return a question of the task of weights/tiny. Its text is fresh, except in `TRAIN`."""
    draw = random.Random(f"link tiny {part} {seed} {i}")
    told = story(draw, draw.choice(operations), fresh=part != TRAIN)
    answer = str(told.totals[-1])
    return {
        "id": f"tiny-{part}-{seed}-{i}", "question": told.question, "answer": answer,
        "solution": f" {answer}", "kind": "math",
    }  # fmt: skip


def notes_row(count: int, part: int, seed: int, i: int) -> Row:
    """Return a question about one of `count` notes. Its solution is two digits and nothing else.

    A guess costs (ln 9 + ln 10) / 2 = 2.25 nats per digit, because numbers are 10 … 99. The last
    agent's turn begins with the sentence that the number completes, so that the loss includes only
    the digits.
    """
    draw = random.Random(f"link notes {part} {seed} {i}")
    colours = draw.sample(COLOURS, count)
    numbers = draw.sample(range(LOWEST, LOWEST + VALUES), count)
    [asked] = draw.sample(range(count), 1)
    readers = [
        {
            "name": f"reader {n}",
            "system": "",
            "prompt": NOTE.format(colour=colour, number=number),
        }
        for n, (colour, number) in enumerate(zip(colours, numbers, strict=True), 1)
    ]
    last = {
        "name": "answerer",
        "system": "",
        "prompt": "{question}",
        "prefix": f"The {colours[asked]} box holds ",
    }
    return {
        "id": f"notes-{count}-{part}-{seed}-{i}",
        "question": f"How many coins does the {colours[asked]} box hold?",
        "answer": str(numbers[asked]), "solution": str(numbers[asked]), "kind": "math",
        "team": {"parallel": True, "agents": [*readers, last]},
    }  # fmt: skip
