"""Reads what a report shows: a run's folder, or the output of `minimas ask --json`.

Both become records as tools/evaluate.py writes them. A last line that is cut off is left out, and
the report says so. Anything else that is not as expected is refused, naming file, line and field.

Does not know: HTML.
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
# Of the output of `minimas ask --json`: its names of a bill, and what is no setting.
ASKED_USAGE = {
    "prompt_tokens": "read", "latent_steps": "thought", "output_tokens": "written",
    "seconds": "seconds", "memory_bytes": "memory_bytes",
}  # fmt: skip
ASKED = {"question": (str,), "text": (str,), "agents": (list,), "usage": (dict,)}
NOT_SETTINGS = {"id", "answer", "finish_reason", "thoughts", *ASKED}
ARM_SETTINGS = ("model", "method", "team", "layout", "latent_steps", "align", "transfer", "seed")
# Of a run's head, what is shown beside the arguments.
MADE_ON = ("questions", "started", "device", "threads", "minimas", "torch", "python", "git", "code")


@dataclass
class Report:
    """What a page shows. `entries` are records with a "question" each; `arms` their summary."""

    name: str
    settings: dict[str, Any]
    entries: list[Record]
    notes: list[str] = field(default_factory=list)  # on what is missing
    arms: dict[str, Record] = field(default_factory=dict)
    verdict: str = ""


def sources(path: Path) -> list[Path]:
    """Return the files that a report is made from. Raises FileNotFoundError if there are none."""
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

    Raises FileNotFoundError, or ValueError "FILE: line N: FIELD: found X, expected Y".
    """
    report = run_report(path) if path.is_dir() else asked_report(path)
    if report.entries:
        report.arms = summarize(report.entries)
    return report


# -- runs of tools/evaluate.py ----------------------------------------------------------------


def run_report(folder: Path) -> Report:
    """Read a run's folder. Raises as `read_report` does."""
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
        expected = "expected the head of a run, in its first line"
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
    """Return what to say if not all records of a run are there."""
    questions, arms = head.get("questions"), head.get("arms")
    seeds = head["settings"].get("seeds")
    if type(questions) is int and isinstance(arms, list) and isinstance(seeds, list):
        expected = questions * len(arms) * len(seeds)
        if len(entries) < expected:
            return [f"{len(entries):,} of {expected:,} records are there: the run is not finished"]
        return []
    # The head of an older run does not say how many questions there are.
    by_arm: dict[tuple[str, int], int] = {}
    for record in entries:
        key = record["arm"], record["seed"]
        by_arm[key] = by_arm.get(key, 0) + 1
    if not (folder / "summary.json").exists():
        return [f"{len(entries):,} records and no summary: the run may not be finished"]
    if len(set(by_arm.values())) > 1:
        fewest, most = min(by_arm.values()), max(by_arm.values())
        return [f"the arms have from {fewest:,} to {most:,} records: the run is not finished"]
    return []


# -- output of minimas ask --json -------------------------------------------------------------


def asked_report(path: Path) -> Report:
    """Read the output of `minimas ask --json`. Raises as `read_report` does."""
    entries, notes, asked = list[Record](), list[str](), list[Record]()
    for where, record in objects(path, notes):
        if "id" not in record and "settings" in record:
            problem = "found the head of a run, expected a record of minimas ask --json"
            raise ValueError(f"{where}: {problem}; give the run's folder, {path.parent}")
        entries.append(asked_record(where, record, len(entries) + 1))
        asked.append(record)
    if not entries:
        expected = "expected the output of minimas ask --json, an object per line"
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
    """Return a record of `minimas ask --json` as tools/evaluate.py would write it."""
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
    """Return a bill of `minimas ask --json` under the names of tools/evaluate.py."""
    check(where, given, dict.fromkeys(ASKED_USAGE, NUMBER))
    return {name: given[asked] for asked, name in ASKED_USAGE.items()}


# -- lines and fields -------------------------------------------------------------------------


def objects(path: Path, notes: list[str]) -> Iterator[tuple[str, Record]]:
    """Yield each line's object after "FILE: line N". Empty lines are skipped.

    A last line that is cut off is left out, and a note says so. Raises ValueError naming a bad
    line.
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
                    notes.append(f"{where} is cut off and left out")
                    return
                raise ValueError(f"{where}: not valid JSON ({error})") from error
            if not isinstance(found, dict):
                raise ValueError(f"{where}: found {line[:60]!r}, expected an object")
            yield where, found


def finite(text: str) -> float | None:
    """Return a number of JSON, or None for one that JavaScript cannot read from JSON."""
    value = float(text)
    return value if math.isfinite(value) else None


def check(where: str, record: Any, types: dict[str, Any]) -> None:
    """Raise ValueError if a record is no object, or naming a field of another type."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found {record!r:.60}, expected an object")
    for name, expected in types.items():
        value = record.get(name)
        if type(value) not in expected:
            shown = "nothing" if value is None else f"{value!r:.60}"
            raise ValueError(f"{where}: {name}: found {shown}, expected {TYPE_NAMES[expected[0]]}")


def check_thoughts(where: str, thoughts: Any) -> None:
    """Raise ValueError unless `thoughts` is a list of thoughts as `minimas.lens` sees them."""
    check(where, {"thoughts": thoughts}, {"thoughts": (list,)})
    for thought in thoughts:
        check(f"{where}: thoughts", thought, THOUGHT)
        for pair in thought["tokens"]:
            match pair:
                case [str(), int() | float()]:
                    continue
            raise ValueError(f"{where}: tokens: found {pair!r:.60}, expected a token and a number")


def check_attention(where: str, attention: Any) -> None:
    """Raise ValueError unless `attention` is part -> layers × heads."""
    check(where, {"attention": attention}, {"attention": (dict,)})
    for part, layers in attention.items():
        rows = layers if isinstance(layers, list) else [None]
        for row in rows:
            if not isinstance(row, list) or not row or {type(x) for x in row} - set(NUMBER):
                found = f"attention: {part}: found {row!r:.60}"
                raise ValueError(f"{where}: {found}, expected a list of numbers per layer")
