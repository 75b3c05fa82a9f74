"""Draw the results of tools/evaluate.py as SVG and PNG, and write the numbers as JSON.

    python tools/plot.py steps RUN [RUN …] --out steps          # by number of latent steps
    python tools/plot.py costs RUN [RUN …] --paper paper_tables.json --task GSM8K --out costs
    python tools/plot.py audit RUN --out audit                  # the difference made by each arm
    python tools/plot.py drift RUN --out drift                  # for a run with --lens
    python tools/plot.py thoughts --model DIR --data FILE.jsonl --align ridge,prenorm --out thoughts
    python tools/plot.py again steps.json --out elsewhere       # from the numbers, without the run

The command writes OUT.json, OUT.svg and OUT.png. It needs matplotlib (pip install matplotlib).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's tools and minimas

from tools.shared.interrupt import quit_quietly

quit_quietly()

import minimas  # noqa: E402
from minimas.core.config import read_json  # noqa: E402
from tools.evaluation import figures  # noqa: E402
from tools.evaluation.drawing import DRAWN, draw  # noqa: E402
from tools.evaluation.feeders import kind_of_map  # noqa: E402
from tools.evaluation.figures import Figure  # noqa: E402
from tools.evaluation.rows import kind_of, read_rows  # noqa: E402
from tools.shared.arguments import FAILURES, Parser, list_of, print_error, whole  # noqa: E402
from tools.shared.files import write_whole  # noqa: E402
from tools.shared.streams import run_command  # noqa: E402

MAPS = "ridge,prenorm,identity,fitted,token,pause,random"  # the default of `thoughts`


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0 if done, 1 if failed."""
    args = parser().parse_args(argv)
    try:
        as_json = args.out.with_name(args.out.name + ".json")
        if getattr(args, "paper", None) and args.paper.resolve() == as_json.resolve():
            raise ValueError(f"--out: found {args.out}, whose {as_json.name} would replace --paper")
        figure = collect(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(as_json, json.dumps(figure, ensure_ascii=False) + "\n")
        try:
            draw(figure, args.out)
        except (LookupError, TypeError, AttributeError) as error:
            if args.what != "again":
                raise
            raise ValueError(
                f"{args.numbers}: found other numbers than {figure['what']!r} needs ({error!r}), "
                "expected the JSON of a picture"
            ) from error
    except FAILURES as error:
        print_error("plot", error)
        return 1
    return 0


def parser() -> Parser:
    """Return the parser of the command line."""
    top = Parser("plot", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    what = top.add_subparsers(dest="what", required=True, parser_class=Parser)
    for name, count in (("steps", "+"), ("costs", "+"), ("audit", 1), ("drift", 1)):
        command = what.add_parser(name)
        command.add_argument("runs", type=Path, nargs=count, metavar="RUN", help="folder of a run")
    add = what.choices["costs"].add_argument
    add("--paper", type=Path, metavar="FILE", help="tables of the paper, drawn below")
    add("--task", default="GSM8K", help="task in the tables of the paper (default: %(default)s)")
    add = what.add_parser("thoughts").add_argument
    add("--model", "-m", default="weights/tiny")
    add("--data", type=Path, required=True, metavar="FILE.jsonl", help="questions")
    add("--limit", type=whole(1), default=8, help="number of questions (default: %(default)s)")
    add("--align", type=list_of(kind_of_map), default=MAPS, help="comma-separated list of maps")
    add("--steps", type=whole(2), default=80, help="latent steps (default: %(default)s)")
    add("--dtype", default="auto")
    add("--device", default="auto")
    what.add_parser("again").add_argument("numbers", type=Path, metavar="FILE.json")
    for command in what.choices.values():
        command.add_argument(
            "--out", type=Path, required=True, metavar="OUT", help="path without extension"
        )
    return top


def collect(args: argparse.Namespace) -> Figure:
    """Return the numbers of the chosen picture. Raises ValueError, or OSError for a file."""
    if args.what == "steps":
        return figures.steps(figures.runs(args.runs))
    if args.what == "costs":
        paper = read_json(args.paper) if args.paper else None
        return figures.costs(figures.runs(args.runs), paper, args.task)
    if args.what == "audit":
        return figures.forest(figures.runs(args.runs))
    if args.what == "drift":
        return figures.drift(figures.runs(args.runs))
    if args.what == "thoughts":
        rows = read_rows(args.data)[: args.limit]
        kind = kind_of(rows[0])
        lm = minimas.load(args.model, device=args.device, dtype=args.dtype)
        questions = [row["question"] for row in rows if kind_of(row) == kind]
        return figures.thoughts(lm, questions, args.align, args.steps, kind)
    figure = read_json(args.numbers)
    if figure.get("what") not in DRAWN:
        expected = f"expected one of {', '.join(DRAWN)}"
        raise ValueError(f"{args.numbers}: what: found no name of a picture, {expected}")
    return figure


if __name__ == "__main__":
    sys.exit(run_command("plot", main))
