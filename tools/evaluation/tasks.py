"""Load tasks by name: benchmarks from a folder of data files, and two generated tasks.

**The tiny task.** New questions for weights/tiny, none of which was used in its training. "tiny"
has 3 to 5 operations per question, as in its model card, and "tiny_wide" 1 to 6.

**Split evidence.** Each of three readers has its own note. The question is about the notes, but the
agent that answers has only the question, so a right answer must come through the KV cache of the
readers. Values are drawn for each row, all with the same probability, so a guess is right in 1 of
90 rows. There are 8 options per row, which are not shown; only their losses are measured.

    level 1    one note has the answer
    level 2    one note names the box, and another says what is in it
    level 3    two values from different notes are added

The data files come from tools/download.py. This module does not use models or methods.
"""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tools.training.tiny_task import story

from .grading import code_program as code_program  # for users of a task's rows
from .rows import Row, read_rows
from .rows import kind_of as kind_of  # for users of a task's rows


class Task(NamedTuple):
    """The kind of a task's questions, and the possible names of its file in the data folder.

    The first file that exists is used. A generated task has no files.
    """

    kind: str
    files: tuple[str, ...] = ()


TASKS = {
    "gsm8k": Task("math", ("gsm8k.jsonl", "gsm8k_test.jsonl")),
    "aime2024": Task("math", ("aime2024.jsonl",)),
    "aime2025": Task("math", ("aime2025.jsonl",)),
    "gpqa_diamond": Task("choice", ("gpqa_diamond.jsonl",)),
    "medqa": Task("choice", ("medqa.jsonl",)),
    "arc_easy": Task("choice", ("arc_easy.jsonl", "arc_easy_test.jsonl")),
    "arc_challenge": Task("choice", ("arc_challenge.jsonl", "arc_challenge_test.jsonl")),
    "mbppplus": Task("code", ("mbppplus.jsonl",)),
    "humanevalplus": Task("code", ("humanevalplus.jsonl",)),
    "tiny": Task("math"),
    "tiny_wide": Task("math"),
    "split_evidence": Task("math"),
    "split_evidence_2": Task("math"),
    "split_evidence_3": Task("math"),
}
DEFAULT_COUNT = 100  # rows that are generated without a limit


def load_task(
    name: str, data_dir: str | Path = "data", limit: int | None = None, seed: int = 0
) -> list[Row]:
    """Return the first `limit` rows of a task. Generated tasks depend on `seed`.

    Raises ValueError for an unknown name or a wrong file, and FileNotFoundError if the file has to
    be downloaded first.
    """
    if name not in TASKS:
        raise ValueError(f"--task: found {name!r}, expected one of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit: found {limit}, expected 1 or more")
    task = TASKS[name]
    if name in TINY_OPERATIONS:
        return tiny_rows(limit or DEFAULT_COUNT, seed, name)
    if not task.files:
        level = int(name.partition("evidence_")[2] or 1)
        return split_evidence(limit or DEFAULT_COUNT, seed, level)
    for file in task.files:
        if (path := Path(data_dir) / file).exists():
            return [{"kind": task.kind} | row for row in read_rows(path)[:limit]]
    expected = f"expected the file that this command downloads: python tools/download.py {name}"
    raise FileNotFoundError(f"{data_dir}: found no {' or '.join(task.files)}, {expected}")


# -- the tiny task ----------------------------------------------------------------------------

TINY_OPERATIONS = {"tiny": (3, 4, 5), "tiny_wide": (1, 2, 3, 4, 5, 6)}


def tiny_rows(count: int, seed: int = 0, name: str = "tiny") -> list[Row]:
    """Return `count` rows of "tiny" or "tiny_wide". The number of operations is drawn for each."""
    rng, rows = random.Random(f"claims {seed}"), list[Row]()  # the questions of docs/claims.md
    for i in range(count):
        told = story(rng, rng.choice(TINY_OPERATIONS[name]), fresh=True)
        answer = str(told.totals[-1])
        row = {"id": f"{name.replace('_', '-')}-{i}", "question": told.question, "kind": "math"}
        rows.append(row | {"answer": answer, "solution": f" {answer}", "chance": 1 / 9})
    return rows


# -- split evidence ---------------------------------------------------------------------------

LEVELS = (1, 2, 3)
LOWEST, VALUES = 10, 90  # values are 10 … 99
LOWEST_SUM = 60  # sums are 60 … 149
OPTIONS, READERS = 8, 3
COLOURS = "red blue green yellow black white brown pink grey orange".split()
PEOPLE = "Ann Ben Carl Dora Emil Fay Gus Hana Ivan Jill".split()
READER = (
    "You are reader {number} of a team, and only you have the note below. State its facts: "
    "another agent, who cannot read it, will be asked about them.\n\nNote: {note}"
)
ANSWERER = (
    "You answer for a team. Its readers have read notes that you have not seen, and what they "
    "read is in the work so far.\n\nQuestion: {question}{context}\n\n{form}"
)


