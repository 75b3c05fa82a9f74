"""The command line: `python -m minimas ask QUESTION` and `python -m minimas info MODEL`. Only parses and prints: the
answer to stdout as it is written, everything else to stderr, an error in one line.
"""

import argparse
import dataclasses
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import prompts
from .agents import TRANSFERS, choose_team, latent_mas, single, text_mas
from .answers import KINDS
from .check import QUESTIONS, STEPS, check
from .core.latent import ALIGNMENTS, EXPECTED
from .fast.quantize import FORMATS
from .info import describe
from .load import TINY, load
from .results import AgentTrace, Result, Usage, Watcher
from .teams import LAYOUTS, Team
from .text.generate import Sampling
from .text.tokenizer import is_text, read_text

# Flags that only some methods read, with their defaults; with another method they would do nothing, and are refused.
ONLY = {
    "team": "sequential",
    "latent_steps": None,
    "align": "ridge",
    "transfer": "full",
    "layout": None,
}
METHODS: dict[str, Any] = {
    "latent_mas": (latent_mas, ONLY),
    "text_mas": (text_mas, ["team"]),
    "single": (single, []),
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"minimas: error: {message}\n")


def whole(low: int) -> Callable[[str], int]:
    """A parser of a flag's value, a whole number not below `low`."""

    def number(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text) or int(text) < low:
            raise argparse.ArgumentTypeError(
                f"found {text!r:.40}, expected a whole number, {low} or more"
            )
        return int(text)

    return number


def align(text: str) -> str:
    """A flag's value: a kind of map, or the file of one."""
    if text not in ALIGNMENTS and not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"found {text!r}, {EXPECTED}")
    return text


def parser() -> Parser:
    top = Parser(
        prog="minimas",
        description="Agents that think in latent space and hand over memory (LatentMAS).",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="ask | check | info")
    ask = commands.add_parser(
        "ask", help="answer a question with a team of agents", allow_abbrev=False
    )
    add = ask.add_argument
    add("question", nargs="?", help="the question, or - to read it from standard input")
    add(
        "--file",
        type=Path,
        metavar="FILE.jsonl",
        help="many questions: one JSON object with a question per line",
    )
    add(
        "--model",
        "-m",
        default=TINY,
        help="folder, FILE.gguf, hub id or hub id:FILE.gguf (default: %(default)s)",
    )
    add("--method", choices=METHODS, default="latent_mas", help="(default: %(default)s)")
    add("--team", help="sequential, hierarchical or FILE.json (default: sequential)")
    add(
        "--latent-steps",
        type=whole(0),
        metavar="N",
        help="thoughts of an agent (default: the model's, else 40)",
    )
    kinds = f"{', '.join(ALIGNMENTS)} or FILE.safetensors (default: ridge, the paper's)"
    add("--align", type=align, metavar="KIND", help=kinds)
    add(
        "--layout",
        choices=LAYOUTS,
        help="one user turn for all agents, or a chat turn each (default: the team's)",
    )
    add("--transfer", choices=TRANSFERS, help="what is handed over of the memory (default: full)")
    add("--kind", choices=KINDS, help="of question (default: by the fields of a row, else free)")
    add(
        "--max-new-tokens",
        "-n",
        type=whole(1),
        metavar="N",
        help="an agent may write (default: the model's or 256)",
    )
    add("--temperature", "--temp", type=float, metavar="T", help="0: greedy (default: the model's)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="keep the likeliest tokens up to this mass (default: the model's)",
    )
    add("--top-k", type=whole(0), metavar="K", help="keep this many; 0: all (default: the model's)")
    add("--seed", "-s", type=whole(0), default=0, metavar="N", help="(default: %(default)s)")
    add(
        "--batch-size",
        type=whole(1),
        default=1,
        metavar="B",
        help="questions of a file at once (default: 1)",
    )
    add(
        "--compile",
        action="store_true",
        help="faster thoughts and tokens after a warm-up of up to a minute",
    )
    add(
        "--json",
        action="store_true",
        help="one JSON object per question on stdout, and nothing else there",
    )
    inspect = commands.add_parser(
        "check", help="say whether a hand-over does a model good", allow_abbrev=False
    )
    inspect.add_argument("model", help="folder, FILE.gguf, hub id or hub id:FILE.gguf")
    inspect.add_argument("--layout", choices=LAYOUTS, help="(default: the team's)")
    inspect.add_argument(
        "--latent-steps", type=whole(1), default=STEPS, metavar="N", help="(default: %(default)s)"
    )
    inspect.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, and nothing else there"
    )
    for command in (ask, inspect):
        add = command.add_argument
        add(
            "--quantize",
            choices=FORMATS,
            help="weights in 4 or 8 bits (default: as the file has them)",
        )
        add(
            "--dtype",
            default="auto",
            help="auto, bfloat16, float16, float32 or float64 (default: the checkpoint's)",
        )
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
        add("--quiet", action="store_true", help="nothing on stderr but errors")
    info = commands.add_parser(
        "info", help="say what a model is and what it will need", allow_abbrev=False
    )
    info.add_argument("model", help="folder, FILE.gguf, hub id or hub id:FILE.gguf")
    for command in (ask, inspect, info):
        command.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 done, 1 failed, 2 usage (or SystemExit(2)), 130 stopped by Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        if args.command == "ask":
            run_ask(args)
        elif args.command == "check":
            run_check(args)
        else:
            print(
                "\n".join(
                    f"{label + ':':<14} {text}" for label, text in describe(args.model).items()
                )
            )
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("\nminimas: stopped", file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError, MemoryError, RuntimeError) as error:
        if args.debug:
            raise
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the flush at exit fails once more
        full = isinstance(
            error, MemoryError | torch.OutOfMemoryError
        ) or "can't allocate memory" in str(error)
        advice = (
            "out of memory: try a smaller --batch-size, --quantize q4, fewer --latent-steps; "
            if full
            else ""
        )
        print(
            f"minimas: error: {advice}{' '.join(str(error).split()) or type(error).__name__}",
            file=sys.stderr,
        )
        return (
            2 if re.match(r"\w+ \(--", str(error)) else 1
        )  # a flag's value, found wrong by what it is for


