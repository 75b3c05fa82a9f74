"""Rows of a file: what `ask --file` reads."""

from pathlib import Path

from minimas.rows import read_rows


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path: Path) -> None:
    """Windows editors write one, and the first line was refused as no JSON."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "One?"}\n{"question": "Two?"}\n', encoding="utf-8-sig")
    assert [row["question"] for row in read_rows(path)] == ["One?", "Two?"]
