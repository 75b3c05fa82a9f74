"""The tables of docs/results.md, computed from the raw records in docs/results/.

    python tools/results.py                          # rewrite every table in place
    python tools/results.py --check                  # status 1 if a table differs from its records
    python tools/results.py --add NAME RUN_DIR …     # store runs as docs/results/NAME.jsonl.gz

A table stands between two comments, `<!-- records: NAME; base: ARM -->` and `<!-- end -->`. NAME is
one or more files of docs/results/, joined with +; ARM is the one that the last column compares with,
question by question. A record is a line of `results.jsonl`, as tools/evaluate.py writes it. Does not
know: how records come about.
"""

import argparse
import gzip
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, RECORDS = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
sys.path.insert(0, str(ROOT))

from stats import bootstrap, paired, share  # noqa: E402

Record = dict[str, Any]
BLOCK = re.compile(
    r"(<!-- records: (?P<names>[^;]+); base: (?P<base>.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL
)


def read_records(names: str) -> list[Record]:
    """Return the records of one or more stored files, without their heads; a later file adds to an earlier one."""
    found = []
    for name in names.split("+"):
        with gzip.open(RECORDS / f"{name.strip()}.jsonl.gz", "rt", encoding="utf-8") as file:
            found += [record for record in map(json.loads, file) if "id" in record]
    return found


def store(name: str, folders: Sequence[Path]) -> None:
    """Write the result files of runs, head by head, as one compressed file; the same input gives the same bytes."""
    text = "".join(
        path.read_text(encoding="utf-8")
        for folder in folders
        for path in sorted(folder.glob("*.jsonl"))
    )
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def values(records: Sequence[Record], field: str) -> dict[tuple[str, int], float]:
    """Return (question, seed) -> value, for the records that have one."""
    return {(r["id"], r["seed"]): float(r[field]) for r in records if r.get(field) is not None}


def table(records: Sequence[Record], base: str) -> str:
    """Return a Markdown table with a line for each arm. Raises ValueError where no record is of arm `base`."""
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record["arm"], []).append(record)
    if base not in arms:
        raise ValueError(f"base: found {base!r}, expected one of {', '.join(arms)}")
    losses = all("nll" in record for record in records)
    line = loss_line if losses else answer_line
    head = ["arm", "n", "gold NLL, 95 %"] if losses else ANSWER_HEAD
    lines = [[*head, f"− {base}"], ["---", *["--:"] * len(head)]]
    lines += [
        [name, *line(some), difference(some, arms[base], losses)] for name, some in arms.items()
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


ANSWER_HEAD = [
    "arm",
    "n",
    "right, 95 %",
    "cut off",
    "prefilled",
    "thoughts",
    "generated",
    "s per question",
]


def answer_line(records: Sequence[Record]) -> list[str]:
    right, low, high = share(list(values(records, "correct").values()))
    cut = mean(record["finish_reason"] == "length" for record in records)
    counts = [
        f"{mean(record[name] for record in records):,.0f}"
        for name in ("read", "thought", "written")
    ]
    seconds = f"{median(record['seconds'] for record in records):.3g}"
    return [
        str(len(records)),
        f"{right:.1%} [{low:.1%}, {high:.1%}]",
        f"{cut:.0%}",
        *counts,
        seconds,
    ]


def loss_line(records: Sequence[Record]) -> list[str]:
    middle, low, high = bootstrap(list(values(records, "nll").values()))
    return [str(len(records)), f"{middle:.3f} [{low:.3f}, {high:.3f}]"]


def difference(records: Sequence[Record], base: Sequence[Record], losses: bool) -> str:
    """Return the paired difference to the base arm in words; "" for the base arm itself."""
    if records is base:
        return ""
    field = "nll" if losses else "correct"
    line = paired(values(records, field), values(base, field), exact=not losses)
    if line is None:
        return ""
    p = "p < 0.001" if line["p"] < 0.001 else f"p = {line['p']:.2g}"
    if losses:
        return f"{line['mean']:+.3f} [{line['low']:+.3f}, {line['high']:+.3f}], {p}"
    return f"{line['mean'] * 100:+.0f} points [{line['low'] * 100:+.0f}, {line['high'] * 100:+.0f}], {p}"


def rewritten(page: str) -> str:
    """Return a page with every table computed anew."""
    return BLOCK.sub(
        lambda found: found[1] + table(read_records(found["names"]), found["base"]) + found[5], page
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument(
        "--add", nargs="+", metavar=("NAME", "RUN_DIR"), help="store runs as NAME.jsonl.gz"
    )
    args = parser.parse_args(argv)
    if args.add:
        store(args.add[0], [Path(folder) for folder in args.add[1:]])
        return 0
    old = PAGE.read_text(encoding="utf-8")
    new = rewritten(old)
    if not args.check:
        PAGE.write_text(new, encoding="utf-8")
    return int(args.check and new != old)


if __name__ == "__main__":
    sys.exit(main())