def split_evidence(count: int, seed: int = 0, level: int = 1) -> list[Row]:
    """Return `count` rows of split evidence. Row i depends only on `seed`, `level` and i.

    Raises ValueError for an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"level: found {level}, expected one of {', '.join(map(str, LEVELS))}")
    return [split_row(seed, level, i) for i in range(count)]


class Puzzle(NamedTuple):
    """The parts of a row that depend on its level."""

    notes: list[str]
    question: str
    answer: int
    steps: list[str]  # of the solution


def split_row(seed: int, level: int, i: int) -> Row:
    """Return row i of split evidence."""
    draw = random.Random(f"split evidence {level} {seed} {i}")
    colours = draw.sample(COLOURS, 2 * READERS)
    numbers = draw.sample(range(LOWEST, LOWEST + VALUES), len(colours))
    values = dict(zip(colours, numbers, strict=True))
    make_puzzle = {1: one_note, 2: two_notes, 3: sum_of_two}[level]
    notes, question, answer, steps = make_puzzle(draw, colours, values)
    draw.shuffle(notes)
    readers = [
        {"name": f"reader {n}", "prompt": READER.format(number=n, note=note)}
        for n, note in enumerate(notes, 1)
    ]
    shown_values = values.values() if level < 3 else []
    return {
        "id": f"split-evidence-{level}-{seed}-{i}",
        "question": question,
        "answer": str(answer),
        "solution": " ".join(steps) + f"\n\\boxed{{{answer}}}",
        "choices": options(answer, shown_values, level, seed, i, draw),
        # The options are used only for their losses: if they were shown, small models would answer
        # with a letter.
        "kind": "math",
        "chance": 1 / VALUES,
        "level": level,
        "team": {"parallel": True, "agents": [*readers, {"name": "answerer", "prompt": ANSWERER}]},
    }


def one_note(draw: random.Random, colours: list[str], values: dict[str, int]) -> Puzzle:
    """Return a puzzle of level 1, in which one note has the answer."""
    notes = dealt(colours, values, READERS)
    [asked] = draw.sample(colours, 1)
    question = f"How many coins does the {asked} box hold?"
    return Puzzle(notes, question, values[asked], [fact(asked, values)])


def two_notes(draw: random.Random, colours: list[str], values: dict[str, int]) -> Puzzle:
    """Return a puzzle of level 2, in which one note names the box and another its content."""
    people = draw.sample(PEOPLE, 4)
    colours = colours[: len(people)]
    owns = dict(zip(people, draw.sample(colours, len(people)), strict=True))
    owners = " ".join(f"{person} has the {colour} box." for person, colour in owns.items())
    notes = [owners, *dealt(colours, values, READERS - 1)]
    person = draw.choice(people)
    colour = owns[person]
    steps = [f"{person} has the {colour} box.", fact(colour, values)]
    return Puzzle(notes, f"How many coins does the box of {person} hold?", values[colour], steps)


def sum_of_two(draw: random.Random, colours: list[str], values: dict[str, int]) -> Puzzle:
    """Return a puzzle of level 3, in which two values are added. Changes `values`."""
    first, second = colours[0], colours[2]  # from different notes
    # The sum is drawn first. If both numbers were drawn, some sums would be more likely.
    answer = draw.randrange(LOWEST_SUM, LOWEST_SUM + VALUES)
    values[first] = draw.randint(max(10, answer - 99), min(99, answer - 10))
    values[second] = answer - values[first]
    question = f"How many coins do the {first} box and the {second} box hold together?"
    steps = [fact(first, values), fact(second, values)]
    steps.append(f"{values[first]} + {values[second]} = {answer}.")
    return Puzzle(dealt(colours, values, READERS), question, answer, steps)


def fact(colour: str, values: dict[str, int]) -> str:
    """Return the sentence that says how many coins a box holds."""
    return f"The {colour} box holds {values[colour]} coins."


def dealt(colours: list[str], values: dict[str, int], readers: int) -> list[str]:
    """Return one note per reader. Each has the facts of the same number of boxes, in order."""
    size = len(colours) // readers
    facts = [fact(colour, values) for colour in colours]
    return [" ".join(facts[n * size : (n + 1) * size]) for n in range(readers)]


def options(
    answer: int, shown_values: Iterable[int], level: int, seed: int, i: int, draw: random.Random
) -> dict[str, str]:
    """Return the answer and other values as options, letter -> text.

    Values from the notes are used first. In `OPTIONS` successive rows the answer has each letter
    once.
    """
    low = LOWEST_SUM if level == 3 else LOWEST
    others = [value for value in shown_values if value != answer]
    rest = [value for value in range(low, low + VALUES) if value != answer and value not in others]
    others += draw.sample(rest, OPTIONS - 1 - len(others))
    draw.shuffle(others)
    places = list(range(OPTIONS))
    random.Random(f"places {level} {seed} {i // OPTIONS}").shuffle(places)
    others.insert(places[i % OPTIONS], answer)
    return {chr(ord("a") + n): str(value) for n, value in enumerate(others)}
