"""The command line of tools/report.py.

This module does not depend on the format of records or pages.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tools.shared.arguments import FAILURES, Parser, print_error
from tools.shared.files import write_whole

from .page import render
from .records import read_report, sources


def parser() -> Parser:
    """Return the parser of the command line."""
    about = "Make one HTML file of a run. The file opens without any other file."
    top = Parser("report", description=about, allow_abbrev=False)
    add = top.add_argument
    run = "folder of a run of tools/evaluate.py, or file with the output of minimas ask --json"
    add("run", type=Path, metavar="RUN_DIR|ask.json", help=run)
    out = "(default: %(default)s)"
    add("--out", type=Path, default=Path("report.html"), metavar="FILE.html", help=out)
    add("--debug", action="store_true", help="show a traceback with an error")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0 if done, 1 if failed."""
    args = parser().parse_args(argv)
    try:
        if args.out.is_dir():
            problem = f"found the folder {args.out}, expected the name of a file"
            raise IsADirectoryError(f"out (--out): {problem}")
        for source in sources(args.run):
            if args.out.exists() and args.out.samefile(source):
                problem = f"found {args.out}, which is an input file, expected another file"
                raise ValueError(f"out (--out): {problem}")
        report = read_report(args.run)
        write_whole(args.out, render(report))
    except FAILURES as error:
        if args.debug:
            raise
        print_error("report", error)
        return 1
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {len(report.entries):,} records, {size:.2f} MB")
    for note in report.notes:
        print(f"report: {note}", file=sys.stderr)
    return 0
