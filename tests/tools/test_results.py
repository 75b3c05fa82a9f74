"""Every figure in the tables of docs/results.md comes from the stored raw records."""

import re
from pathlib import Path

import pytest

from tools import results

PAGE = results.PAGE.read_text(encoding="utf-8")


def test_the_tables_say_what_the_records_say() -> None:
    """A table that is typed by hand soon differs from its run."""
    assert results.BLOCK.search(PAGE), "there must be a table to compare"
    assert results.rewritten(PAGE) == PAGE


def test_a_changed_figure_is_noticed() -> None:
    """Negative control of the comparison above."""
    wrong = re.sub(r"\d+\.\d+%", "99.9%", PAGE, count=1)
    assert wrong != PAGE
    assert results.rewritten(wrong) != wrong


def test_every_stored_run_is_in_a_table_and_all_of_them_are_small() -> None:
    """Everybody who clones the repository gets the records, so they are at most 4 MB together."""
    named = {
        name.strip() for block in results.BLOCK.finditer(PAGE) for name in block["names"].split("+")
    }
    stored = {
        path.name.removesuffix(".jsonl.gz"): path for path in results.RECORDS.glob("*.jsonl.gz")
    }
    assert named == set(stored)
    assert sum(path.stat().st_size for path in stored.values()) <= 4e6


def test_a_table_can_have_both_metrics() -> None:
    """Its table failed with a division by zero."""
    answer = {
        "id": "a", "seed": 0, "arm": "single", "correct": True, "finish_reason": "stop",
        "read": 1, "thought": 2, "written": 3, "seconds": 4.0,
    }  # fmt: skip
    loss = {"id": "b", "seed": 0, "arm": "single", "nll": 1.0}
    head, _, line = results.table([answer, loss], "single").splitlines()
    assert "gold NLL" in head and "correct" in head and "prefilled" not in head
    assert "1.000" in line and "100.0%" in line and head.count("|") == line.count("|")
    *_, partly = results.table([answer, loss, loss | {"arm": "team"}], "single").splitlines()
    assert partly.endswith("|  |  |  |  |  |") and partly.count("|") == head.count("|")


def test_a_comment_with_a_typo_does_not_hide_its_table() -> None:
    """`--check` said that all was well, because it did not see the table."""
    wrong = PAGE.replace("; base: single -->", " -->", 1)
    assert wrong != PAGE
    with pytest.raises(ValueError, match=r"results\.md: found a comment .* cannot be read"):
        results.rewritten(wrong)


def test_a_run_that_is_not_there_does_not_overwrite_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typo in RUN stored the other runs, or none, under the name of published records."""
    monkeypatch.setattr(results, "RECORDS", tmp_path)
    old = tmp_path / "one.jsonl.gz"
    old.write_bytes(b"old")
    assert results.main(["--add", "one", str(tmp_path / "none")]) == 1
    assert "none: found no results*.jsonl, expected a run" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        results.main(["--add", "one"])
    assert old.read_bytes() == b"old"


def test_a_base_that_no_record_has_is_refused() -> None:
    record = {"id": "a", "seed": 0, "arm": "single", "nll": 1.0}
    with pytest.raises(ValueError, match=r"base: found 'team', expected one of single"):
        results.table([record], "team")


def test_each_arm_may_be_compared_with_its_own_base() -> None:
    """With one base for all arms, the loss of a layout would count as harm of its thoughts."""
    rows = {"a, none": 1.0, "a, 20": 1.5, "b, none": 3.0, "b, 20": 3.25}
    records = [{"id": "q", "seed": 0, "arm": arm, "nll": nll} for arm, nll in rows.items()]
    lines = results.table(records, "*, none").splitlines()
    assert lines[0].endswith("− none |")
    assert "+0.500" in lines[3] and "+0.250" in lines[5]
    with pytest.raises(ValueError, match="base: found 'b, none'"):
        results.table([record for record in records if record["arm"] != "b, none"], "*, none")
    named = ("latent_mas, 20 × ridge, layout chat", "*, prompts only")
    assert results.base_of(*named) == "latent_mas, prompts only, layout chat"


def test_what_is_stored_is_what_the_run_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RECORDS", tmp_path / "results")
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.jsonl").write_text(
        '{"settings": {}}\n{"id": "a", "arm": "single", "seed": 0}\n'
    )
    results.store("one", [run])
    first = (tmp_path / "results" / "one.jsonl.gz").read_bytes()
    results.store("one", [run])
    assert (tmp_path / "results" / "one.jsonl.gz").read_bytes() == first
    assert results.read_records("one") == [{"id": "a", "arm": "single", "seed": 0}]


def test_an_arm_is_named_by_all_of_its_settings() -> None:
    """Two runs of one arm each both call it latent_mas; in one table they would merge."""
    settings = {"method": "latent_mas", "team": "sequential", "layout": None, "transfer": "full"}
    record = {"arm": "latent_mas", "latent_steps": 20, "align": "ridge"} | settings
    changes = {"latent_steps": 0, "layout": "chat", "team": "hierarchical", "transfer": "shuffled"}
    changes |= {"close": False, "prefix": "", "samples": 3}
    names = {results.label(record | {field: value}) for field, value in changes.items()}
    assert len(names | {results.label(record)}) == 8
    assert results.label(record) == "latent_mas, 20 × ridge"
    assert results.label({"arm": "set by hand", "method": "latent_mas"}) == "set by hand"


def test_a_question_that_two_runs_have_counts_once() -> None:
    """An arm with 90 questions had 130 answers."""
    record = {"id": "q", "seed": 0, "arm": "a", "nll": 1.0}
    [line] = results.table([record, record | {"nll": 3.0}, record | {"seed": 1}], "a").splitlines()[
        2:
    ]
    assert line.split("|")[2].strip() == "2" and "1.000" in line, "the first record counts"


def test_arms_of_other_runs_are_compared_on_common_questions() -> None:
    """An arm with 140 questions and one with 40 of them differ by their questions too."""
    asked = {"a": ["q", "r"], "b": ["r", "s"]}
    records = [
        {"id": name, "seed": 0, "arm": arm, "nll": float(name == "r")}
        for arm, names in asked.items()
        for name in names
    ]
    lines = results.table(records, "a", common=True).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["1", "1"]
    lines = results.table(records, "a").splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["2", "2"]
