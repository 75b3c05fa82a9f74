"""Rows to evaluate on: read from JSONL with every mistake named, found by a task's name, or made here from a seed.

A row is {"id", "question", "answer"} and, as they come, "solution" (a worked answer, for the loss), "choices" (letter
to text), "tests" (a program), "entry_point", "kind", "chance" (of a guess), "team" (agents for this row alone).
`read_rows` also takes the shapes of MBPP+ and HumanEval+: tests in "answer" or "test_list", "canonical_solution".

**Split evidence** is made here. Each of three readers has its own note; the question needs the notes, and the one who
answers has only the question, so that whatever is right came through the memory. Values are drawn anew for each row,
all alike, so that a guess is right in 1 of 90 rows, and in 1 of 8 among the options (for the loss of each option: they
are not shown). Level 1: one note has the answer. Level 2: one note leads to another. Level 3: two values of different
notes are added.

Does not know: models, methods, how answers are graded or programs run, and where the files come from (download.py).
"""

import json
import random
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from minimas.answers import KINDS, extract

Row = dict[str, Any]


class Task(NamedTuple):
    """Where a benchmark's rows lie in a data folder: the first file that is there; none for one made here."""

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
    "split_evidence": Task("math"),
    "split_evidence_2": Task("math"),
    "split_evidence_3": Task("math"),
}
GENERATED = 100  # rows, where no limit says how many


def load_task(
    name: str, data_dir: str | Path = "data", limit: int | None = None, seed: int = 0
) -> list[Row]:
    """The rows of a task by name, the first `limit` of them; `seed` is for those made here.

    Raises ValueError for an unknown name and a wrong file, FileNotFoundError where the file has to be downloaded first.
    """
    if name not in TASKS:
        raise ValueError(f"--task: found {name!r}, expected one of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit: found {limit}, expected 1 or more")
    if not TASKS[name].files:
        return split_evidence(limit or GENERATED, seed, int(name.partition("evidence_")[2] or 1))
    for file in TASKS[name].files:
        if (path := Path(data_dir) / file).exists():
            rows = read_rows(path)
            for row in rows:
                row.setdefault("kind", TASKS[name].kind)
            return rows[:limit]
    wanted = " or ".join(TASKS[name].files)
    raise FileNotFoundError(
        f"{data_dir}: found no {wanted}, expected it from: python tools/download.py {name}"
    )


# -- rows in files ----------------------------------------------------------------------------------------------------

FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str, int), "question": (str,), "answer": (str, int, float), "solution": (str,), "choices": (dict,),
    "tests": (str,), "test_list": (list,), "entry_point": (str,), "kind": (str,), "chance": (int, float),
    "team": (dict,),
}  # fmt: skip
MAY_NOT_BE_EMPTY = ("id", "question", "answer", "tests", "choices")
NAMES = {str: "text", int: "a number", float: "a number", dict: "an object", list: "a list"}


def read_rows(path: str | Path) -> list[Row]:
    """Every row of a JSONL file, checked and in one shape; empty lines are skipped.

    Raises ValueError "FILE: line N: FIELD: found X, expected Y", FileNotFoundError for a missing file.
    """
    path, rows, lines = Path(path), [], {}
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: found no such file, expected JSON lines") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: found bytes that are not UTF-8 ({error}), expected JSON lines"
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: found bad JSON ({error}), expected an object") from error
        row = _checked(row, where)
        if row["id"] in lines:
            first = lines[row["id"]]
            raise ValueError(
                f"{where}: id: found {row['id']!r} again, expected it once (first in line {first})"
            )
        lines[row["id"]] = number
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: found no rows, expected one JSON object a line")
    return rows


