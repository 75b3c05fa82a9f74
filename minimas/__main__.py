"""The command line: `python -m minimas ask QUESTION`, `check MODEL` and `info MODEL`.

The answer goes to stdout as it is generated, everything else to stderr, and an error is one line.
This module only parses arguments and prints. Does not know: how anything is computed.
"""

import argparse
import dataclasses
import errno
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import __version__, prompts
from .agents import TRANSFERS, choose_team, latent_mas, single, text_mas
from .answers import KINDS
from .check import QUESTIONS, STEPS, check
from .core.errors import ParameterError
from .core.latent import ALIGNMENTS, EXPECTED
from .fast.quantize import FORMATS
from .info import TEAM_TOKENS, describe
from .load import TINY, load
from .results import Result, Usage
from .rows import batches, read_rows
from .screen import Screen, print_bill, print_json
from .teams import LAYOUTS, Team
from .text.generate import Sampling
from .text.tokenizer import is_text

# These flags belong to some methods only: those that have a parameter of this name.
TEAM_FLAGS = ("team", "latent_steps", "align", "transfer", "layout")
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "max_new_tokens")
METHODS: dict[str, Callable[..., list[Result]]] = {
    "latent_mas": latent_mas,
    "text_mas": text_mas,
    "single": single,
}
OUT_OF_MEMORY = "out of memory: try a smaller --batch-size, --quantize q4, fewer --latent-steps; "


# -- arguments -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line without the usage, and exit with status 2."""
        self.exit(2, f"minimas: error: {message}\n")


def whole_number(low: int) -> dict[str, Any]:
    """Return the type and metavar of a flag whose value is a whole number, `low` or more."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text) or int(text) < low:
            expected = f"expected a whole number, {low} or more"
            raise argparse.ArgumentTypeError(f"found {text!r:.40}, {expected}")
        return int(text)

    return {"type": parse, "metavar": "N"}


def alignment(text: str) -> str:
    """Parse the value of --align: a kind of map, or the file of one."""
    if text not in ALIGNMENTS and not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"found {text!r}, {EXPECTED}")
    return text


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    top = Parser(prog="minimas", description="Agents that share a KV cache, not text (LatentMAS).")
    top.add_argument("--version", action="version", version=f"minimas {__version__}")
    commands = top.add_subparsers(required=True, metavar="ask | check | info")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Parser:
        parser = commands.add_parser(name, help=text, allow_abbrev=False)
        parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
        parser.set_defaults(run=run)
        return parser

    model = "folder, FILE.gguf, hub id, hub id:FILE.gguf or hub id:Q8_0"
    ask = command("ask", run_ask, "answer a question with a team of agents")
    add_question(ask)
    ask.add_argument("--model", "-m", default=TINY, help=f"{model} (default: %(default)s)")
    add_team(ask)
    add_sampling(ask)
    add_device(ask)
    compile_help = "faster steps after a warm-up of up to a minute"
    ask.add_argument("--compile", action="store_true", help=compile_help)
    checker = command("check", run_check, "measure what a hand-over does to a model's answers")
    checker.add_argument("model", help=model)
    checker.add_argument("--layout", choices=LAYOUTS, help="(default: the team's)")
    help_steps = "of each agent (default: %(default)s)"
    checker.add_argument("--latent-steps", default=STEPS, help=help_steps, **whole_number(1))
    add_device(checker)
    info = command("info", run_info, "describe a model and the memory that it needs")
    info.add_argument("model", help=model)
    info.add_argument("--batch-size", default=1, help="(default: %(default)s)", **whole_number(1))
    help_context = "prompt tokens and latent steps of a row (default: %(default)s)"
    info.add_argument("--context", default=TEAM_TOKENS, help=help_context, **whole_number(1))
    info.add_argument(
        "--max-new-tokens", "-n", default=256, help="(default: %(default)s)", **whole_number(0)
    )
    return top


def add_question(parser: Parser) -> None:
    """Add what is asked and how the answer is printed."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("question", metavar="QUESTION", nargs="?", help="text, or - to read stdin")
    what.add_argument("--file", type=Path, help="JSON Lines, an object with a question per line")
    add("--kind", choices=KINDS, help="of question (default: by a row's fields, else free)")
    add(
        "--batch-size",
        default=1,
        help="rows of a file at once (default: %(default)s)",
        **whole_number(1),
    )


def add_team(parser: Parser) -> None:
    """Add who answers and what the agents hand over. None stands for the defaults of TEAM_FLAGS."""
    add = parser.add_argument
    kinds = f"{', '.join(ALIGNMENTS)} or FILE.safetensors (default: ridge, the paper's)"
    add("--method", choices=METHODS, default="latent_mas", help="(default: %(default)s)")
    add("--team", help="sequential, hierarchical or FILE.json (default: sequential)")
    add("--latent-steps", help="(default: the model's, else 40)", **whole_number(0))
    add("--align", type=alignment, metavar="KIND", help=kinds)
    layouts = "one user turn, or a chat turn for each agent (default: the team's)"
    add("--layout", choices=LAYOUTS, help=layouts)
    add("--transfer", choices=TRANSFERS, help="what is kept of the KV cache (default: full)")


