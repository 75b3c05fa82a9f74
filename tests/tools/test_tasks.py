"""Check rows, split evidence, programs and raw formats. Each test names the bug it prevents."""

import collections
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minimas import Team, latent_mas, load
from minimas.answers import grade
from tools import download
from tools.evaluation import sandbox
from tools.evaluation.grading import code_program
from tools.evaluation.rows import kind_of, read_rows
from tools.evaluation.tasks import OPTIONS, TASKS, load_task, split_evidence

from ..models import TINY
from ..processes import LIMIT

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
LEVELS = (1, 2, 3)


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def row(number: int = 0, **fields: Any) -> dict[str, Any]:
    return {"id": f"q{number}", "question": "1 + 1?", "answer": "2"} | fields


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"canonical_solution": 5}, "canonical_solution: found 5, expected text"),
        ({"test_imports": 5}, "test_imports: found 5, expected a list"),
        ({"test_imports": [5]}, "test_imports: found [5], expected a list of texts"),
        ({"kind": "code", "answer": 5, "tests": None}, "tests: found 5, expected a program"),
        ({"chance": 7}, "chance: found 7, expected 0 to 1"),
    ],
)
def test_a_field_of_another_type_is_refused_by_its_line(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Each was a traceback, some only after the answers were generated."""
    with pytest.raises(ValueError, match=re.escape(f"line 1: {message}")):
        read_rows(written(tmp_path, row(tests="assert f()") | fields))


def test_a_list_of_tests_is_enough(tmp_path: Path) -> None:
    """MBPP has no "answer", and its rows were refused."""
    tests = ["assert f() == 1", "assert f() < 2"]
    [read] = read_rows(written(tmp_path, {"question": "Write f.", "test_list": tests}))
    assert read["tests"] == "\n".join(tests) and kind_of(read) == "code"


def test_a_row_keeps_its_fields_and_numbers_become_text(tmp_path: Path) -> None:
    """A gold answer that is the number 2 would make grading fail in the middle of a run."""
    [first, second] = read_rows(
        written(tmp_path, row(0, solution="s", extra=[1]), "", row(1, id=7, answer=2))
    )
    assert first == row(0, solution="s", extra=[1])
    assert second == row(1, id="7", answer="2")


BAD = {  # rows, expected error
    "bad JSON": ([*(row(i) for i in range(6)), '{"id": '], "line 7: found bad JSON"),
    "no object": (["[1]"], "line 1: found list, expected an object"),
    "a missing answer in line 2": (
        [row(0), {"id": "a", "question": "b"}],
        "line 2: answer: found nothing, expected text",
    ),
    "a missing question": ([{"id": "a", "answer": "b"}], "line 1: question: found nothing"),
    "a missing answer": ([{"id": "a", "question": "b"}], "line 1: answer: found nothing"),
    "an empty question": (
        [row(0, question=" \n")],
        r"line 1: question: found ' \\n', expected text that is not blank",
    ),
    "an empty answer": ([row(0, answer="")], "line 1: answer: found ''"),
    "no question": ([row(0, question=None)], "line 1: question: found nothing"),
    "an id twice": (
        [row(0), row(1), row(0)],
        r"line 3: id: found 'q0' again, expected it only once \(it is also in line 1\)",
    ),
    "an id twice, as a number": ([row(0, id=1), row(0, id="1")], "line 2: id: found '1' again"),
    "a question of the wrong type": (
        [row(0, question=["a"])],
        r"line 1: question: found \['a'\], expected text",
    ),
    "an answer that is true": ([row(0, answer=True)], "line 1: answer: found True, expected text"),
    "an answer that is no option": (
        [row(0, choices={"a": "x", "b": "y"}, answer="c")],
        "line 1: answer: found 'c', expected one of a, b",
    ),
    "a choice without choices": (
        [row(0), row(1, kind="choice", answer="5")],
        "line 2: answer: found '5', expected one of a, b, ",
    ),
    "choices as a list": (
        [row(0, choices=["a"])],
        r"line 1: choices: found \['a'\], expected an object",
    ),
    "no choices": ([row(0, choices={})], "line 1: choices: found {}"),
    "a choice that is a number": (
        [row(0, choices={"a": 1})],
        "line 1: choices: found {'a': 1}, expected an object, letter: text",
    ),
    "an unknown kind": (
        [row(0, kind="maths")],
        "line 1: kind: found 'maths', expected one of math, choice, code, free",
    ),
    "nothing": ([""], "found no rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_invalid_row_is_named_by_file_line_and_field(name: str, tmp_path: Path) -> None:
    """ "KeyError: 'answer'" after an hour does not say which of 1,319 lines is wrong."""
    rows, said = BAD[name]
    path = written(tmp_path, *rows)
    with pytest.raises(ValueError, match=said) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_missing_file_or_invalid_utf8_is_named(tmp_path: Path) -> None:
    """The error names a file that is missing or not UTF-8."""
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: found no such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.jsonl: found bytes that are not UTF-8"):
        read_rows(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "math"), ({"answer": "1,234.5"}, "math"),
        ({"answer": "-1/2"}, "math"), ({"answer": ".5"}, "math"),
        ({"answer": "So\n#### $5"}, "math"),
        ({"answer": "So\n#### 5%"}, "math"), ({"answer": "So #### 5"}, "math"),
        ({"answer": "#### 5"}, "math"), ({"answer": "#### 5 eggs"}, "math"),
        ({"answer": "1.2.3"}, "free"), ({"answer": "."}, "free"),
        ({"answer": "2024/12/25"}, "free"),
        ({"answer": "Paris"}, "free"),
        ({"answer": "a", "choices": {"a": "x"}}, "choice"), ({"tests": "assert f()"}, "code"),
        ({"entry_point": "f"}, "code"),
        ({"test_list": ["assert f()"]}, "code"), ({"kind": "free"}, "free"),
        ({"choices": {"a": "2"}, "kind": "math"}, "math"),
    ],
)  # fmt: skip
def test_the_fields_of_a_row_determine_its_kind(fields: dict[str, Any], kind: str) -> None:
    """A kind in the row comes first. Then options serve only the loss, and are not shown."""
    assert kind_of(row(0, **fields)) == kind


@pytest.mark.parametrize("answer", ["So\n#### $5", "So #### 5", "#### 5", "#### 5 eggs", "#### 5."])
def test_a_gold_answer_after_hashes_can_be_right(answer: str, tmp_path: Path) -> None:
    """With a currency sign, or a solution on one line, the whole solution was the gold answer."""
    [made] = read_rows(written(tmp_path, row(0, answer=answer)))
    assert grade(kind_of(made), "\\boxed{5}", made["answer"])
    assert not grade(kind_of(made), "\\boxed{6}", made["answer"])


def test_an_unknown_task_is_refused_with_a_list_of_tasks() -> None:
    """The error is one line, before a model is loaded."""
    with pytest.raises(
        ValueError, match=r"^--task: found 'gsm', expected one of gsm8k, .*split_evidence"
    ):
        load_task("gsm")


def test_a_missing_task_file_is_an_error_that_says_how_to_download_it(tmp_path: Path) -> None:
    """Every benchmark of the paper has a name, a file and a source."""
    with pytest.raises(FileNotFoundError, match=r"aime2025\.jsonl, .*tools/download\.py aime2025"):
        load_task("aime2025", tmp_path)
    assert {name for name, task in TASKS.items() if task.files} == set(download.SOURCES)
    with pytest.raises(ValueError, match="--limit: found 0"):
        load_task("gsm8k", tmp_path, limit=0)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.files])
def test_every_local_benchmark_file_is_valid_and_of_its_kind(name: str) -> None:
    """A check that is too strict would refuse the benchmark itself."""
    if not any((DATA / file).exists() for file in TASKS[name].files):
        pytest.skip(f"{name} is not here")
    rows = load_task(name, DATA, limit=50)
    assert rows and {kind_of(row) for row in rows} == {TASKS[name].kind}
    if TASKS[name].kind != "code":
        assert all(
            grade(row["kind"], rf"\boxed{{{row['answer']}}}", row["answer"], row.get("choices"))
            for row in rows
        )


# -- the tiny task ---------------------------------------------------------------------------------


def test_the_tiny_task_has_new_questions_that_its_model_can_answer() -> None:
    """Its tables had no command, and questions from the training would be too easy."""
    rows = load_task("tiny", limit=40, seed=1)
    assert rows == load_task("tiny", limit=50, seed=1)[:40] != load_task("tiny", limit=40, seed=2)
    operations = [row["question"].count(".") - 1 for row in rows]
    assert set(operations) == {3, 4, 5}
    assert {row["question"].count(".") for row in load_task("tiny_wide")} == {*range(2, 8)}
    results = latent_mas(load(TINY, device="cpu"), [row["question"] for row in rows], kind="math")
    right = [result.answer == row["answer"] for result, row in zip(results, rows, strict=True)]
    assert sum(right) >= 38


# -- split evidence --------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_seed_gives_the_same_rows_for_every_limit(level: int) -> None:
    """Runs could not be compared if a limit changed the questions."""
    assert split_evidence(20, 3, level)[:5] == split_evidence(5, 3, level)
    assert split_evidence(5, 3, level) != split_evidence(5, 4, level)
    assert len({row["id"] for seed in (0, 1) for row in split_evidence(50, seed, level)}) == 100
    assert load_task("split_evidence", limit=4, seed=3) == split_evidence(4, 3, 1)
    assert load_task("split_evidence_3", limit=4, seed=3) == split_evidence(4, 3, 3)
    with pytest.raises(ValueError, match="level: found 4"):
        split_evidence(1, 0, 4)


@pytest.mark.parametrize("level", LEVELS)
def test_the_answer_follows_from_the_notes_but_not_from_the_last_prompt(level: int) -> None:
    """The last agent must not see the answer, and the notes must have it.

    Otherwise a right or wrong answer would say nothing about the KV cache.
    """
    for made in split_evidence(200, 1, level):
        team = Team.from_dict(made["team"], "row")
        *readers, last = team.agents
        notes = " ".join(agent.prompt for agent in readers)
        holds = dict(re.findall(r"The (\w+) box holds (\d+) coins\.", notes))
        owners = dict(re.findall(r"(\w+) has the (\w+) box\.", notes))
        asked = re.findall(r"the (\w+) box (?:and|hold)", made["question"])
        if level == 2:
            asked = [owners[re.findall(r"box of (\w+) hold", made["question"])[0]]]
        assert len(asked) == (2 if level == 3 else 1)
        assert sum(int(holds[colour]) for colour in asked) == int(made["answer"])
        assert (
            team.parallel
            and "{question}" in last.prompt
            and not re.search(r"\d", last.prompt + made["question"])
        )
        assert all("{question}" not in agent.prompt for agent in readers)
        assert grade("math", made["solution"], made["answer"])
        assert kind_of(made) == "math"
        if level > 1:  # no single note is enough
            for agent in readers:
                known = re.findall(r"The (\w+) box holds", agent.prompt)
                assert not set(asked) <= set(known) or (
                    "has the" not in agent.prompt and level == 2
                )


@pytest.mark.parametrize("level", LEVELS)
def test_the_options_do_not_reveal_the_answer(level: int) -> None:
    """A rule that uses only the options must not be right more often than chance.

    Examples are a fixed position, and the largest or the smallest option.
    """
    rows = split_evidence(OPTIONS * 200, 2, level)
    ranks, letters = collections.Counter[int](), collections.Counter[str]()
    for made in rows:
        values = sorted(map(int, made["choices"].values()))
        assert len(set(values)) == OPTIONS and int(made["answer"]) in values
        ranks[values.index(int(made["answer"]))] += 1
        letters.update(k for k, v in made["choices"].items() if v == made["answer"])
    assert set(letters.values()) == {200}  # exactly
    assert all(abs(count - 200) < 5 * math.sqrt(200) for count in ranks.values()), ranks


@pytest.mark.parametrize("level", LEVELS)
def test_the_best_guess_is_right_as_often_as_the_row_states(level: int) -> None:
    """The sum of two uniform numbers is most often 109.

    Always guessing it would then beat the chance in the row.
    """
    rows = split_evidence(9000, 5, level)
    expected = len(rows) * rows[0]["chance"]
    counts = collections.Counter(made["answer"] for made in rows)
    assert len(counts) == 90
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in counts.values())


# -- programs --------------------------------------------------------------------------------------

needs_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the sandbox is made of Linux's parts"
)
HUMAN = {
    "id": "HumanEval/0",
    "question": (
        "from math import floor\n\ndef helper(x):\n"
        "    return floor(x)\n\ndef f(x):\n    '''Round down.'''\n"
    ),
    "answer": "def check(candidate):\n    assert candidate(1.5) == 1\n\ncheck(f)\n",
    "entry_point": "f",
}
MBPP = {
    "id": "Mbpp/0",
    "question": "Write a function to add one.",
    "answer": "assert isclose(g(1), 2)",
    "test_list": ["assert g(1) == 2", "assert g(2) == 3"],
    "test_imports": ["from math import isclose"],
}


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize(
    ("raw", "text", "passes"),
    [
        (
            HUMAN,
            "```python\ndef f(x):\n    return helper(x)\n```",
            True,
        ),  # imports and helpers of the question
        (HUMAN, "```python\ndef f(x):\n    return round(x)\n```", False),
        (HUMAN, "```python\n    return floor(x)\n```", True),  # a completion
        (HUMAN, "```python\n    return x\n```", False),
        (HUMAN, "```python\nf = lambda x: floor(x)\n```", True),
        (HUMAN, "I do not know.", False),
        (HUMAN, "", False),
        (
            HUMAN,
            "```python\nfrom __future__ import annotations\ndef f(x):\n    return int(x)\n```",
            True,
        ),
        (
            MBPP,
            "```python\ndef g(x):\n    return x + 1\n```\nIt works: ```python\nprint(g(1))\n```",
            True,
        ),
        (MBPP, "```\ndef g(x):\n    return x\n```", False),
        (MBPP, "```python\ndef h(x):\n    return x + 1\n```", False),
    ],
)
def test_a_program_consists_of_the_answer_and_the_tests(
    raw: dict[str, Any], text: str, passes: bool, tmp_path: Path
) -> None:
    """An example must not replace the solution, and imports of the question must be kept."""
    [made] = read_rows(written(tmp_path, raw))
    assert sandbox.run(code_program(made, text)).passed == passes


def test_an_mbpp_question_names_the_function(tmp_path: Path) -> None:
    """Without the name of the function, a right program would fail."""
    [made] = read_rows(written(tmp_path, MBPP))
    assert made["question"].endswith(
        "It must pass these tests:\nassert g(1) == 2\nassert g(2) == 3"
    )
    assert made["tests"] == made["answer"] == MBPP["answer"]


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("name", ["humanevalplus", "mbppplus"])
def test_reference_solutions_pass_and_a_wrong_one_fails(name: str) -> None:
    """HumanEval/32 has a test that no program passes."""
    if not any((DATA / file).exists() for file in TASKS[name].files):
        pytest.skip(f"{name} is not here")
    for made in load_task(name, DATA, limit=12):
        outcome = sandbox.run(code_program(made, made["solution"]), timeout=60)
        assert outcome.passed, (made["id"], outcome)
        wrong = re.sub(r"(?m)^([ \t]+)return .*", r"\1return 'wrong'", made["solution"])
        assert not sandbox.run(code_program(made, wrong), timeout=60).passed, made["id"]


# -- raw formats -----------------------------------------------------------------------------------

RAW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # as on the hub, as in our files
    "gsm8k": (
        {"question": "Q?", "answer": "He has <<1+1=2>>2.\n#### 1,234"},
        {"id": "gsm8k-test-0", "answer": "1234", "solution": "He has <<1+1=2>>2.\n#### 1,234"},
    ),
    "aime2024": (
        {"id": 60, "problem": "Q?", "solution": "S", "answer": "025", "url": "u", "year": "2024"},
        {"id": "aime2024-60", "answer": "25", "solution": "S", "url": "u"},
    ),
    "aime2025": ({"question": "Q?", "answer": "336^\\circ"}, {"id": "aime2025-0", "answer": "336"}),
    "medqa": (
        {
            "question": "Q?",
            "answer": "y",
            "options": {"B": "y", "A": "x"},
            "answer_idx": "B",
            "meta_info": "step1",
        },
        {"id": "medqa-0", "answer": "b", "choices": {"a": "x", "b": "y"}},
    ),
    "arc_easy": (
        {
            "id": "M",
            "question": "Q?",
            "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]},
            "answerKey": "3",
        },
        {"id": "arc-easy-test-0", "answer": "c", "choices": {"a": "x", "b": "y", "c": "z"}},
    ),
    "arc_challenge": (
        {
            "id": "M",
            "question": "Q?",
            "choices": {"text": ["x", "y"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        {"id": "arc-challenge-test-0", "answer": "a", "choices": {"a": "x", "b": "y"}},
    ),
    "mbppplus": (
        {
            "task_id": 2,
            "code": "C",
            "prompt": "Q?",
            "test_imports": [],
            "test_list": ["t"],
            "test": "T",
        },
        {
            "id": "Mbpp/2",
            "answer": "T",
            "test_list": ["t"],
            "test_imports": [],
            "canonical_solution": "C",
        },
    ),
    "humanevalplus": (
        {
            "task_id": "HumanEval/0",
            "prompt": "Q?",
            "canonical_solution": "C",
            "entry_point": "f",
            "test": "T",
        },
        {
            "id": "HumanEval/0",
            "answer": "T\ncheck(f)\n",
            "entry_point": "f",
            "canonical_solution": "C",
        },
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_a_raw_row_is_converted_to_our_format(name: str, tmp_path: Path) -> None:
    """Raw rows have commas in numbers, labels from 1, and unsorted options.

    A call of the test may be missing.
    """
    raw, ours = RAW[name]
    converted = download.SOURCES[name].convert(raw, 0)
    assert converted == {"question": "Q?"} | ours
    [read] = read_rows(written(tmp_path, converted))
    assert kind_of(read) == TASKS[name].kind


def test_the_options_of_gpqa_are_shuffled_by_record_and_the_answer_is_updated(
    tmp_path: Path,
) -> None:
    """In the raw file, the right answer always comes first."""
    path, letters = tmp_path / "gpqa_diamond.csv", collections.Counter[str]()
    wrong = ",".join(f'"Incorrect Answer {n}"' for n in (1, 2, 3))
    head = f'"Record ID",Question,"Correct Answer",{wrong},Explanation'
    path.write_text(
        "\n".join([head, *(f'r{i},"Q, ""{i}""\n?",right ,x,y,z,' for i in range(200))]),
        encoding="utf-8",
    )
    rows = download.convert(download.SOURCES["gpqa_diamond"], [path])
    assert rows == download.convert(download.SOURCES["gpqa_diamond"], [path])
    assert rows[7]["question"] == 'Q, "7"\n?' and len(rows) == 200
    for made in rows:
        assert made["choices"][made["answer"]] == "right" and sorted(made["choices"].values()) == [
            "right",
            "x",
            "y",
            "z",
        ]
        letters[made["answer"]] += 1
    assert set(letters) == set("abcd") and min(letters.values()) > 30


def test_a_call_that_the_test_already_has_is_not_added() -> None:
    """A second call doubles the time of the tests, which can then exceed the time limit."""
    raw = RAW["humanevalplus"][0] | {"test": "T\n\ncheck(f)\n"}
    assert download.humanevalplus(raw, 0)["answer"] == "T\n\ncheck(f)\n"


def test_two_files_are_numbered_consecutively_and_a_missing_field_is_named(tmp_path: Path) -> None:
    """AIME 2025 has two files. A format that has changed must not give a KeyError."""
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    first.write_text('{"question": "a", "answer": "1"}\n')
    second.write_text('{"question": "b", "answer": 2}\n\n')
    assert [
        made["id"] for made in download.convert(download.SOURCES["aime2025"], [first, second])
    ] == [
        "aime2025-0",
        "aime2025-1",
    ]
    second.write_text('{"problem": "b", "answer": 2}\n')
    with pytest.raises(ValueError, match=r"2\.jsonl: row 1: question: found only problem, answer"):
        download.convert(download.SOURCES["aime2025"], [first, second])
    second.write_text("{\n")
    with pytest.raises(ValueError, match=r"2\.jsonl: line 1: found bad JSON"):
        download.convert(download.SOURCES["aime2025"], [second])


def test_parquet_is_supported_and_a_missing_pyarrow_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback from an import does not say what to install."""
    path = tmp_path / "x.parquet"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        list(download.raw_rows(path))
    monkeypatch.delitem(sys.modules, "pyarrow")
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist([RAW["arc_easy"][0]]), path)
    [raw] = download.raw_rows(path)
    assert download.SOURCES["arc_easy"].convert(raw, 0)["choices"] == {"a": "x", "b": "y", "c": "z"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the Hugging Face hub with a folder or an error, and return its state."""
    import huggingface_hub

    state: dict[str, Any] = {"error": None, "folder": tmp_path / "hub" / "snapshots" / "abc123"}
    state["folder"].mkdir(parents=True)

    def hf_hub_download(repository: str, file: str, **options: Any) -> str:
        assert options == {"repo_type": "dataset", "revision": state.get("revision", "main")}
        if state["error"]:
            raise state["error"]
        return str(state["folder"] / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return state


def test_a_download_prints_its_revision_and_hash_and_can_be_loaded(
    hub: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without them, a number could not be traced to a version of its benchmark."""
    for file in download.SOURCES["aime2025"].files:
        (hub["folder"] / file).write_text('{"question": "a", "answer": "1"}\n')
    assert download.main(["aime2025", "--out", str(tmp_path / "data")]) == 0
    said = capsys.readouterr().out
    assert said.count("revision abc123 sha256 ") == 2 and "2 rows in" in said
    assert [made["id"] for made in load_task("aime2025", tmp_path / "data")] == [
        "aime2025-0",
        "aime2025-1",
    ]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["aime2025.jsonl"]


def test_download_errors_are_one_line_each(
    hub: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A benchmark that needs a login gave forty lines of traceback.

    The tasks after it are still downloaded.
    """
    from huggingface_hub import errors

    gated = errors.GatedRepoError.__new__(errors.GatedRepoError)
    missing = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    missing.args = ("404 Client Error.\n\nRepository Not Found",)
    offline = errors.LocalEntryNotFoundError("cannot find the file\non disk")
    for error, task, expected in (
        (
            gated,
            "gpqa_diamond",
            "Idavidrein/gpqa is gated: accept its terms on that page, then run: hf auth login",
        ),
        (offline, "medqa", "the hub cannot be reached"),
        (missing, "arc_easy", "ai2_arc: ARC-Easy"),
    ):
        hub["error"] = error
        assert download.main([task, "--out", str(tmp_path)]) == 1
        said = capsys.readouterr().err
        assert (
            said.startswith(f"download: error: {task}: ")
            and expected in said
            and said.count("\n") == 1
        )
    assert not list(tmp_path.glob("*.jsonl"))


def test_downloading_an_unknown_name_gives_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    """The error comes before anything is downloaded."""
    with pytest.raises(SystemExit) as stopped:
        download.main(["gsm8k", "gsm"])
    assert stopped.value.code == 2
    assert "found 'gsm', expected all or some of gsm8k" in capsys.readouterr().err


def test_the_scripts_run_as_files() -> None:
    """With `python tools/download.py`, sys.path has tools/ but not the repository."""
    command = [sys.executable, str(ROOT / "tools" / "download.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=LIMIT)
    assert done.returncode == 0 and "gpqa_diamond" in done.stdout
