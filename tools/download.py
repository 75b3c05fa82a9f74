"""Download benchmarks from the Hugging Face hub as rows for tools/evaluate.py.

    python tools/download.py TASK… [--out DIR]

The raw files are downloaded with huggingface_hub. The command prints the revision and SHA-256 of
each file, and writes DIR/TASK.jsonl in the format that tools/evaluation/tasks.py reads. Parquet
files need pyarrow (pip install pyarrow). GPQA is gated, and its authors ask that its questions not
be published: accept the terms on its page, log in, and do not publish the file. This module does
not depend on how rows are used.
"""

import argparse
import csv
import hashlib
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's tools

from tools.shared.arguments import print_error
from tools.shared.files import replacing

Raw = dict[str, Any]


class Source(NamedTuple):
    """A task's repository, raw files, conversion of one raw row, and revision."""

    repository: str
    files: tuple[str, ...]
    convert: Callable[[Raw, int], Raw]
    revision: str = "main"


# -- conversions: a raw row and its number -> a row ------------------------------------------------


def gsm8k(raw: Raw, i: int) -> Raw:
    """Convert {"question", "answer": "…\\n#### 1,234"}. The answer is the number after ####."""
    answer = raw["answer"].rpartition("####")[2].strip().replace(",", "")
    return {
        "id": f"gsm8k-test-{i}",
        "question": raw["question"],
        "answer": answer,
        "solution": raw["answer"],
    }


def aime2024(raw: Raw, i: int) -> Raw:
    """Convert {"id", "problem", "solution", "answer", "url", "year"}."""
    row = {
        "id": f"aime2024-{raw['id']}",
        "question": raw["problem"],
        "answer": _whole(raw["answer"]),
    }
    return row | {"solution": raw["solution"], "url": raw["url"]}


def aime2025(raw: Raw, i: int) -> Raw:
    """Convert {"question", "answer"}. Each of the two exams has its own file."""
    return {"id": f"aime2025-{i}", "question": raw["question"], "answer": _whole(raw["answer"])}


def _whole(answer: Any) -> str:
    """Return a number without leading zeros or a degree sign (one answer of 2025 has one)."""
    return str(int(re.sub(r"\^\{?\\circ\}?|°|\$", "", str(answer))))


def arc(name: str) -> Callable[[Raw, int], Raw]:
    """Return a function that converts {"question", "choices": {"label", "text"}, "answerKey"}.

    The labels are ["A", …] or ["1", …]. They are replaced by the letters a, b, ….
    """

    def convert(raw: Raw, i: int) -> Raw:
        labels, texts = list(raw["choices"]["label"]), list(raw["choices"]["text"])
        answer = "abcdefgh"[labels.index(raw["answerKey"])]
        return {
            "id": f"{name}-test-{i}",
            "question": raw["question"],
            "answer": answer,
            "choices": _lettered(texts),
        }

    return convert


def medqa(raw: Raw, i: int) -> Raw:
    """Convert {"question", "options": {"A": …}, "answer": text, "answer_idx": "A", …}."""
    choices = {letter.lower(): text for letter, text in sorted(raw["options"].items())}
    return {
        "id": f"medqa-{i}",
        "question": raw["question"],
        "answer": raw["answer_idx"].lower(),
        "choices": choices,
    }


def gpqa(raw: Raw, i: int) -> Raw:
    """Convert {"Question", "Correct Answer", "Incorrect Answer 1" … 3, "Explanation", "Record ID"}.

    The choices are shuffled with the record id as the seed.
    """
    texts = [raw["Correct Answer"], *(raw[f"Incorrect Answer {n}"] for n in (1, 2, 3))]
    texts = [text.strip() for text in texts]
    order = list(range(len(texts)))
    random.Random(raw["Record ID"]).shuffle(order)
    row = {
        "id": f"gpqa-{raw['Record ID']}",
        "question": raw["Question"].strip(),
        "answer": "abcd"[order.index(0)],
    }
    row["choices"] = _lettered([texts[n] for n in order])
    return row | (
        {"solution": raw["Explanation"].strip()} if (raw.get("Explanation") or "").strip() else {}
    )


def humanevalplus(raw: Raw, i: int) -> Raw:
    """Convert {"task_id", "prompt", "canonical_solution", "entry_point", "test"}.

    The test defines check(candidate). The call is added if it is missing.
    """
    call = f"check({raw['entry_point']})"
    test = (
        raw["test"]
        if re.search(rf"^{re.escape(call)}", raw["test"], re.MULTILINE)
        else f"{raw['test']}\n{call}\n"
    )
    row = {
        "id": raw["task_id"],
        "question": raw["prompt"],
        "answer": test,
        "entry_point": raw["entry_point"],
    }
    return row | {"canonical_solution": raw["canonical_solution"]}


def mbppplus(raw: Raw, i: int) -> Raw:
    """Convert {"task_id", "code", "prompt", "test_imports", "test_list", "test"}."""
    row = {
        "id": f"Mbpp/{str(raw['task_id']).removeprefix('Mbpp/')}",
        "question": raw["prompt"],
        "answer": raw["test"],
    }
    row |= {"test_list": list(raw["test_list"]), "test_imports": list(raw["test_imports"])}
    return row | {"canonical_solution": raw["code"]}