def add_sampling(parser: Parser) -> None:
    """Add how tokens are chosen. None stands for the model's own default."""
    add = parser.add_argument
    add("--max-new-tokens", "-n", help="(default: the model's, else 256)", **whole_number(1))
    add("--temperature", "--temp", type=float, metavar="T", help="0: greedy (default: the model's)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="keep the likeliest tokens up to this mass (default: the model's)",
    )
    add("--top-k", help="keep this many tokens; 0: all (default: the model's)", **whole_number(0))
    add("--seed", "-s", default=0, help="(default: %(default)s)", **whole_number(0))


def add_device(parser: Parser) -> None:
    """Add where and how a model runs, and how much is printed."""
    add = parser.add_argument
    add("--quantize", choices=FORMATS, help="weights in 4 or 8 bits (default: as in the file)")
    dtypes = "auto (as in the file), bfloat16, float16, float32 or float64"
    add("--dtype", default="auto", help=f"{dtypes} (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object per result on stdout")
    add("--quiet", action="store_true", help="print nothing but errors on stderr")


# -- commands ------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit status: 0 done, 1 failed, 2 wrong usage (or SystemExit(2)), 130 Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer is printed whatever the encoding
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("\nminimas: stopped", file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError, MemoryError, RuntimeError) as error:
        if args.debug:
            raise
        return report_error(error, args)


def report_error(error: Exception, args: argparse.Namespace) -> int:
    """Print an error in one line, and return the exit status that follows from it."""
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
        # What is still buffered would fail once more when Python flushes it at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 0  # the reader of stdout, such as `head`, has enough
    text = " ".join(str(error).split()) or type(error).__name__
    status = 1
    if isinstance(error, ParameterError) and hasattr(args, error.parameter):
        flag = f"--{error.parameter.replace('_', '-')}"
        text = f"{'QUESTION' if error.parameter == 'question' else flag}: {error.problem}"
        status = 2
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if full or "can't allocate memory" in text:  # of a CPU, torch raises a plain RuntimeError
        text = OUT_OF_MEMORY + text
    print(f"minimas: error: {text}", file=sys.stderr)
    return status


def run_ask(args: argparse.Namespace) -> None:
    """Answer one question or a file of them. Wrong arguments are refused before a model loads."""
    options = method_options(args)
    changed = {name: getattr(args, name) for name in SAMPLING_FLAGS}
    changed = {name: value for name, value in changed.items() if value is not None}
    Sampling(**changed)  # raises for a wrong value
    if args.temperature == 0:
        changed["repetition_penalty"] = 1.0  # with a penalty it would not be greedy decoding
    rows = read_rows(args.file) if args.file else [{"question": read_question(args.question)}]
    shuffled = args.transfer == "shuffled"  # needs all questions of a kind in one batch
    groups = list(batches(rows, args.kind, len(rows) if shuffled else args.batch_size))
    if shuffled and any(len(batch) == 1 for _, batch in groups):
        expected = "expected a --file with two or more of a kind"
        raise ParameterError("transfer", f"found 'shuffled' with one question, {expected}")
    team: str | Team | None = options.get("team")
    if isinstance(team, str) and team.endswith(".json"):
        team = Team.from_json(team).with_layout(args.layout)  # refused before a model loads
    lm = load(args.model, args.device, args.dtype, args.quantize, args.compile, args.quiet)
    settings = {"model": args.model, "method": args.method, **options, "seed": args.seed}
    if team is not None:
        options["team"] = choose_team(lm, team).with_layout(args.layout)
    if "layout" in options:
        settings["layout"] = options["team"].layout
    known = (re.fullmatch(prompts.TINY_QUESTION, row["question"].strip()) for row in rows)
    if args.model == TINY and not args.quiet and not all(known):
        print(f"minimas: {prompts.TINY_HINT}", file=sys.stderr)
    options |= {"sampling": dataclasses.replace(lm.sampling, **changed), "seed": args.seed}
    bill: list[Usage] = []
    for kind, batch in groups:
        screen = Screen(args, batch, settings)
        options |= {"kind": kind, "choices": [row.get("choices") for row in batch]}
        results: list[Any] = [None] * len(batch)
        try:
            questions = [row["question"] for row in batch]
            results = METHODS[args.method](lm, questions, watcher=screen, **options)
        except KeyboardInterrupt:
            screen.show(results)  # the text so far
            raise
        finally:
            screen.bar.close()
        screen.show(results)
        bill += [result.usage for result in results]
    if not args.quiet:
        print_bill("total", bill)


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the method's own options, given or default; refuse those of other methods."""
    parameters = inspect.signature(METHODS[args.method]).parameters
    options = {}
    for name in TEAM_FLAGS:
        given = getattr(args, name)
        if name in parameters:
            options[name] = parameters[name].default if given is None else given
        elif given is not None:
            problem = f"found with --method {args.method}, expected a method that uses it"
            raise ParameterError(name, problem)
    return options


def read_question(text: str) -> str:
    """Return the question of the command line, or of standard input if it is "-"."""
    try:
        question = sys.stdin.read() if text == "-" else text
    except UnicodeDecodeError as error:
        problem = f"found bytes on standard input ({error}), expected text"
        raise ParameterError("question", problem) from error
    if not question.strip() or not is_text(question):
        raise ParameterError("question", f"found {question!a:.80}, expected a text, not empty")
    return question


def run_check(args: argparse.Namespace) -> None:
    """Measure the hand-over with the built-in questions, and print a table and a verdict."""
    lm = load(args.model, args.device, args.dtype, args.quantize, quiet=args.quiet)
    if args.model == TINY and not args.quiet:
        print(f"minimas: {prompts.TINY_HINT}; a check asks other ones", file=sys.stderr)
    screen = Screen(args, [{}] * len(QUESTIONS), {})
    try:
        report = check(lm, args.layout, args.latent_steps, screen)
    finally:
        screen.bar.close()
    if args.json:
        print_json(dataclasses.asdict(report))
    else:
        print("\n".join(report.lines()))


def run_info(args: argparse.Namespace) -> None:
    """Print what a model is and what it needs, one line for each fact."""
    lines = describe(args.model, args.batch_size, args.context, args.max_new_tokens)
    for label, text in lines.items():
        print(f"{label + ':':<14} {text}")


if __name__ == "__main__":
    sys.exit(main())
