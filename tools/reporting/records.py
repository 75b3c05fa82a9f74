"""Read the input of a report: a run's folder, or the output of `minimas ask --json`.

Both are returned as records in the format of tools/evaluate.py. An incomplete last line is left
out, and the report says so. Any other unexpected content raises an error that names the file, the
line and the field. This module does not make HTML.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.evaluation.ledger import files
from tools.evaluation.summary import summarize
from tools.evaluation.verdict import verdict

from .questions import find_questions, questions_of_data

Record = dict[str, Any]
NUMBER, NONE = (int, float), type(None)
TYPE_NAMES = {
    str: "text",
    int: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
USAGE = {"read": NUMBER, "thought": NUMBER, "written": NUMBER, "seconds": NUMBER}
AGENT = {"name": (str,), "prompt": (str,), "text": (str,), **USAGE, "memory_bytes": NUMBER}
RECORD = {
    "id": (str, int), "arm": (str,), "seed": (int,), "metric": (str,), "agents": (list,), **USAGE,
    "memory_bytes": NUMBER, "text": (str, NONE), "answer": (str, NONE), "gold": (str, NONE),
    "correct": (bool, NONE), "nll": (*NUMBER, NONE), "finish_reason": (str, NONE),
    "options": (dict, NONE), "votes": (dict, NONE),
}  # fmt: skip
ANSWERED = {"text": (str,), "finish_reason": (str,)}
THOUGHT: dict[str, tuple[type, ...]] = {
    "tokens": (list,), "entropy": (*NUMBER, NONE), "norm": (*NUMBER, NONE),
    "cosine_before": (*NUMBER, NONE), "nearest": (str,), "cosine_nearest": (*NUMBER, NONE),
}  # fmt: skip
# The output of `minimas ask --json`: its names of the usage fields, and the fields that are not
# settings.
ASKED_USAGE = {
    "prompt_tokens": "read", "latent_steps": "thought", "output_tokens": "written",
    "seconds": "seconds", "memory_bytes": "memory_bytes",
}  # fmt: skip
ASKED = {"question": (str,), "text": (str,), "agents": (list,), "usage": (dict,)}
NOT_SETTINGS = {"id", "answer", "finish_reason", "thoughts", *ASKED}
ARM_SETTINGS = ("model", "method", "team", "layout", "latent_steps", "align", "transfer", "seed")
# Fields of a run's head that are shown in addition to the arguments.
MADE_ON = ("questions", "started", "device", "threads", "minimas", "torch", "python", "git", "code")


@dataclass
class Report:
    """The content of a page. `entries` are records with a "question". `arms` is their summary."""

    name: str
    settings: dict[str, Any]
    entries: list[Record]
    notes: list[str] = field(default_factory=list)  # about missing data
    arms: dict[str, Record] = field(default_factory=dict)
    verdict: str = ""


def sources(path: Path) -> list[Path]:
    """Return the input files of a report. Raises FileNotFoundError if there are none."""
    if path.is_dir():
        found = files(path)
        if not found:
            expected = "expected the folder of a run of tools/evaluate.py"
            raise FileNotFoundError(f"{path}: found no results*.jsonl, {expected}")
        return found
    if not path.exists():
        expected = "expected a run's folder, or the output of minimas ask --json"
        raise FileNotFoundError(f"{path}: found no such file or folder, {expected}")
    return [path]


def read_report(path: Path) -> Report:
    """Read a run's folder, or a file with the output of `minimas ask --json`.

    Raises FileNotFoundError, or ValueError with the text "FILE: line N: FIELD: found X, expected
    Y".
    """
    report = run_report(path) if path.is_dir() else asked_report(path)
    if report.entries:
        report.arms = summarize(report.entries)
    return report


# -- runs of tools/evaluate.py ----------------------------------------------------------------


def run_report(folder: Path) -> Report:
    """Read a run's folder. Raises the errors of `read_report`."""
    entries, notes, heads = list[Record](), list[str](), list[Record]()
    for path in sources(folder):
        for where, record in objects(path, notes):
            if "id" not in record and isinstance(record.get("settings"), dict):
                heads.append(record)
                continue
            check(where, record, RECORD)
            check(where, record, ANSWERED if record["metric"] == "accuracy" else {})
            for agent in record["agents"]:
                check(f"{where}: agents", agent, AGENT)
                check_thoughts(where, agent.get("thoughts", []))
                check_attention(where, agent.get("attention", {}))
            entries.append(record | {"id": str(record["id"])})
    if not heads:
        expected = "expected the head of a run in the first line"
        raise ValueError(f"{sources(folder)[0]}: found no complete line with settings, {expected}")
    head = heads[0]
    questions = find_questions(entries) | questions_of_data(head)
    for record in entries:
        record["question"] = questions[record["id"]]
    notes += missing(folder, head, entries)
    shown = dict(head.get("arguments") or head["settings"])
    model = head.get("model")
    shown["model"] = model.get("name") if isinstance(model, dict) else shown.get("model")
    shown |= {name: head[name] for name in MADE_ON if name in head}
    shown["fingerprint"] = head["settings"].get("model")
    shown["dtype"] = head["settings"].get("dtype")  # not "auto"
    said = verdict(entries) if head["settings"].get("audit") else ""
    return Report(folder.resolve().name, shown, entries, notes, verdict=said)


