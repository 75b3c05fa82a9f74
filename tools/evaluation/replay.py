"""Check a finished run: compute one question again and compare it, or grade all texts again.

This module does not depend on the command line.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.shared.files import write_whole

from .arms import Arm
from .bench import Bench, same_mark
from .grading import judge
from .ledger import Units, all_records, check_settings, locked, read_head
from .rows import Row

Record = dict[str, Any]


def replay(bench: Bench, arms: Sequence[Arm], found: Sequence[Record], id_: str) -> bool:
    """Compute the batches of one question again, and print the differences.

    Returns True if there are none. Raises ValueError if no record has this id.
    """
    by_name = {arm.name: arm for arm in arms}
    before = [record for record in found if str(record["id"]) == id_]
    if not before:
        raise ValueError(f"replay (--replay): found {id_!r}, expected the id of a question")
    same = True
    for old in before:
        again = bench.compute(old["batch"], by_name[old["arm"]], old["seed"])
        [new] = [record for record in again if record["id"] == old["id"]]
        why = difference(old, json.loads(json.dumps(new)))
        print(f"{id_}, {old['arm']}, seed {old['seed']}: {why or 'the same'}")
        same = same and why is None
    return same


def difference(old: Record, new: Record) -> str | None:
    """Return a text about the first difference between two records of one question, or None."""

    def said(where: str, found: Any, expected: Any) -> str:
        return f"differs {where}: found {found!r:.60}, expected {expected!r:.60}"

    for i, (a, b) in enumerate(zip(old["agents"], new["agents"], strict=True), start=1):
        where = f"at agent {i}, {a['name']}"
        for field in ("prompt", "thought", "text"):
            if a[field] != b[field]:
                return said(f"{where}: {field}", b[field], a[field])
        if not same_mark(a["mark"], b["mark"]):
            return said(f"{where}: memory", b["mark"], a["mark"])
    for field in ("text", "answer", "correct", "finish_reason"):
        if old.get(field) != new.get(field):
            return said(f"in {field}", new.get(field), old.get(field))
    if "nll" in old and abs(old["nll"] - new["nll"]) > 1e-4 * max(1.0, old["nll"]):
        return said("in nll", new["nll"], old["nll"])
    return None


def regrade(folder: Path, bench: Bench, settings: Record, head: Record, units: Units) -> int:
    """Grade every text of a run again, and rewrite its files. Returns the number of changed grades.

    An interrupted call leaves each file either rewritten or unchanged. `settings` and `head` are
    the current ones; their entries on grading replace those in the files. Raises ValueError while a
    run writes to the folder.
    """
    grading = {name: settings[name] for name in ("run_untrusted_code", "math_verify")}
    rows, changed = {row["id"]: row for row in bench.rows}, 0
    with locked(folder) as opened:
        for path in opened:
            old = (read_head(path) or {"settings": {}})["settings"]
            check_settings(path, settings | {name: old.get(name) for name in grading})
        all_records(folder, units)  # raises an error for an unexpected line
        for path in opened:
            # splitlines() would also split at other characters that a text may contain. Bytes after
            # the last newline are an incomplete line, which is left out.
            first, *lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
            first |= {name: head[name] for name in ("code", "math_verify")}
            first["settings"] |= grading
            first["arguments"]["run_untrusted_code"] = grading["run_untrusted_code"]
            changed += sum(regraded(bench, rows[record["id"]], record) for record in lines)
            text = (json.dumps(line, ensure_ascii=False) + "\n" for line in [first, *lines])
            write_whole(path, "".join(text))
    return changed


def regraded(bench: Bench, row: Row, record: Record) -> bool:
    """Grade the text of a record again, in place. Returns True if the grade changed."""
    if record["metric"] != "accuracy" or "votes" in record:
        return False
    prompt = record["agents"][-1]["prompt"]
    answer, correct = judge(row, record["text"], prompt, bench.grader)
    changed: bool = (answer, correct) != (record["answer"], record["correct"])
    record |= {"answer": answer, "correct": correct}
    return changed
