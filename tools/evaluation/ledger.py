"""Write, check and continue the files of results in a run's folder.

`results.jsonl` (`results-rankR.jsonl` for rank R of several) starts with a head, which is a record
without `id` that has all settings. One line follows for each question of each unit. A unit is one
batch of questions with one arm and one seed. It is written and synced as a whole. A killed process
leaves at most one incomplete unit, at the end of the file. That unit is removed and computed again.
Any other unexpected content raises an error that names the file and the line. This module does not
depend on what a unit computes.
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
    """The key of a unit: the number of the batch, the name of the arm, and the seed."""

    batch: int
    arm: str
    seed: int


Units = Mapping[Key, Sequence[str]]  # the question ids of each unit, in the order of computation

# Types of the fields that are added up or compared, if a record has them.
NUMBERS = ("read", "thought", "written", "seconds", "memory_bytes", "nll")
FIELD_TYPES: dict[str, Any] = dict.fromkeys(NUMBERS, int | float)
FIELD_TYPES |= {"correct": bool | None, "text": str, "agents": list}


def files(folder: Path) -> list[Path]:
    """Return all result files of a folder."""
    return sorted(folder.glob("results*.jsonl"))


def read_head(path: Path) -> Record | None:
    """Return the head of a file, or None if it was not written completely.

    Raises ValueError if the first line is not a head.
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
    """Raise ValueError naming the first setting that differs from the head of a file."""
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
        problem = f"found {old}, expected {new}; use another --out for other settings"
        raise ValueError(f"{path}: line 1: {flag}: {problem}")


def whole_units(path: Path, units: Units) -> tuple[list[list[Record]], int]:
    """Return the records of the complete units, and the number of bytes up to their end.

    Raises ValueError naming the line of an unexpected record.
    """
    done: list[list[Record]] = []
    unit: list[Record] = []
    seen: set[Key] = set()
    end = 0
    for number, start, line in numbered_lines(path):
        if not line.endswith(b"\n"):
            break  # the process was killed while writing this line
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
    """Raise ValueError if a record cannot follow `unit`, the first records of its unit.

    `key` is the key in the record; `seen` has the keys of the complete units before it.
    """
    if not isinstance(key.arm, str) or type(key.batch) is not int or type(key.seed) is not int:
        raise ValueError(f"found {tuple(key)}, expected the number of a batch, an arm and a seed")
    if not unit and (key not in units or key in seen):
        why = "a second time" if key in seen else "which is not part of this run"
        raise ValueError(f"found {tuple(key)} {why}, expected another batch, arm and seed")
    unit_key = key_of(unit[0]) if unit else key
    expected = units[unit_key][len(unit)]
    if record.get("id") != expected or key != unit_key:
        raise ValueError(f"id: found {record.get('id')!r}, expected {expected!r}")
    for name, types in FIELD_TYPES.items():
        if name in record and not isinstance(record[name], types):
            raise ValueError(f"{name}: found {record[name]!r:.60}, expected another type")


def whole_lines(path: Path) -> Iterator[Record]:
    """Yield the records of a file after its head, without an incomplete last line.

    Raises ValueError naming a line that is not a JSON object.
    """
    for number, _, line in numbered_lines(path):
        if number > 1 and line.endswith(b"\n"):
            yield parsed(path, number, line)


def key_of(record: Record) -> Key:
    """Return the key of the unit to which a record belongs."""
    return Key(record.get("batch", -1), record.get("arm", ""), record.get("seed", -1))


def all_records(folder: Path, units: Units) -> list[Record]:
    """Return the records of all files of a folder, in the order of `units`."""
    found: dict[Key, list[Record]] = {}
    for path in files(folder):
        found |= {key_of(unit[0]): unit for unit in whole_units(path, units)[0]}
    return [record for key in units for record in found.get(key, [])]


def remove_incomplete_units(
    folder: Path, settings: Record, units: Units
) -> tuple[set[Key], dict[str, int]]:
    """Remove incomplete units from the ends of all files of a folder.

    Returns the keys of the complete units, and the size of each file in bytes, by file name. Raises
    ValueError for a file with other settings or with an unexpected line. Then no file is changed.
    """
    ends: dict[str, int] = {}
    done: set[Key] = set()
    # The files are locked before they are read. Otherwise a unit that another process appends after
    # the reading would be removed.
    with locked(folder) as opened:
        for path in opened:
            check_settings(path, settings)
            complete, ends[path.name] = whole_units(path, units)
            keys = {key_of(unit[0]) for unit in complete}
            if twice := keys & done:
                problem = f"found {tuple(min(twice))}, which another file of the folder has too"
                raise ValueError(f"{path}: {problem}")
            done |= keys
        for path, file in opened.items():
            file.truncate(ends[path.name])
    return done, ends


class Ledger:
    """A result file that one process has open for appending. A second process cannot open it."""

    def __init__(self, path: Path, head: Record, size: int | None = None) -> None:
        """Open a file, and write `head` if the file is new.

        `size` is the size in bytes that `remove_incomplete_units` returned for the file (None: not
        known). Raises ValueError if the file has another size, because then another process has
        added units, and if it is locked. Raises OSError if the file cannot be written.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        with contextlib.ExitStack() as if_it_fails:
            if_it_fails.callback(self.close)
            lock(path, self._file)
            found = self._file.seek(0, os.SEEK_END)  # others may have written before the lock
            if size is not None and found != size:
                problem = f"found {found} bytes, expected {size}: another process has written to it"
                raise ValueError(f"{path}: {problem}; run the same command again to continue")
            if found == 0:
                self.append([head])
                folder = os.open(path.parent, os.O_RDONLY)  # sync the file's name too
                os.fsync(folder)
                os.close(folder)
            if_it_fails.pop_all()

    def append(self, unit: Sequence[Record]) -> None:
        """Write all records of one unit or none, and wait until they are on the disk.

        Raises OSError if they cannot be written, for example because the disk is full.
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
                problem = f"{self.path}: the disk is full; earlier results are kept"
                raise OSError(error.errno, problem) from error
            raise

    def close(self) -> None:
        """Close the file, and release its lock."""
        self._file.close()


def check_can_lock() -> None:
    """Raise OSError if files cannot be locked, as on Windows."""
    if find_spec("fcntl") is None:
        problem = "found no module fcntl, which is needed to lock the result files"
        raise OSError(f"{problem}, expected Linux, macOS, or WSL on Windows")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Mapping[Path, IO[bytes]]]:
    """Open and lock all result files of a folder during a `with` block.

    Raises ValueError if a file is already locked.
    """
    with contextlib.ExitStack() as held:
        opened = {path: held.enter_context(path.open("r+b")) for path in files(folder)}
        for path, file in opened.items():
            lock(path, file)
        yield opened


def lock(path: Path, file: IO[bytes]) -> None:
    """Lock an open result file until it is closed. Raises ValueError if it is already locked."""
    import fcntl  # does not exist on Windows, see `check_can_lock`

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        problem = "another process is writing to it, expected one at a time"
        raise ValueError(f"{path}: {problem}") from error
    if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        # Records written to the replaced file would be lost.
        raise ValueError(f"{path}: another process has replaced it, expected one at a time")


def numbered_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number from 1, offset of the first byte, bytes with the newline) for every line."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, start, line
            start += len(line)


def parsed(path: Path, number: int, line: bytes) -> Record:
    """Return the JSON object in a line. Raises ValueError naming the line if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: line {number}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: line {number}: found {line[:60]!r}, expected an object")
    return record