def missing(folder: Path, head: Record, entries: Sequence[Record]) -> list[str]:
    """Return a note if records of a run are missing, otherwise an empty list."""
    questions, arms = head.get("questions"), head.get("arms")
    seeds = head["settings"].get("seeds")
    if type(questions) is int and isinstance(arms, list) and isinstance(seeds, list):
        expected = questions * len(arms) * len(seeds)
        if len(entries) < expected:
            return [f"{len(entries):,} of {expected:,} records: the run is not finished"]
        return []
    # The head of an older run does not have the number of questions.
    by_arm: dict[tuple[str, int], int] = {}
    for record in entries:
        key = record["arm"], record["seed"]
        by_arm[key] = by_arm.get(key, 0) + 1
    if not (folder / "summary.json").exists():
        return [f"{len(entries):,} records and no summary: the run may be unfinished"]
    if len(set(by_arm.values())) > 1:
        fewest, most = min(by_arm.values()), max(by_arm.values())
        return [f"the arms have from {fewest:,} to {most:,} records: the run is not finished"]
    return []


# -- output of minimas ask --json -------------------------------------------------------------


def asked_report(path: Path) -> Report:
    """Read the output of `minimas ask --json`. Raises the errors of `read_report`."""
    entries, notes, asked = list[Record](), list[str](), list[Record]()
    for where, record in objects(path, notes):
        if "id" not in record and "settings" in record:
            problem = "found the head of a run, expected a record of minimas ask --json"
            raise ValueError(f"{where}: {problem}; give the run's folder, {path.parent}")
        entries.append(asked_record(where, record, len(entries) + 1))
        asked.append(record)
    if not entries:
        expected = "expected the output of minimas ask --json, one object per line"
        raise ValueError(f"{path}: found no complete line, {expected}")
    values: dict[str, list[Any]] = {}
    for record in asked:
        for name in record.keys() - NOT_SETTINGS:
            known = values.setdefault(name, [])
            known += [] if record[name] in known else [record[name]]
    told = [name for name in ARM_SETTINGS if len(values.get(name, [])) > 1]
    for entry, record in zip(entries, asked, strict=True):
        given = (f"{name}={record.get(name)}" for name in told if name != "method")
        entry["arm"] = " ".join([str(record.get("method", "answers")), *given])
    settings = {name: found[0] if len(found) == 1 else found for name, found in values.items()}
    return Report(path.name, settings, entries, notes)


def asked_record(where: str, record: Record, number: int) -> Record:
    """Convert a record of `minimas ask --json` to the format of tools/evaluate.py."""
    check(where, record, ASKED | {"answer": (str, NONE), "thoughts": (list, NONE)})
    thoughts = record.get("thoughts") or []
    id_ = record.get("id")
    entry: Record = {
        "id": str(number if id_ is None else id_), "metric": "accuracy", "seed": 0,
        "question": record["question"], "text": record["text"], "answer": record.get("answer"),
        "finish_reason": str(record.get("finish_reason")),
    }  # fmt: skip
    entry |= usage(f"{where}: usage", record["usage"])
    entry["agents"] = []
    for i, agent in enumerate(record["agents"]):
        place = f"{where}: agents"
        check(place, agent, dict.fromkeys(("name", "prompt", "text"), (str,)))
        made = {name: agent[name] for name in ("name", "prompt", "text")}
        made |= usage(place, agent)
        if i < len(thoughts):
            check_thoughts(where, thoughts[i])
            made["thoughts"] = thoughts[i]
        entry["agents"].append(made)
    return entry


def usage(where: str, given: Record) -> Record:
    """Return the usage fields of `minimas ask --json` under the names of tools/evaluate.py."""
    check(where, given, dict.fromkeys(ASKED_USAGE, NUMBER))
    return {name: given[asked] for asked, name in ASKED_USAGE.items()}


# -- lines and fields -------------------------------------------------------------------------


def objects(path: Path, notes: list[str]) -> Iterator[tuple[str, Record]]:
    """Yield ("FILE: line N", object) for each line. Empty lines are skipped.

    If the last line is incomplete, it is left out, and a note is added to `notes`. Raises
    ValueError naming a line that is not a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                found = json.loads(line, parse_float=finite, parse_constant=lambda _: None)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    notes.append(f"{where} is incomplete and left out")
                    return
                raise ValueError(f"{where}: not valid JSON ({error})") from error
            if not isinstance(found, dict):
                raise ValueError(f"{where}: found {line[:60]!r}, expected an object")
            yield where, found


def finite(text: str) -> float | None:
    """Return a JSON number, or None if it is infinite, which JavaScript cannot read from JSON."""
    value = float(text)
    return value if math.isfinite(value) else None


def check(where: str, record: Any, types: dict[str, Any]) -> None:
    """Raise ValueError if a record is not an object, or if a field has a wrong type."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found {record!r:.60}, expected an object")
    for name, expected in types.items():
        value = record.get(name)
        if type(value) not in expected:
            shown = "nothing" if value is None else f"{value!r:.60}"
            raise ValueError(f"{where}: {name}: found {shown}, expected {TYPE_NAMES[expected[0]]}")


def check_thoughts(where: str, thoughts: Any) -> None:
    """Raise ValueError unless `thoughts` is a list of thoughts in the format of `minimas.lens`."""
    check(where, {"thoughts": thoughts}, {"thoughts": (list,)})
    for thought in thoughts:
        check(f"{where}: thoughts", thought, THOUGHT)
        for pair in thought["tokens"]:
            match pair:
                case [str(), int() | float()]:
                    continue
            raise ValueError(f"{where}: tokens: found {pair!r:.60}, expected a token and a number")


def check_attention(where: str, attention: Any) -> None:
    """Raise ValueError unless `attention` maps each part to a list of heads per layer."""
    check(where, {"attention": attention}, {"attention": (dict,)})
    for part, layers in attention.items():
        rows = layers if isinstance(layers, list) else [None]
        for row in rows:
            if not isinstance(row, list) or not row or {type(x) for x in row} - set(NUMBER):
                found = f"attention: {part}: found {row!r:.60}"
                raise ValueError(f"{where}: {found}, expected a list of numbers per layer")
