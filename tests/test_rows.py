"""Check the rows of a file, which `ask --file` and `evaluate --data` must read in the same way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minimas import rows
from minimas.rows import batches, kind_of
from tools.evaluation import rows as tools_rows

from .processes import within

READERS = [rows.read_rows, tools_rows.read_rows]
both = pytest.mark.parametrize("read", READERS, ids=["ask", "evaluate"])
Read = Callable[[Path], list[dict[str, Any]]]


def written(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def row(**fields: Any) -> str:
    return json.dumps({"question": "Which?", "answer": "A"} | fields)


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path: Path) -> None:
    """Windows editors add one, and the first line was refused as invalid JSON."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "One?"}\n{"question": "Two?"}\n', encoding="utf-8-sig")
    assert [row["question"] for row in rows.read_rows(path)] == ["One?", "Two?"]


@both
def test_options_can_have_three_forms(read: Read, tmp_path: Path) -> None:
    """Data sets on the hub use them, with null where a question has fewer options than others."""
    plain = {"A": "red", "B": "blue"}
    path = written(
        tmp_path,
        row(choices=plain),
        row(choices={"label": ["A", "B"], "text": ["red", "blue"]}),
        row(choices=plain | {"C": None, "D": None}),
        row(choices={"label": ["A", "B", "C"], "text": ["red", "blue", None]}, id=None),
        row(choices={"label": ["1", 2], "text": ["red", "blue"]}, answer="1"),
        row(choices=None),
    )
    found = read(path)
    assert [each.get("choices") for each in found[:4]] == 4 * [plain]
    assert found[4]["choices"] == {"1": "red", "2": "blue"}
    assert [kind_of(each) for each in found] == 5 * ["choice"] + ["free"]


@both
@pytest.mark.parametrize(
    "choices",
    [
        {"A": None},
        {"label": ["A", "B"], "text": ["red"]},
        {"label": ["A", "A", "B"], "text": ["red", "blue"]},
        {"label": [], "text": []},
        {"A": 1.5},
        {"A": ["red"]},
        "A",
        5,
        {},
    ],
)
def test_options_of_other_forms_are_refused_with_their_line(
    read: Read, choices: Any, tmp_path: Path
) -> None:
    """A question without its options would be answered, but wrongly."""
    path = written(tmp_path, row(), row(choices=choices))
    with pytest.raises(
        ValueError, match=r"rows\.jsonl: line 2: choices: found .*, expected an obj"
    ):
        read(path)


@both
def test_a_row_can_set_its_own_kind(read: Read, tmp_path: Path) -> None:
    """`ask --file` ignored "kind", so it asked for the letter of an option that was not shown."""
    [first, second] = read(
        written(tmp_path, row(kind="math", choices={"A": "2"}), row(kind="free", answer=7))
    )
    assert (kind_of(first), kind_of(second)) == ("math", "free")
    with pytest.raises(ValueError, match=r"line 1: kind: found 'maths', expected one of math, "):
        read(written(tmp_path, row(kind="maths")))


@both
def test_a_row_without_an_id_gets_its_line_number(read: Read, tmp_path: Path) -> None:
    """A result can then be found again. Blank lines count."""
    found = read(written(tmp_path, row(), "", row(id="x"), row(id=None)))
    assert [each["id"] for each in found] == ["line-1", "x", "line-4"]


@both
@pytest.mark.parametrize("answer", ["0.00005", "1e-7", "1E22", "12345678901234567890.0", "-2", "7"])
def test_a_number_is_recognized_in_every_notation(read: Read, answer: str, tmp_path: Path) -> None:
    """`str` turns 0.0000001 into 1e-07, which was not read as a number, and rounds long ones."""
    [found] = read(written(tmp_path, f'{{"question": "How many?", "answer": {answer}}}'))
    assert kind_of(found) == "math"


def test_a_gold_answer_keeps_its_digits(tmp_path: Path) -> None:
    """A right answer of twenty digits was compared with one rounded to sixteen."""
    for written_as, text in (
        ("12345678901234567891.0", "12345678901234567891.0"),
        ("1e22", "1" + 22 * "0"),
        ("2.5e-7", "0.00000025"),
        ("7", "7"),
    ):
        path = written(tmp_path, f'{{"question": "How many?", "answer": {written_as}}}')
        assert tools_rows.read_rows(path)[0]["answer"] == text


def test_other_numbers_of_a_row_stay_numbers(tmp_path: Path) -> None:
    """The settings of a run include a digest of its rows as JSON."""
    [found] = tools_rows.read_rows(written(tmp_path, row(chance=0.25, extra=[{"score": 1.5}])))
    assert found["chance"] == 0.25 and json.dumps(found["extra"]) == '[{"score": 1.5}]'


@both
@pytest.mark.parametrize("answer", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_an_answer_that_is_not_a_finite_number_is_refused_with_its_line(
    read: Read, answer: str, tmp_path: Path
) -> None:
    """Python accepts NaN, which is not JSON and equals no answer."""
    path = written(tmp_path, row(), f'{{"question": "How many?", "answer": {answer}}}')
    with pytest.raises(ValueError, match=rf"line 2: found {answer}, expected a finite number"):
        read(path)


def test_the_gold_answer_of_gsm8k_is_the_number_at_its_end(tmp_path: Path) -> None:
    """The raw rows have a solution as "answer", so no short answer was right."""
    solution = "She has 2 + 7 = 9.\n#### 1,009"
    [raw] = rows.read_rows(written(tmp_path, row(answer=solution)))
    [found] = tools_rows.read_rows(written(tmp_path, row(answer=solution)))
    assert kind_of(raw) == kind_of(found) == "math"
    assert (found["answer"], found["solution"]) == ("1,009", solution)
    [free] = tools_rows.read_rows(written(tmp_path, row(answer="#### nine\n#### ten")))
    assert kind_of(free) == "free" and "solution" not in free


def test_batches_keep_the_order_and_have_only_one_kind(tmp_path: Path) -> None:
    kinds = "math math free free free math".split()
    given = [{"question": str(i), "kind": kind} for i, kind in enumerate(kinds)]
    for size in (1, 2, 4, 9):
        found = batches(given, None, size)
        assert [each for _, batch in found for each in batch] == given
        assert all(kind_of(each) == kind for kind, batch in found for each in batch)
        assert max(len(batch) for _, batch in found) <= size
    assert batches(given, "code", 9) == [("code", given)]


def test_a_long_run_of_hash_signs_in_an_answer_takes_no_time() -> None:
    """A row of a damaged file took three minutes for 100,000 signs."""
    with within(5):
        assert kind_of({"answer": "#" * 100_000}) == "free"
        assert kind_of({"answer": "#### 1\n" * 10_000 + "#### 18"}) == "math"