def option_of(answer: str, choices: dict[str, str]) -> str | None:
    """The key of the option that a right answer names in any dress, "B", "(b)" or the option's text; else None."""
    said = extract("choice", rf"\boxed{{{answer}}}", choices)
    return next((key for key in choices if key.strip().lower() == said), None)


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {type(row).__name__}, expected an object")
    for field in ("id", "question", "answer"):
        if row.get(field) is None and not (field == "answer" and row.get("tests") is not None):
            raise ValueError(f"{where}: {field}: found nothing, expected {NAMES[FIELDS[field][0]]}")
    for field, types in FIELDS.items():
        value = row.get(field)
        if (
            field in row
            and value is not None
            and (not isinstance(value, types) or isinstance(value, bool))
        ):
            raise ValueError(f"{where}: {field}: found {value!r:.80}, expected {NAMES[types[0]]}")
        if field in MAY_NOT_BE_EMPTY and (value in ("", {}) or str(value).isspace()):
            raise ValueError(
                f"{where}: {field}: found {value!r:.80}, expected one that is not empty"
            )
    row = {field: value for field, value in row.items() if value is not None}
    row["id"] = str(row["id"])
    if "choices" in row:
        for letter, text in row["choices"].items():
            if not letter.strip() or not isinstance(text, str):
                raise ValueError(
                    f"{where}: choices: found {letter!r:.20}: {text!r:.60}, expected a letter and a text"
                )
        answer = str(row.get("answer"))
        if row.get("kind", "choice") == "choice" and option_of(answer, row["choices"]) is None:
            raise ValueError(
                f"{where}: answer: found {answer!r:.60}, expected one of {', '.join(row['choices'])}"
            )
    if "kind" in row and row["kind"] not in KINDS:
        raise ValueError(
            f"{where}: kind: found {row['kind']!r:.80}, expected one of {', '.join(KINDS)}"
        )
    if kind_of(row) == "code":
        return _code(row)
    return row | {"answer": str(row["answer"])}


def kind_of(row: Row) -> str:
    """A row's own kind, else: choices are a choice, tests code, a numeric answer math, anything else free."""
    if "kind" in row:
        return str(row["kind"])
    if row.get("choices"):
        return "choice"
    if row.keys() & {"tests", "test_list", "entry_point"}:
        return "code"
    return "math" if re.fullmatch(r"\s*[-+]?[\d.,/]+\s*", str(row.get("answer", ""))) else "free"


# -- programs ---------------------------------------------------------------------------------------------------------

SHOWN = 3  # tests in the question of MBPP+, which else would not say what the function is called


def _code(row: Row) -> Row:
    row.setdefault("tests", row.get("answer"))
    row.setdefault("answer", row["tests"])
    if "test_list" in row:
        shown = "\n".join(str(test) for test in row["test_list"][:SHOWN])
        row["question"] = f"{row['question'].rstrip()}\nIt must pass these tests:\n{shown}"
    if "canonical_solution" in row:
        head = (
            row["question"] if "entry_point" in row else ""
        )  # HumanEval's solutions go on where the question ends
        row.setdefault("solution", f"```python\n{(head + row['canonical_solution']).strip()}\n```")
    return row


def code_program(row: Row, text: str) -> str:
    """One program: the code that the answer `text` gives, then the row's tests. It passes if it runs to its end.

    HumanEval's question is a program too, with imports and helpers that answers leave out: it comes first. A text
    without a program is nothing, and the tests fail.
    """
    code = extract("code", text) or ""
    future = "\n".join(re.findall(FUTURE, code))  # must come first in a program
    parts = [re.sub(FUTURE, "", code), "\n".join(row.get("test_imports", [])), row["tests"]]
    if "entry_point" in row and _compiles(row["question"]):
        if code and not re.search(rf"\b{re.escape(row['entry_point'])}\b *[(=]", code):
            parts[0] = textwrap.indent(
                parts[0], "    "
            )  # the body alone: a completion of the question
        parts.insert(0, row["question"])
    parts.insert(0, future)
    # A bug of the data set's own: the test of HumanEval/32 unpacks the answer, and no program passes.
    return "\n\n".join(parts).replace(
        "_poly(*candidate(*inp), inp)", "_poly(*inp, candidate(*inp))"
    )


FUTURE = r"(?m)^from __future__ import .*$"


