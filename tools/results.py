"""Compute the tables of docs/results.md from the raw records in docs/results/.

    python tools/results.py                          # rewrite every table in place
    python tools/results.py --check                  # status 1 if a table differs from its records
    python tools/results.py --add NAME RUN …         # store runs as docs/results/NAME.jsonl.gz

A table is written between two comments, `<!-- records: NAME; base: ARM -->` and `<!-- end -->`.
NAME is the name of a file in docs/results/, or several names joined with +. The last column
compares each arm with ARM, question by question. If ARM is "*, PART", an arm is compared with the
one whose name has PART in place of its own second part. With `; common questions` after ARM, only
questions that all arms have answered count. If several files have the same question in the same
arm, the first one counts. If the records have losses and answers, a line has both of its arm.
A record is a line of `results.jsonl`, as tools/evaluate.py writes it. RUN is the folder of a run or
one of its .jsonl files.
This module only reads records; it does not make them.
"""

import argparse
import gzip
import json
import re
import sys
from collections.abc import Sequence
from itertools import chain, compress
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's tools

from tools.evaluation.ledger import files  # noqa: E402
from tools.evaluation.stats import bootstrap, p_value, paired, share  # noqa: E402
from tools.shared.arguments import FAILURES, print_error  # noqa: E402
from tools.shared.files import write_whole  # noqa: E402
from tools.shared.streams import run_command  # noqa: E402

PAGE, RECORDS = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
Record = dict[str, Any]
BLOCK = re.compile(
    r"(<!-- records: (?P<names>[^;]+); base: (?P<base>[^;]+?)(?P<common>; common questions)? -->\n)"
    r"(.*?)(?P<end><!-- end -->)",
    re.DOTALL,
)
ANSWER_HEAD = [
    "n", "correct, 95 %", "cut off", "prefilled", "thoughts", "generated", "s per question",
]  # fmt: skip
COSTS = {"prefilled", "thoughts", "s per question"}  # left out beside losses
LOSS_HEAD = ["n", "gold NLL, 95 %"]


def read_records(names: str) -> list[Record]:
    """Return the records of stored files, without the heads. `names` are joined with +."""
    found = []
    for name in names.split("+"):
        with gzip.open(RECORDS / f"{name.strip()}.jsonl.gz", "rt", encoding="utf-8") as file:
            found += [record for record in map(json.loads, file) if "id" in record]
    return found


def store(name: str, runs: Sequence[Path]) -> None:
    """Write the result files of runs as one compressed file. A run is a folder or a single file.

    The same results always give the same bytes. Raises FileNotFoundError for a folder without
    results, before an older file is overwritten.
    """
    paths = []
    for run in runs:
        found = [run] if run.is_file() else files(run)
        if not found:
            raise FileNotFoundError(
                f"{run}: found no results*.jsonl, expected a run of evaluate.py"
            )
        paths += found
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def values(records: Sequence[Record], field: str) -> dict[tuple[str, int], float]:
    """Return (question, seed) -> value of a field, for the records that have it."""
    return {(r["id"], r["seed"]): float(r[field]) for r in records if r.get(field) is not None}


def label(record: Record) -> str:
    """Return the name of a record's arm: its method, its latent steps × map, and unusual settings.

    Unusual settings are a team, layout, transfer, prefix or vote other than the default. An
    evaluation names only the settings that differ within its own run. A name that was set by hand
    is kept.
    """
    method = record.get("method", "?")
    if not record["arm"].startswith(method):
        return str(record["arm"])
    parts, steps = [method], record["latent_steps"]
    if steps is not None:
        parts.append(f"{steps} × {record['align']}" if steps else "prompts only")
    parts += [f"team {record['team']}"] * (record["team"] not in (None, "sequential"))
    parts += [f"layout {record['layout']}"] * (record["layout"] is not None)
    parts += [f"transfer {record['transfer']}"] * (record["transfer"] not in (None, "full"))
    parts += ["turns open"] * (record.get("close") is False)
    parts += [f"prefix {record.get('prefix')!r}"] * (record.get("prefix") is not None)
    parts += [f"vote of {record.get('samples')}"] * ((record.get("samples") or 1) > 1)
    return ", ".join(parts)


