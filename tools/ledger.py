"""A run's folder: the file of results that loses nothing, and how it is taken up again.

`results.jsonl` (of rank R of several: `results-rankR.jsonl`) starts with a head, a record without `id` that holds every
setting, and has one line for each question of each unit. A unit, one batch under one arm and seed, is written at once,
flushed and synced. A kill leaves at most one unit in pieces at the end; it is cut off and computed again. Anything else
that is not as expected is refused by file and line: results are not guessed at.

Does not know: what a unit computes.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]


class Key(NamedTuple):
    """One unit: a batch by its number, an arm by its name, a seed."""

    batch: int
    arm: str
    seed: int


# What is counted and compared of a record, if it is there.
KINDS: dict[str, Any] = dict.fromkeys(
    ["read", "thought", "written", "seconds", "memory_bytes", "nll"], int | float
)
KINDS |= {"correct": bool | None, "text": str, "agents": list}
Units = Mapping[Key, Sequence[str]]  # the ids of each unit's questions, in the order of computation


def files(folder: Path) -> list[Path]:
    """All files of results of a folder."""
    return sorted(folder.glob("results*.jsonl"))


def read_head(path: Path) -> Record | None:
    """The head of a file; None where not even that was written whole. Raises ValueError for another first line."""
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return None
    head = _parse(path, 1, line)
    if "id" in head or not isinstance(head.get("settings"), dict):
        raise ValueError(
            f"{path}: line 1: found {line[:60]!r}, expected the head of a run with its settings"
        )
    return head


def check(path: Path, settings: Record) -> None:
    """Raise ValueError naming the first setting of a file's head that is another one now."""
    head = read_head(path)
    if head is None:
        return
    found = head["settings"]
    for name in dict.fromkeys([*settings, *found]):
        if found.get(name) != settings.get(name):
            flag = (
                f"{name} (--{name.replace('_', '-')})"
                if name in head.get("arguments", {})
                else name
            )
            old, new = (json.dumps(x.get(name), ensure_ascii=False)[:80] for x in (found, settings))
            raise ValueError(
                f"{path}: line 1: {flag}: found {old}, expected {new}; other settings need another --out"
            )


def whole_units(path: Path, units: Units) -> tuple[list[list[Record]], int]:
    """The units that are whole, as their records, and the number of bytes up to the end of the last of them.

    Raises ValueError naming the line of a record that cannot stand there.
    """
    done: list[list[Record]] = []
    unit: list[Record] = []
    seen: set[Key] = set()
    end = 0
    for number, start, line in _lines(path):
        if not line.endswith(b"\n"):
            break  # the kill came while it was written
        record = _parse(path, number, line)
        if number == 1:
            end = start + len(line)
            continue
        key = key_of(record)
        if not isinstance(key.arm, str) or type(key.batch) is not int or type(key.seed) is not int:
            raise ValueError(
                f"{path}: line {number}: found {tuple(key)}, expected a batch's number, an arm, a seed"
            )
        if not unit and (key not in units or key in seen):
            why = "a second time" if key in seen else "which is no part of this run"
            raise ValueError(
                f"{path}: line {number}: found {tuple(key)} {why}, expected another batch, arm and seed"
            )
        expected = units[key_of(unit[0]) if unit else key][len(unit)]
        if record.get("id") != expected or (unit and key != key_of(unit[0])):
            raise ValueError(
                f"{path}: line {number}: id: found {record.get('id')!r}, expected {expected!r}"
            )
        for name, kinds in KINDS.items():
            if name in record and not isinstance(record[name], kinds):
                raise ValueError(
                    f"{path}: line {number}: {name}: found {record[name]!r:.60}, expected another type"
                )
        unit.append(record)
        if len(unit) == len(units[key]):
            done.append(unit)
            seen.add(key)
            unit, end = [], start + len(line)
    return done, end


def whole_lines(path: Path) -> Iterator[Record]:
    """A file's records behind its head, up to a line that is being written; raises ValueError naming a bad line."""
    for number, _, line in _lines(path):
        if number > 1 and line.endswith(b"\n"):
            yield _parse(path, number, line)


def key_of(record: Record) -> Key:
    return Key(record.get("batch", -1), record.get("arm", ""), record.get("seed", -1))


def records(folder: Path, units: Units) -> list[Record]:
    """Every record of a folder's files in the order of `units`: the merged table."""
    found = {
        key_of(unit[0]): unit for path in files(folder) for unit in whole_units(path, units)[0]
    }
    return [record for key in units for record in found.get(key, [])]


def take_up(folder: Path, settings: Record, units: Units) -> set[Key]:
    """Cut off what a kill has left in pieces, in all files of a folder, and return the units that are done.

    Raises ValueError for files of other settings, or with a line that is not as expected: nothing is cut then.
    """
    found = {}
    for path in files(folder):
        check(path, settings)
        found[path] = whole_units(path, units)
    done: set[Key] = set()
    for path, (whole, _) in found.items():
        keys = {key_of(unit[0]) for unit in whole}
        if twice := keys & done:
            raise ValueError(
                f"{path}: found {tuple(min(twice))}, which is in another file of the folder too"
            )
        done |= keys
    for path, (_, end) in found.items():
        with path.open("r+b") as file:
            lock(path, file)
            file.truncate(end)
    return done


class Ledger:
    """A file of results that is open for more; a second process that opens it is refused."""

    def __init__(self, path: Path, head: Record) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        lock(path, self._file)
        if self._file.tell() == 0:
            self.append([head])
            folder = os.open(
                path.parent, os.O_RDONLY
            )  # the name of a new file is the folder's to keep
            os.fsync(folder)
            os.close(folder)

    def append(self, unit: Sequence[Record]) -> None:
        """Write one unit's records at once, and return when they are on the disk; all of them or none."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in unit]
        data = "".join(lines).encode(errors="surrogatepass")
        before = self._file.tell()
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            os.truncate(self.path, before)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno, f"{self.path}: the disk is full; what was done before is kept"
                ) from error
            raise

    def close(self) -> None:
        self._file.close()


def lock(path: Path, file: Any) -> None:
    """Keep an open file of results to this process until it is closed; ValueError if another one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(
            f"{path}: another process is writing here, expected one at a time"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was before."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{path}: not written, and as it was before ({error.strerror})"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, start, line
            start += len(line)


def _parse(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: line {number}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: line {number}: found {line[:60]!r}, expected an object")
    return record