def run_ask(args: argparse.Namespace) -> None:
    method, flags = METHODS[args.method]
    for flag in ONLY.keys() - set(flags):
        if getattr(args, flag) is not None:
            parser().error(
                f"--{flag.replace('_', '-')}: found with --method {args.method}, which does not read it"
            )
    options = {
        flag: ONLY[flag] if getattr(args, flag) is None else getattr(args, flag) for flag in flags
    }
    rows = list(read_rows(args))
    if args.transfer == "shuffled" and any(len(batch) == 1 for _, batch in batches(rows, args)):
        parser().error(
            "--transfer: found shuffled with one question, expected a --file with two or more of a kind"
        )
    given = {
        k: v for k, v in vars(args).items() if k in Sampling.__dataclass_fields__ and v is not None
    }
    try:
        Sampling(**given)
    except ValueError as error:  # refused before a model is loaded
        parser().error(str(error))
    team = (
        Team.from_json(args.team).with_layout(args.layout)
        if str(args.team).endswith(".json")
        else None
    )
    lm = load(args.model, args.device, args.dtype, args.quantize, args.compile)
    chosen: dict[str, Any] = {}  # in place of the options' names
    if "team" in options:
        chosen["team"] = team or choose_team(lm, str(options["team"]))
    if "align" in options:
        # Here, so that a wrong file is refused before any work.
        chosen["align"] = lm.aligner(str(options["align"]))
    if "layout" in options:
        chosen["team"] = chosen["team"].with_layout(args.layout)
        options["layout"] = chosen["team"].layout
    if args.temperature == 0:
        given["repetition_penalty"] = 1.0  # greedy is greedy
    sampling = dataclasses.replace(lm.sampling, **given)
    unknown = [
        row for row in rows if not re.fullmatch(prompts.TINY_QUESTION, row["question"].strip())
    ]
    if args.model == TINY and unknown and not args.quiet:
        print(f"minimas: {prompts.TINY_HINT}", file=sys.stderr)
    bill: list[Usage] = []
    for kind, batch in batches(rows, args):
        screen = Screen(
            args, batch, {"model": args.model, "method": args.method, **options, "seed": args.seed}
        )
        choices = [row.get("choices") for row in batch]
        asked = {"kind": kind, "choices": choices, "sampling": sampling, "seed": args.seed}
        try:
            questions = [row["question"] for row in batch]
            results = method(lm, questions, watcher=screen, **asked, **options | chosen)
        except KeyboardInterrupt:
            screen.show([None] * len(batch))
            raise
        finally:
            screen.close()
        screen.show(results)
        bill += [result.usage for result in results]
    if not args.quiet:
        print_bill("total", bill)


def run_check(args: argparse.Namespace) -> None:
    lm = load(args.model, args.device, args.dtype, args.quantize)
    if args.model == TINY and not args.quiet:
        print(f"minimas: {prompts.TINY_HINT}; a check's questions are others", file=sys.stderr)
    screen = Screen(args, [{}] * len(QUESTIONS), {})
    try:
        report = check(lm, args.layout, args.latent_steps, screen)
    finally:
        screen.close()
    print(
        json.dumps(dataclasses.asdict(report), ensure_ascii=False)
        if args.json
        else "\n".join(report.lines())
    )