def table(records: Sequence[Record], base: str, common: bool = False) -> str:
    """Return a Markdown table with a line for each arm.

    With `common`, only the questions that all arms have count. Cells of a metric that was not
    measured are empty. Raises ValueError if no record belongs to the arm `base`.
    """
    both = [[r for r in records if ("nll" in r) == losses] for losses in (True, False)]
    left_out = COSTS if all(both) else set()
    parts = [columns(mine, base, common, left_out) for mine in both if mine]
    head, *names = dict.fromkeys(name for part in parts for name in part)
    if base.startswith("*, "):  # an arm follows its base
        order = {name: place for place, name in enumerate(names)}
        names.sort(key=lambda name: order[base_of(name, base)])
    lines = []
    for name in (head, *names):
        cells = [part.get(name, [""] * len(part[head])) for part in parts]
        lines.append([name, *chain(*cells)])
    lines.insert(1, ["---", *["--:"] * (len(lines[0]) - 1)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def columns(
    records: Sequence[Record], base: str, common: bool, left_out: set[str]
) -> dict[str, list[str]]:
    """Return the cells of each arm, after those of the head, from records of one metric."""
    answers: dict[str, dict[tuple[str, int], Record]] = {}
    for record in records:
        own = answers.setdefault(label(record), {})
        own.setdefault((record["id"], record["seed"]), record)
    arms = {name: list(own.values()) for name, own in answers.items()}
    if common:
        shared = set.intersection(*({r["id"] for r in mine} for mine in arms.values()))
        arms = {name: [r for r in mine if r["id"] in shared] for name, mine in arms.items()}
    losses = "nll" in records[0]
    line, head = (loss_line, LOSS_HEAD) if losses else (answer_line, ANSWER_HEAD)
    shown = [name not in left_out for name in head]
    cells = {"arm": [*compress(head, shown), f"− {base.removeprefix('*, ')}"]}
    for name, mine in arms.items():
        other = base_of(name, base)
        if other not in arms:
            raise ValueError(f"base: found {other!r}, expected one of {', '.join(arms)}")
        compared = "" if name == other else difference(mine, arms[other], losses)
        cells[name] = [*compress(line(mine), shown), compared]
    return cells


def base_of(name: str, base: str) -> str:
    """Return the name of the arm that the arm `name` is compared with."""
    if not base.startswith("*, "):
        return base
    first, _, *rest = [*name.split(", "), ""]
    return ", ".join(filter(None, [first, base.removeprefix("*, "), *rest]))


def answer_line(records: Sequence[Record]) -> list[str]:
    """Return the cells after the name of an arm whose answers were graded."""
    answers = list(values(records, "correct").values())  # programs may not be graded
    right, low, high = share(answers)
    cut = mean(record["finish_reason"] == "length" for record in records)
    counts = [f"{mean(r[name] for r in records):,.0f}" for name in ("read", "thought", "written")]
    seconds = f"{median(record['seconds'] for record in records):.3g}"
    accuracy = f"{right:.1%} [{low:.1%}, {high:.1%}]"
    return [str(len(answers)), accuracy, f"{cut:.0%}", *counts, seconds]


def loss_line(records: Sequence[Record]) -> list[str]:
    """Return the cells after the name of an arm whose loss was measured."""
    losses = list(values(records, "nll").values())
    middle, low, high = bootstrap(losses)
    return [str(len(losses)), f"{middle:.3f} [{low:.3f}, {high:.3f}]"]


def difference(records: Sequence[Record], base: Sequence[Record], losses: bool) -> str:
    """Return the paired difference from the base arm as text, or "" without a common question.

    For losses it includes the median, because a few questions may have most of the difference.
    """
    field = "nll" if losses else "correct"
    first, second = values(records, field), values(base, field)
    line = paired(first, second, exact=not losses)
    if line is None:
        return ""
    scale, form, unit = (1, "+.3f", "") if losses else (100, "+.0f", " points")
    middle, low, high = (format(line[name] * scale, form) for name in ("mean", "low", "high"))
    text = f"{middle}{unit} [{low}, {high}], {p_value(line)}"
    if losses:
        typical = median(first[key] - second[key] for key in first if key in second)
        text += f", median {round(typical, 3) + 0.0:+.3f}"  # + 0.0: no -0.000
    return text


def rewritten(page: str) -> str:
    """Return a page in which every table is computed from its records."""

    def block(found: re.Match[str]) -> str:
        records, common = read_records(found["names"]), found["common"] is not None
        return found[1] + table(records, found["base"], common) + found["end"]

    if len(BLOCK.findall(page)) != page.count("<!-- records"):
        expected = "expected <!-- records: NAME; base: ARM --> with an <!-- end --> for each"
        raise ValueError(f"{PAGE}: found a comment for a table that cannot be read, {expected}")
    return BLOCK.sub(block, page)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns 0 if done, and 1 if it failed or, with --check, if a table differs.
    """
    description = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    names = ("NAME", "RUN")
    parser.add_argument("--add", nargs="+", metavar=names, help="store runs as NAME.jsonl.gz")
    args = parser.parse_args(argv)
    if args.add and (args.check or len(args.add) < 2):
        parser.error("argument --add: expected NAME and one or more RUN, without --check")
    try:
        if args.add:
            store(args.add[0], [Path(run) for run in args.add[1:]])
            return 0
        return rewrite(args.check)
    except FAILURES as error:
        print_error("results", error)
        return 1


def rewrite(only_check: bool) -> int:
    """Write the page with new tables, or only compare them.

    Returns 1 if `only_check` is True and a table differs, otherwise 0.
    """
    old = PAGE.read_text(encoding="utf-8")
    new = rewritten(old)
    if not only_check:
        write_whole(PAGE, new)
    return int(only_check and new != old)


if __name__ == "__main__":
    sys.exit(run_command("results", main))
