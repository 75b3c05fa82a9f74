"""The files of results in a run's folder: how they are written, checked, and continued.

`results.jsonl` (`results-rankR.jsonl` for rank R of several) starts with a head, which is a record
without `id` that holds every setting. One line follows for each question of each unit. A unit is
one batch under one arm and seed; it is written at once, flushed and synced. A killed process leaves
at most one incomplete unit, at the end; it is cut off and computed again. Anything else that is not
as expected is refused, naming file and line.

Does not know: what a unit computes.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

Record = dict[str, Any]


class Key(NamedTuple):
    """One unit: a batch by its number, an arm by its name, a seed."""

    batch: int
    arm: str
    seed: int


Units = Mapping[Key, Sequence[str]]  # the ids of each unit's questions, in the order of computation

# Types of the fields that are counted and compared, in a record that has them.
NUMBERS = ("read", "thought", "written", "seconds", "memory_bytes", "nll")
FIELD_TYPES: dict[str, Any] = dict.fromkeys(NUMBERS, int | float)
FIELD_TYPES |= {"correct": bool | None, "text": str, "agents": list}


def files(folder: Path) -> list[Path]:
    """Return all files of results of a folder."""
    return sorted(folder.glob("results*.jsonl"))


def read_head(path: Path) -> Record | None:
    """Return the head of a file, or None if it was not written completely.

    Raises ValueError for another first line.
    """
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return None
    head = parsed(path, 1, line)
    if "id" in head or not isinstance(head.get("settings"), dict):
        problem = f"found {line[:60]!r}, expected the head of a run with its settings"
        raise ValueError(f"{path}: line 1: {problem}")
    return head


def check_settings(path: Path, settings: Record) -> None:
    """Raise ValueError naming the first setting that differs from the one in a file's head."""
    head = read_head(path)
    if head is None:
        return
    found = head["settings"]
    for name in dict.fromkeys([*settings, *found]):
        if found.get(name) == settings.get(name):
            continue
        is_flag = name in head.get("arguments", {})
        flag = f"{name} (--{name.replace('_', '-')})" if is_flag else name
        old, new = (json.dumps(x.get(name), ensure_ascii=False)[:80] for x in (found, settings))
        problem = f"found {old}, expected {new}; other settings need another --out"
        raise ValueError(f"{path}: line 1: {flag}: {problem}")


def whole_units(path: Path, units: Units) -> tuple[list[list[Record]], int]:
    """Return the complete units, as their records, and how many bytes end with the last one.

    Raises ValueError naming the line of a record that is not expected there.
    """
    done: list[list[Record]] = []
    unit: list[Record] = []
    seen: set[Key] = set()
    end = 0
    for number, start, line in numbered_lines(path):
        if not line.endswith(b"\n"):
            break  # the process was killed while it wrote this line
        record = parsed(path, number, line)
        if number == 1:
            end = start + len(line)
            continue
        key = key_of(record)
        try:
            check_record(record, key, unit, units, seen)
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from error
        unit.append(record)
        if len(unit) == len(units[key]):
            done.append(unit)
            seen.add(key)
            unit, end = [], start + len(line)
    return done, end


def check_record(
    record: Record, key: Key, unit: Sequence[Record], units: Units, seen: set[Key]
) -> None:
    """Raise ValueError if a record cannot follow the first records of its unit.

    `key` is the record's own, `seen` are the keys of the complete units before.
    """
    if not isinstance(key.arm, str) or type(key.batch) is not int or type(key.seed) is not int:
        raise ValueError(f"found {tuple(key)}, expected a batch's number, an arm, a seed")
    if not unit and (key not in units or key in seen):
        why = "a second time" if key in seen else "which is no part of this run"
        raise ValueError(f"found {tuple(key)} {why}, expected another batch, arm and seed")
    unit_key = key_of(unit[0]) if unit else key
    expected = units[unit_key][len(unit)]
    if record.get("id") != expected or key != unit_key:
        raise ValueError(f"id: found {record.get('id')!r}, expected {expected!r}")
    for name, types in FIELD_TYPES.items():
        if name in record and not isinstance(record[name], types):
            raise ValueError(f"{name}: found {record[name]!r:.60}, expected another type")


def whole_lines(path: Path) -> Iterator[Record]:
    """Yield a file's records after its head, without a last line that is still being written.

    Raises ValueError naming a bad line.
    """
    for number, _, line in numbered_lines(path):
        if number > 1 and line.endswith(b"\n"):
            yield parsed(path, number, line)