def read_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The questions: one from the argument or standard input, or all of a file, checked line by line."""
    if (args.question is None) == (args.file is None):
        parser().error("expected a QUESTION (or - for standard input), or --file FILE.jsonl")
    if args.file is None:
        try:
            lines = {
                "QUESTION": json.dumps(
                    {"question": sys.stdin.read() if args.question == "-" else args.question}
                )
            }
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input: not UTF-8 text ({error})") from error
    else:
        numbered = enumerate(read_text(args.file).split("\n"), start=1)
        lines = {f"{args.file}: line {number}": line for number, line in numbered if line.strip()}
    for where, line in lines.items():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from error
        question, choices = (
            (row.get("question"), row.get("choices")) if isinstance(row, dict) else (None, None)
        )
        if not isinstance(question, str) or not question.strip() or not is_text(question):
            blank = args.file is None and not str(question).strip()
            problem = f"found {'an empty text' if blank else ascii(question)[:80]}, expected a text that is not empty"
            raise (
                ValueError(f"{where}: question: {problem}")
                if args.file
                else parser().error(f"{where}: {problem}")
            )
        if choices is not None and not (isinstance(choices, dict) and choices):
            raise ValueError(
                f"{where}: choices: found {choices!r:.80}, expected an object, letter: text"
            )
        yield row
    if not lines:
        raise ValueError(
            f"{args.file}: found an empty file, expected one JSON object with a question per line"
        )


def batches(
    rows: list[dict[str, Any]], args: argparse.Namespace
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Runs of rows of one kind, --batch-size at a time; shuffled memories need all of them at once."""

    def kind(row: dict[str, Any]) -> str:
        if args.kind or row.get("choices"):
            return args.kind or "choice"
        if row.keys() & {"tests", "test_list", "entry_point"}:
            return "code"
        return (
            "math" if re.fullmatch(r"\s*[-+]?[\d.,/]+\s*", str(row.get("answer", ""))) else "free"
        )

    for name, run in groupby(rows, key=kind):
        group = list(run)
        size = len(group) if args.transfer == "shuffled" else args.batch_size
        for start in range(0, len(group), size):
            yield name, group[start : start + size]


def print_bill(name: str, usages: Sequence[Usage]) -> None:
    total = Usage.total(usages)
    tokens = f"read {total.prompt_tokens:,}, thought {total.latent_steps:,}, wrote {total.output_tokens:,}"
    spent = f"in {total.seconds:.2f} s, memory {total.memory_bytes / 1e6:,.2f} MB"
    print(f"{name:>14}: {tokens} {spent}", file=sys.stderr, flush=True)


class Screen(Watcher):
    """Shows one batch: the answer as it is written on stdout, the agents' progress and bills on stderr."""

    def __init__(
        self, args: argparse.Namespace, batch: list[dict[str, Any]], settings: dict[str, Any]
    ) -> None:
        self.args, self.batch, self.settings, self.pieces = args, batch, settings, [""] * len(batch)
        self.bar: Any = None

    def begin(self, agent: str, reads: int, thinks: int) -> None:
        if sys.stderr.isatty() and not self.args.quiet:
            from tqdm import tqdm

            self.bar = tqdm(
                total=thinks, desc=f"{agent}: reads {reads}", leave=False, file=sys.stderr
            )

    def thought(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def text(self, question: int, piece: str) -> None:
        self.close()
        self.pieces[question] += piece
        if len(self.batch) == 1 and not self.args.json:
            print(piece, end="", flush=True)

    def end(self, traces: Sequence[AgentTrace]) -> None:
        self.close()
        if any(self.pieces) and len(self.batch) == 1 and not self.args.json:
            print(flush=True)  # the answer is complete
        if not self.args.quiet:
            print_bill(traces[0].name, traces)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def show(self, results: Sequence[Result | None]) -> None:
        """Print what is not on stdout yet: of a question that was interrupted (None), the text so far."""
        for row, text, result in zip(self.batch, self.pieces, results, strict=True):
            if self.args.json and (text or result):
                done: dict[str, Any] = {
                    "question": row["question"],
                    "text": text,
                    "finish_reason": "interrupted",
                }
                if result:
                    done = dataclasses.asdict(result) | {"usage": dataclasses.asdict(result.usage)}
                print(
                    json.dumps({"id": row.get("id")} | self.settings | done, ensure_ascii=False),
                    flush=True,
                )
            elif len(self.batch) > 1 and (text or result):
                print(text, flush=True)
            if result and result.finish_reason == "length" and not self.args.quiet:
                print(
                    f"{'':>14}  cut off at --max-new-tokens {result.agents[-1].output_tokens}",
                    file=sys.stderr,
                )


if __name__ == "__main__":
    sys.exit(main())