def _lettered(texts: list[str]) -> dict[str, str]:
    return dict(zip("abcdefgh", texts, strict=False))


SOURCES = {
    "gsm8k": Source("openai/gsm8k", ("main/test-00000-of-00001.parquet",), gsm8k),
    "aime2024": Source("HuggingFaceH4/aime_2024", ("data/train-00000-of-00001.parquet",), aime2024),
    "aime2025": Source("opencompass/AIME2025", ("aime2025-I.jsonl", "aime2025-II.jsonl"), aime2025),
    "gpqa_diamond": Source("Idavidrein/gpqa", ("gpqa_diamond.csv",), gpqa),
    "medqa": Source("GBaker/MedQA-USMLE-4-options", ("phrases_no_exclude_test.jsonl",), medqa),
    "arc_easy": Source(
        "allenai/ai2_arc", ("ARC-Easy/test-00000-of-00001.parquet",), arc("arc-easy")
    ),
    "arc_challenge": Source(
        "allenai/ai2_arc", ("ARC-Challenge/test-00000-of-00001.parquet",), arc("arc-challenge")
    ),
    # Later revisions have only parquet files.
    "mbppplus": Source(
        "evalplus/mbppplus", ("test.jsonl",), mbppplus, "8a14ef6256e2d9ba80a03e9ce57ee349a69e6399"
    ),
    "humanevalplus": Source("evalplus/humanevalplus", ("test.jsonl",), humanevalplus),
}


# -- files -----------------------------------------------------------------------------------------


def raw_rows(path: Path) -> Iterator[Raw]:
    """Yield the rows of a .jsonl, .csv or .parquet file.

    Raises ValueError naming a line that is not valid JSON, and ImportError if pyarrow is missing.
    """
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}: line {number}: found bad JSON ({error}), expected an object"
                ) from error
    elif path.suffix == ".csv":
        csv.field_size_limit(2**24)
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    else:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(f"{path.name}: parquet needs pyarrow: pip install pyarrow") from error
        yield from parquet.read_table(path).to_pylist()


def convert(source: Source, paths: list[Path]) -> list[Raw]:
    """Convert all raw rows of some files.

    Raises ValueError naming the file, the row and the field if a raw row lacks a field.
    """
    rows: list[Raw] = []
    for path in paths:
        for number, raw in enumerate(raw_rows(path), start=1):
            try:
                rows.append(source.convert(raw, len(rows)))
            except KeyError as error:
                fields = ", ".join(map(str, raw))
                raise ValueError(
                    f"{path.name}: row {number}: {error.args[0]}: found only {fields:.200}"
                ) from error
    return rows


def download(task: str, out: Path) -> Path:
    """Download the files of a task, print their source, and write `out`/TASK.jsonl.

    Raises OSError with a one-line message if a file cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    source, paths = SOURCES[task], []
    where = f"{task}: huggingface.co/datasets/{source.repository}"
    for file in source.files:
        try:
            name = hf_hub_download(
                source.repository, file, repo_type="dataset", revision=source.revision
            )
        except GatedRepoError as error:
            raise OSError(
                f"{where} is gated: accept its terms on that page, then run: hf auth login"
            ) from error
        except LocalEntryNotFoundError as error:
            raise OSError(
                f"{where}: {file}: not in the local cache, and the hub cannot be reached"
            ) from error
        except HfHubHTTPError as error:  # no such repository, revision or file
            raise OSError(f"{where}: {file}: {str(error).strip().splitlines()[-1]}") from error
        paths.append(Path(name))
        digest = hashlib.sha256(paths[-1].read_bytes()).hexdigest()
        print(f"{task}: {source.repository} {file} revision {_revision(paths[-1])} sha256 {digest}")
    rows = convert(source, paths)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{task}.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with replacing(path) as partial:  # so that an interrupted write leaves no TASK.jsonl
        partial.write_text(text, encoding="utf-8")
    print(f"{task}: {len(rows)} rows in {path}")
    return path


def _revision(path: Path) -> str:
    """Return the commit of a file in the hub's cache (…/snapshots/COMMIT/folder/file)."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Download all tasks.

    Returns 0, or 1 if a task failed. The other tasks are downloaded anyway.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "tasks", nargs="+", metavar="TASK", help=f"all, or one or more of: {', '.join(SOURCES)}"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data"), metavar="DIR", help="folder (default: data)"
    )
    options = parser.parse_args(arguments)
    tasks = list(SOURCES) if options.tasks == ["all"] else options.tasks
    for task in tasks:
        if task not in SOURCES:
            parser.error(f"TASK: found {task!r}, expected all or some of {', '.join(SOURCES)}")
    status = 0
    for task in tasks:
        try:
            download(task, options.out)
        except (OSError, ValueError, ImportError) as error:
            print_error("download", error)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
