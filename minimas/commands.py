"""What the commands do: answer questions, check a hand-over, describe a model.

This module only connects arguments with functions. Does not know: flags, how anything is computed.
"""

import argparse
import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

from . import __version__, agents, prompts
from .check import QUESTIONS, check
from .core.errors import ParameterError
from .info import describe
from .load import LM, TINY, load
from .results import Usage
from .rows import batches, read_rows
from .screen import Screen, bill, print_json
from .streams import say, silence
from .teams import Team
from .text.generate import Sampling
from .text.tokenizer import is_text

# These flags belong to some methods only: those that have a parameter of this name.
TEAM_FLAGS = ("team", "latent_steps", "align", "transfer", "layout")
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "max_new_tokens")
OUT_OF_MEMORY = "out of memory: try a smaller --batch-size, --quantize q4, fewer --latent-steps; "


def run(args: argparse.Namespace) -> int:
    """Run the command of `args`. Returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    try:
        {"ask": run_ask, "check": run_check, "info": run_info}[args.command](args)
        sys.stdout.flush()
        return 0
    except (OSError, ValueError, ImportError, MemoryError, RuntimeError) as error:
        if args.debug:
            raise
        return report_error(error, args)


def report_error(error: Exception, args: argparse.Namespace) -> int:
    """Print an error in one line, and return the exit status that follows from it."""
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return 0  # the reader of stdout, such as `head`, has enough
    text, status = " ".join(str(error).split()) or type(error).__name__, 1
    if isinstance(error, ParameterError) and hasattr(args, error.parameter):
        flag = f"--{error.parameter.replace('_', '-')}"
        text = f"{'QUESTION' if error.parameter == 'question' else flag}: {error.problem}"
        status = 2
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if full or "can't allocate memory" in text:  # of a CPU, torch raises a plain RuntimeError
        text = OUT_OF_MEMORY + text
    say(f"minimas: error: {text}")
    return status


def run_ask(args: argparse.Namespace) -> None:
    """Answer one question or a file of them. Wrong arguments are refused before a model loads."""
    method = getattr(agents, args.method)
    options = method_options(args, method)
    changed = given(args, SAMPLING_FLAGS)
    Sampling(**changed)  # raises for a wrong value
    if args.temperature == 0:
        changed["repetition_penalty"] = 1.0  # with a penalty it would not be greedy decoding
    rows = read_rows(args.file) if args.file else [{"question": read_question(args.question)}]
    shuffled = args.transfer == "shuffled"  # needs all questions of a kind in one batch
    groups = list(batches(rows, args.kind, len(rows) if shuffled else args.batch_size))
    if shuffled and any(len(batch) == 1 for _, batch in groups):
        expected = "expected a --file with two or more of a kind"
        raise ParameterError("transfer", f"found 'shuffled' with one question, {expected}")
    settings = {"model": args.model, "method": args.method, **options, "seed": args.seed}
    team = options.get("team", "")
    if team.endswith(".json"):
        team = Team.from_json(team).with_layout(args.layout)  # refused before a model loads
    lm = load(args.model, args.device, args.dtype, args.quantize, args.compile)
    if args.think is not None and lm.tokenizer:
        lm.tokenizer.set_thinking(args.think)
    if team:
        options["team"] = agents.choose_team(lm, team).with_layout(args.layout)
    options |= {"sampling": dataclasses.replace(lm.sampling, **changed), "seed": args.seed}
    settings |= used_settings(args, lm, options)
    screen = Screen(args, rows)
    known = (re.fullmatch(prompts.TINY_QUESTION, row["question"].strip()) for row in rows)
    if args.model == TINY and not all(known):
        screen.tell(f"minimas: {prompts.TINY_HINT}")
    if args.compile:
        screen.tell("minimas: compiling, up to a minute")
        began = perf_counter()
        warm_up(method, lm, options, max(len(batch) for _, batch in groups))
        screen.tell(f"{'compile':>14}: {perf_counter() - began:.2f} s")
    usages: list[Usage] = []
    for kind, batch in groups:
        screen.start(len(batch))
        results: list[Any] = [None] * len(batch)
        options |= {"kind": kind, "choices": [row.get("choices") for row in batch]}
        try:
            questions = [row["question"] for row in batch]
            results = method(lm, questions, watcher=screen, **options)
        finally:
            screen.show(results, settings | {"kind": kind})  # if interrupted, the text so far
        usages += [result.usage for result in results]
    screen.tell(f"{bill('total', usages)}, wall time {perf_counter() - args.began:.2f} s")


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the flags of these names that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def method_options(args: argparse.Namespace, method: Callable[..., Any]) -> dict[str, Any]:
    """Return the method's own options, given or default; refuse those of other methods."""
    parameters = inspect.signature(method).parameters
    options = {name: parameters[name].default for name in TEAM_FLAGS if name in parameters}
    for name, value in given(args, TEAM_FLAGS).items():
        if name not in options:
            problem = f"found with --method {args.method}, expected a method that uses it"
            raise ParameterError(name, problem)
        options[name] = value
    return options


def used_settings(args: argparse.Namespace, lm: LM, options: dict[str, Any]) -> dict[str, Any]:
    """Return what a result depends on besides the values of flags, for --json."""
    return {
        "layout": options["team"].layout if "layout" in options else "chat",
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "quantization": args.quantize,
        "device": str(lm.model.device),
        "sampling": dataclasses.asdict(options["sampling"]),
        "versions": {"minimas": __version__, "torch": torch.__version__},
    }


def warm_up(method: Callable[..., Any], lm: LM, options: dict[str, Any], rows: int) -> None:
    """Let a method compile its steps on short questions, so that no answer is billed for it."""
    short = options | {"sampling": Sampling(max_new_tokens=2)}
    if "latent_steps" in short:
        short["latent_steps"] = 1
    method(lm, ["How" + " many" * row for row in range(rows)], **short)  # of unequal length


def read_question(text: str) -> str:
    """Return the question of the command line, or of standard input if it is "-"."""
    question = sys.stdin.read() if text == "-" else text
    if not is_text(question):  # in a C locale, bytes of UTF-8 come as halves of characters
        question = os.fsencode(question).decode(errors="surrogateescape")
    if not question.strip() or not is_text(question):
        raise ParameterError("question", f"found {question!a:.80}, expected UTF-8 text, not empty")
    return question


def run_check(args: argparse.Namespace) -> None:
    """Measure the hand-over with the built-in questions, and print a table and a verdict."""
    lm, screen = load(args.model, args.device, args.dtype, args.quantize), Screen(args, [{}])
    if args.model == TINY:
        screen.tell(f"minimas: {prompts.TINY_HINT}; a check asks other ones")
    screen.start(len(QUESTIONS))
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
    for label, text in describe(args.model).items():
        print(f"{label + ':':<14} {text}")
