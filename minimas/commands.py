"""The commands: answer questions, chat, prefill a text, check a hand-over, describe a model.

This module only connects arguments with functions.
"""

import json
import logging
import os
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from time import perf_counter

import torch

from . import __version__, agents
from .chat import chat
from .check import QUESTIONS, check
from .core.cache import KVCache
from .core.errors import ParameterError
from .info import describe
from .load import LM, load, text_tokenizer
from .memory import remember
from .rows import batches, read_input, read_rows
from .screen import ERRORS, Screen, Settings, report_error, say, show_answers, usage_line
from .streams import silence
from .teams import Team
from .text.generate import Sampling
from .text.tokenizer import is_text

# Flags of methods. A method takes a flag if it has a parameter of the same name.
METHOD_FLAGS = ("team", "latent_steps", "align", "transfer", "layout", "seed", "models")


def run(args: Namespace) -> int:
    """Run one of the COMMANDS. Returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    if args.parallel and os.environ.get("RANK", "0") != "0":
        args.quiet = True  # rank 0 alone prints
        silence(sys.stdout)
    logging.basicConfig(
        format="minimas: %(message)s", level=logging.ERROR if args.quiet else logging.WARNING
    )
    try:
        COMMANDS[args.command](args)
        sys.stdout.flush()
        if args.parallel:
            torch.distributed.destroy_process_group()
    except BrokenPipeError as error:  # the reader of stdout, such as `head`, has enough
        silence(sys.stdout)
        if isinstance(error.__context__, KeyboardInterrupt):  # Ctrl-C has ended the reader too
            raise KeyboardInterrupt from None
        if args.save_memory:
            return report_error(OSError("stdout was closed: --save-memory wrote no file"), args)
    except ERRORS as error:
        return report_error(error, args)
    return 0


def run_ask(args: Namespace) -> None:
    """Answer one question or a file of them. Most arguments are checked before the model loads."""
    rows = (
        [{"question": read_question(args.question)}]
        if args.file is None
        else read_rows(Path(args.file))
    )
    saves = args.save_memory is not None
    if saves and (args.parallel or len(rows) > 1):
        raise ParameterError(
            "save_memory",
            f"found {len(rows)} questions{' with --parallel' if args.parallel else ''}, "
            "expected one question without --parallel",
        )
    shuffled = args.transfer == "shuffled"
    groups = batches(rows, args.kind, len(rows) if shuffled else args.batch_size)
    if shuffled and min(len(batch) for _, batch in groups) < 2:
        raise ParameterError(
            "transfer", "found 'shuffled' with one question, expected several of one kind (--file)"
        )
    lm, options, settings = prepare(args)
    options["keep_memory"] = saves
    if args.compile:
        say(args, "minimas: compiling, up to a minute")
        began = perf_counter()
        fake = ["How" + " many" * n for n in range(len(groups[0][1]))]
        getattr(agents, args.method)(lm, fake, **options | {"sampling": Sampling(max_new_tokens=2)})
        say(args, f"{'compile':>14}: {perf_counter() - began:.2f} s")
    results = show_answers(args, lm, options, settings, groups)
    if results[0].memory is not None:
        results[0].memory.save(args.save_memory)
    say(args, usage_line("total", [result.usage for result in results]))
    say(args, f"{'wall time':>14}: {perf_counter() - args.began:.2f} s")


def prepare(args: Namespace) -> tuple[LM, Settings, Settings]:
    """Check the arguments, then load the model.

    Returns the model, the options of the method, and the settings for an answer's JSON record.
    """
    options = method_options(args)
    changed = {
        name: value
        for name, value in vars(args).items()
        if hasattr(Sampling, name) and value is not None
    }
    Sampling(**changed)  # raises for a wrong value
    if args.temperature == 0:
        changed["repetition_penalty"] = 1.0  # with a penalty, decoding would not be greedy
    team = options.get("team", "")
    if team.endswith(".json"):
        team = Team.from_json(team).with_layout(args.layout)
    pairs = [text.partition("=") for text in options.get("models") or ()]
    if not all(map(all, pairs)):  # each is (NAME, "=", FOLDER)
        raise ParameterError("models", f"found {args.models}, expected NAME=FOLDER")
    lm = load_model(args)
    tokenizer = text_tokenizer(lm)
    if args.think is not None:
        tokenizer.set_thinking(args.think)
    sampling = replace(lm.sampling, **changed)
    settings = {
        "model": args.model,
        "method": args.method,
        "layout": "chat",
        **options,
        "sampling": asdict(sampling),
        "memory": args.memory,
        "quantization": args.quantize or ("as in the file" if lm.folder.is_file() else None),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "device": lm.model.device,
        "versions": {"minimas": __version__, "torch": torch.__version__},
    }
    options["sampling"] = sampling
    if "team" in options:
        options["team"] = agents.choose_team(lm, team).with_layout(args.layout)
    if "layout" in options:
        settings["layout"] = options["team"].layout
        lm.aligner(options["align"])  # raises for a wrong kind or file
    if pairs:
        options["models"] = {name: load_model(args, path) for name, _, path in pairs}
    if args.memory:
        options["memory"] = KVCache.concat([KVCache.load(file, lm.model) for file in args.memory])
    return lm, options, settings


def load_model(args: Namespace, name: str | None = None) -> LM:
    """Load the model of the command line, or the model `name` with the same settings."""
    return load(
        name or args.model,
        args.device,
        args.dtype,
        args.quantize,
        args.compile,
        args.quiet,
        args.parallel,
    )


def method_options(args: Namespace) -> Settings:
    """Return the method's options. Raises ValueError for another method's flags."""
    options: Settings = {}
    parameters = signature(getattr(agents, args.method)).parameters
    for name in METHOD_FLAGS:
        given = getattr(args, name, None)  # `chat` does not have all flags
        if name in parameters:
            options[name] = parameters[name].default if given is None else given
        elif given is not None:
            raise ParameterError(
                name, f"found with --method {args.method}, expected a method that uses it"
            )
    return options


def read_question(text: str) -> str:
    """Return the question of the command line, or of standard input if it is "-"."""
    question = sys.stdin.read() if text == "-" else text
    if not is_text(question):  # in a C locale, UTF-8 bytes arrive as surrogates
        question = os.fsencode(question).decode(errors="surrogateescape")
    if not is_text(question):
        raise ParameterError("question", f"found {question!a:.80}, expected UTF-8 text, not empty")
    return question


def run_remember(args: Namespace) -> None:
    """Prefill a text, and write its KV cache to a file."""
    source = Path(args.text)
    target = Path(args.out).resolve()
    if target == source.resolve() or not target.parent.is_dir():
        raise ParameterError(
            "out",
            f"found {args.out!r}, expected a file other than the text, in a folder that exists",
        )
    text = read_input(source)
    memory = remember(load_model(args), text, args.latent_steps, args.align, args.role)
    memory.save(args.out, args.bits)
    say(
        args,
        f"{args.out}: {memory.lengths[0]:,} slots, {target.stat().st_size / 1e6:,.2f} MB",
    )


def run_check(args: Namespace) -> None:
    """Measure the hand-over with the built-in questions, and print a table and a verdict."""
    lm = load_model(args)
    report = check(lm, args.layout, args.latent_steps, Screen(args, [{}] * len(QUESTIONS)))
    for name in ("quantize", "dtype", "device"):  # the verdict is about the model as it was loaded
        given = getattr(args, name)
        if given not in (None, "auto"):
            report.command = report.command.replace("QUESTION", f"--{name} {given} QUESTION")
    print(json.dumps(asdict(report)) if args.json else "\n".join(report.lines()))


def run_info(args: Namespace) -> None:
    """Print a description of a model, one fact per line."""
    lines = describe(args.model, args.batch_size, args.context, args.max_new_tokens)
    for label, text in lines.items():
        print(f"{label + ':':<14} {text}")


COMMANDS = {
    "ask": run_ask,
    "chat": lambda args: chat(args, *prepare(args)),
    "remember": run_remember,
    "check": run_check,
    "info": run_info,
}