def key_of(record: Record) -> Key:
    """Return the key of the unit that a record says it belongs to."""
    return Key(record.get("batch", -1), record.get("arm", ""), record.get("seed", -1))


def all_records(folder: Path, units: Units) -> list[Record]:
    """Return the records of all files of a folder, in the order of `units`."""
    found: dict[Key, list[Record]] = {}
    for path in files(folder):
        found |= {key_of(unit[0]): unit for unit in whole_units(path, units)[0]}
    return [record for key in units for record in found.get(key, [])]


def take_up(folder: Path, settings: Record, units: Units) -> tuple[set[Key], dict[str, int]]:
    """Cut incomplete units off all files of a folder.

    Returns the keys of the complete ones, and how many bytes each file has, by its name. Raises
    ValueError for files of other settings, or with a line that is not as expected; then nothing is
    cut.
    """
    ends: dict[str, int] = {}
    done: set[Key] = set()
    # Locked before they are read: a unit that another process appends after the reading would be
    # cut off.
    with locked(folder) as opened:
        for path in opened:
            check_settings(path, settings)
            complete, ends[path.name] = whole_units(path, units)
            keys = {key_of(unit[0]) for unit in complete}
            if twice := keys & done:
                problem = f"found {tuple(min(twice))}, which is in another file of the folder too"
                raise ValueError(f"{path}: {problem}")
            done |= keys
        for path, file in opened.items():
            file.truncate(ends[path.name])
    return done, ends


class Ledger:
    """A file of results that is open for appending. A second process that opens it is refused."""

    def __init__(self, path: Path, head: Record, size: int | None = None) -> None:
        """Open a file, and write `head` if it is new. Raises ValueError, OSError.

        `size` in bytes is that of the file when it was taken up (None: not known). If it is another
        one now, a process has written units that the caller does not know, and ValueError is
        raised.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        with contextlib.ExitStack() as if_it_fails:
            if_it_fails.callback(self.close)
            lock(path, self._file)
            found = self._file.seek(0, os.SEEK_END)  # others may have written before the lock
            if size is not None and found != size:
                problem = f"found {found} bytes, expected {size}: another process has written here"
                raise ValueError(f"{path}: {problem}; the same command goes on")
            if found == 0:
                self.append([head])
                folder = os.open(path.parent, os.O_RDONLY)  # it holds the name of the new file
                os.fsync(folder)
                os.close(folder)
            if_it_fails.pop_all()

    def append(self, unit: Sequence[Record]) -> None:
        """Write one unit's records, all or none, and return when they are on the disk.

        Raises OSError, which says so if the disk is full.
        """
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in unit]
        view = memoryview("".join(lines).encode(errors="surrogatepass"))
        before = self._file.tell()
        try:
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(before)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                problem = f"{self.path}: the disk is full; what was done before is kept"
                raise OSError(error.errno, problem) from error
            raise

    def close(self) -> None:
        """Close the file, and release its lock."""
        self._file.close()


def check_can_lock() -> None:
    """Raise OSError where files cannot be locked, as on Windows."""
    if find_spec("fcntl") is None:
        problem = "found no module fcntl, which locks the files of results"
        raise OSError(f"{problem}, expected Linux, macOS, or WSL on Windows")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Mapping[Path, IO[bytes]]]:
    """Lock all files of results of a folder within a block, and yield them open.

    Raises ValueError if one is locked.
    """
    with contextlib.ExitStack() as held:
        opened = {path: held.enter_context(path.open("r+b")) for path in files(folder)}
        for path, file in opened.items():
            lock(path, file)
        yield opened


def lock(path: Path, file: IO[bytes]) -> None:
    """Lock an open file of results until it is closed. Raises ValueError if it is locked."""
    import fcntl  # Windows has none, see `check_can_lock`

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        problem = "another process is writing here, expected one at a time"
        raise ValueError(f"{path}: {problem}") from error
    if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        # What is written to the replaced file would be lost.
        raise ValueError(f"{path}: another process has replaced it, expected one at a time")


def numbered_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number from 1, first byte, bytes with the line's end) of every line."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, start, line
            start += len(line)


def parsed(path: Path, number: int, line: bytes) -> Record:
    """Return the object in a line. Raises ValueError naming the line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: line {number}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: line {number}: found {line[:60]!r}, expected an object")
    return record