def _compiles(program: str) -> bool:
    try:
        compile(program, "question", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


# -- split evidence ---------------------------------------------------------------------------------------------------

LEVELS = (1, 2, 3)
SMALLEST, VALUES, OPTIONS, READERS = 10, 90, 8, 3  # values are 10 … 99, sums 60 … 149
COLOURS = "red blue green yellow black white brown pink grey orange".split()
PEOPLE = "Ann Ben Carl Dora Emil Fay Gus Hana Ivan Jill".split()
READER = (
    "You are reader {number} of a team, and only you have the note below. State its facts: another agent, who cannot "
    "read it, will be asked about them.\n\nNote: {note}"
)
ANSWERER = (
    "You answer for a team. Its readers have read notes that you have not seen, and what they read is in the work so "
    "far.\n\nQuestion: {question}{context}\n\n{form}"
)


def split_evidence(count: int, seed: int = 0, level: int = 1) -> list[Row]:
    """`count` rows of split evidence; more rows of the same seed and level begin with the same ones."""
    if level not in LEVELS:
        raise ValueError(f"level: found {level}, expected one of {', '.join(map(str, LEVELS))}")
    return [_split(seed, level, i) for i in range(count)]


def _split(seed: int, level: int, i: int) -> Row:
    draw = random.Random(f"split evidence {level} {seed} {i}")
    colours = draw.sample(COLOURS, 2 * READERS)
    values = dict(
        zip(colours, draw.sample(range(SMALLEST, SMALLEST + VALUES), len(colours)), strict=True)
    )
    if level == 1:
        notes, [first] = _dealt(colours, values, READERS), draw.sample(colours, 1)
        question, answer = f"How many coins does the {first} box hold?", values[first]
        steps = [_holds(first, values)]
    elif level == 2:
        people = draw.sample(PEOPLE, 4)
        colours = colours[: len(people)]
        owns = dict(zip(people, draw.sample(colours, len(people)), strict=True))
        owners = " ".join(f"{person} has the {colour} box." for person, colour in owns.items())
        notes, person = [owners, *_dealt(colours, values, READERS - 1)], draw.choice(people)
        question, answer = f"How many coins does the box of {person} hold?", values[owns[person]]
        steps = [f"{person} has the {owns[person]} box.", _holds(owns[person], values)]
    else:
        first, second = colours[0], colours[2]  # in two notes
        # The sum is drawn first: of two numbers drawn alike, some sums are likelier than others.
        answer = draw.randrange(60, 60 + VALUES)
        values[first] = draw.randint(max(10, answer - 99), min(99, answer - 10))
        values[second] = answer - values[first]
        notes = _dealt(colours, values, READERS)
        question = f"How many coins do the {first} box and the {second} box hold together?"
        steps = [
            _holds(first, values),
            _holds(second, values),
            f"{values[first]} + {values[second]} = {answer}.",
        ]
    draw.shuffle(notes)
    readers = [
        {"name": f"reader {n}", "prompt": READER.format(number=n, note=note)}
        for n, note in enumerate(notes, 1)
    ]
    return {
        "id": f"split-evidence-{level}-{seed}-{i}",
        "question": question,
        "answer": str(answer),
        "solution": " ".join(steps) + f"\n\\boxed{{{answer}}}",
        "choices": _options(answer, list(values.values()) * (level < 3), level, seed, i, draw),
        "kind": "math",  # the options are for the loss: shown, small models choose a letter and not a value
        "chance": 1 / VALUES,
        "level": level,
        "team": {"parallel": True, "agents": [*readers, {"name": "answerer", "prompt": ANSWERER}]},
    }


def _holds(colour: str, values: dict[str, int]) -> str:
    return f"The {colour} box holds {values[colour]} coins."


def _dealt(colours: list[str], values: dict[str, int], readers: int) -> list[str]:
    """One note each, of neighbouring boxes."""
    size = len(colours) // readers
    return [
        " ".join(_holds(c, values) for c in colours[n * size : (n + 1) * size])
        for n in range(readers)
    ]


def _options(
    answer: int, told: Iterable[int], level: int, seed: int, i: int, draw: random.Random
) -> dict[str, str]:
    """The answer among values of the same kind, those in the notes first; every place has it equally often."""
    low = 60 if level == 3 else SMALLEST
    others = [value for value in told if value != answer]
    rest = [value for value in range(low, low + VALUES) if value != answer and value not in others]
    others += draw.sample(rest, OPTIONS - 1 - len(others))
    draw.shuffle(others)
    places = list(range(OPTIONS))
    random.Random(f"places {level} {seed} {i // OPTIONS}").shuffle(places)
    others.insert(places[i % OPTIONS], answer)
    return {chr(ord("a") + n): str(value) for n, value in enumerate(others)}
