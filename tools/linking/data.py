"""Questions with solutions for a training: from a file, or generated.

    tiny[:OPS]              stories of tools/training/tiny_task.py, OPS operations (3,4,5)
    notes:N                 each of N readers has a number, and the question asks for one of them
    split_evidence[_2|_3]   as in tools/evaluation/tasks.py, but no row that tables use
    FILE.jsonl              as tools/evaluate.py reads it, with a solution in each row

Generated rows for training and for testing never meet: stories differ by checksum, other rows by
their seed. Does not know: models, training.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tools.evaluation.rows import Row, read_rows
from tools.evaluation.tasks import COLOURS, LEVELS, LOWEST, VALUES, split_row
from tools.training.tiny_task import MAX_OPERATIONS, story

EXPECTED = "FILE.jsonl, tiny[:OPS], notes:N or split_evidence[_2|_3]"
TRAIN, HELD_OUT, TEST = 11, 12, 13  # seeds of generated rows; tables use small ones
# Short, and without a system message: reading is most of the work of an update.
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

    Of a file's rows in `limits` the last are held out and those before them tested; all others
    are trained on, in place of `train`. Raises ValueError for an unknown name, rows without a
    solution, or too few, and FileNotFoundError.
    """
    if name.endswith(".jsonl"):
        return from_file(name, held_out, test, limits)
    make = generator(name)

    def rows(count: int, part: int) -> list[Row]:
        return [make(part, seed, i) for i in range(count)]

    return Data(rows(train, TRAIN), rows(held_out, HELD_OUT), rows(test, TEST))


def from_file(name: str, held_out: int, test: int, limits: slice) -> Data:
    """Return the rows of a file in three parts; see `read_data`."""
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
    """Return rows of which each has the solution of the next one: a control."""
    solutions = [row["solution"] for row in rows]
    pairs = zip(rows, [*solutions[1:], solutions[0]], strict=True)
    return [{**row, "solution": solution} for row, solution in pairs]


def generator(name: str) -> Callable[[int, int, int], Row]:
    """Return a function of the part, the seed and the number of a row. Raises ValueError."""
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
    """Return a question that weights/tiny was made for; all but `TRAIN` are fresh texts."""
    draw = random.Random(f"link tiny {part} {seed} {i}")
    told = story(draw, draw.choice(operations), fresh=part != TRAIN)
    answer = str(told.totals[-1])
    return {
        "id": f"tiny-{part}-{seed}-{i}", "question": told.question, "answer": answer,
        "solution": f" {answer}", "kind": "math",
    }  # fmt: skip


def notes_row(count: int, part: int, seed: int, i: int) -> Row:
    """Return a question about one of `count` notes. Its solution is two digits and nothing else.

    A guess costs (ln 9 + ln 10) / 2 = 2.25 nats a digit, as numbers are 10 … 99. The last agent's
    turn begins with the sentence that the number completes, so that the loss is that of the digits.
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
