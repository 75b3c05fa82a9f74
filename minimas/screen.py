"""What the command line prints: answers and JSON on stdout; progress, usage, errors on stderr.

This file does not depend on how arguments are parsed or how answers are made.
"""

import json
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from shutil import get_terminal_size
from typing import Any

import torch
from tqdm import tqdm
from tqdm.utils import disp_trim

from . import agents, prompts
from .core.errors import ContextError, ParameterError
from .lens import Lens, ThoughtView
from .load import LM, TINY
from .results import AgentEnd, AgentStart, AgentTrace, Event, Piece, Result, Usage
from .rows import Row
from .streams import silence
from .turns import with_opened_think

# The exceptions that are reported in one line. Any other exception is a bug in minimas.
ERRORS = (OSError, ValueError, ImportError, MemoryError, RuntimeError)
Settings = dict[str, Any]  # the parameters of a call, name -> value
POSITIONAL = {"question": "QUESTION", "text": "FILE"}
OUT_OF_MEMORY = "out of memory: try a smaller --batch-size, --quantize q4, fewer --latent-steps; "


def say(args: Namespace, text: str) -> None:
    """Print a line on stderr, unless --quiet. A failure must not cost the answer on stdout."""
    try:
        if not args.quiet:
            tqdm.write(text, file=sys.stderr)
    except OSError:
        silence(sys.stderr)


def report_error(error: Exception, args: Namespace) -> int:
    """Print an error in one line, and return the exit status.

    With --debug, raises the error again.
    """
    if args.debug:
        raise error
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
    text = " ".join(str(error).split()) or type(error).__name__
    status = 1
    if isinstance(error, ParameterError) and error.parameter in args:
        flag = f"--{error.parameter.replace('_', '-')}"
        text = f"{POSITIONAL.get(error.parameter, flag)}: {error.problem}"
        status = 2
    # On a CPU, torch raises a plain RuntimeError.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        text = OUT_OF_MEMORY + text
    print(f"minimas: error: {text}", file=sys.stderr)
    return status


def usage_line(name: str, usages: Sequence[Usage]) -> str:
    """Return one line with the total usage of an agent or of all agents."""
    total = Usage.total(usages)
    return (
        f"{name:>14}: {total.prompt_tokens:,} prompt tokens, {total.latent_steps:,} latent steps, "
        f"{total.output_tokens:,} generated, {total.seconds:.2f} s, "
        f"KV cache {total.memory_bytes / 1e6:,.2f} MB"
    )


@dataclass
class Screen:
    """Show one batch: the answer on stdout as it is generated, progress and usage on stderr.

    The batch begins with row number `first`, from 0, of the `total` rows of a file. With a `lens`,
    thoughts are shown too.
    """

    args: Namespace
    batch: list[Row]
    first: int = 0
    total: int = 1
    lens: Lens | None = None

    def __post_init__(self) -> None:
        self.labels = [
            f"[{self.first + i + 1}/{self.total}] " if self.total > 1 else ""
            for i in range(len(self.batch))
        ]
        self.label = "to ".join(dict.fromkeys([self.labels[0], self.labels[-1]]))
        self.streams = len(self.batch) == 1 and not self.args.json
        self.gap = "\n" if self.first else ""  # between two answers
        self.texts = [""] * len(self.batch)
        self.bar = tqdm(disable=True)

    def __call__(self, event: Event) -> None:
        """Show one event of a method."""
        if self.lens:
            self.lens(event)
        match event:
            case AgentStart(agent, tokens, steps):
                self.bar = tqdm(
                    desc=f"{self.label}{agent}: {tokens} prompt tokens",
                    total=steps or None,
                    unit=" steps" if steps else " tokens",
                    leave=False,
                    disable=self.args.quiet or None,  # None: hidden unless stderr is a terminal
                )
            case AgentEnd(_, all_traces):
                self.bar.close()
                if self.streams and self.texts[0]:
                    print(flush=True)  # the answer is complete
                for start in range(0, len(all_traces), len(self.batch)):
                    traces = all_traces[start : start + len(self.batch)]
                    say(self.args, usage_line(self.label + traces[0].name, traces))
                    if self.lens:
                        self._show_thoughts(self.lens.seen[start - len(all_traces) :])
            case Piece(question, text, final=True):
                self.bar.update()
                self.texts[question] += text
                if self.streams and text:
                    self.bar.close()
                    print(self.gap + text, end="", flush=True)
                    self.gap = ""
            case _:
                self.bar.update()

    def _show_thoughts(self, seen: list[tuple[AgentTrace, list[ThoughtView]]]) -> None:
        for label, (_, thoughts) in zip(self.labels, seen, strict=False):
            for number, thought in enumerate(thoughts, start=1):
                line = (
                    f"  {label:>{len(self.labels[-1])}}{number:>3}  entropy {thought.entropy:5.2f}"
                )
                for text, chance in thought.tokens:
                    line += f" {chance:4.0%} {text!r:<12.12}"
                say(self.args, disp_trim(line, get_terminal_size().columns))

    def show(self, results: Sequence[Result], settings: Settings) -> None:
        """Print all results that are not on stdout yet, or the text so far if there are none."""
        self.bar.close()
        if not results and any(self.texts):
            if self.streams:
                print(flush=True)  # ends the line
            results = [Result("", text, None, "interrupted", [AgentTrace()]) for text in self.texts]
        for i, result in enumerate(results):
            if self.args.json:
                record = {
                    "id": self.batch[i].get("id"),
                    **asdict(replace(result, memory=None)),
                    **settings,
                    "latent_steps": max(agent.latent_steps for agent in result.agents),
                    "usage": asdict(result.usage),
                    "question": self.batch[i]["question"],
                }
                if self.lens:
                    record["thoughts"] = [
                        [view._asdict() for view in thoughts]
                        for _, thoughts in self.lens.seen[i :: len(self.batch)]
                    ]
                print(json.dumps(record, default=str), flush=True)
            elif not self.streams or not result.text:
                print(self.gap + result.text, flush=True)
            self.gap = "\n"
            if result.finish_reason == "length":
                last = result.agents[-1]
                limit = f"cut off at --max-new-tokens {last.output_tokens}"
                said = with_opened_think(last.prompt, last.text)
                if said.rfind("<think>") > said.rfind("</think>"):
                    limit += ", still thinking: pass more, such as 4096, or --no-think"
                say(self.args, f"{'':>14}  {self.labels[i]}{limit}")


def show_answers(
    args: Namespace,
    lm: LM,
    options: Settings,
    settings: Settings,
    groups: Sequence[tuple[str, list[Row]]],
) -> list[Result]:
    """Answer the rows of each (kind, batch), print each answer, and return the results.

    `options` are parameters of the method. `settings` are part of each answer's JSON record.
    """
    questions = [row["question"] for _, batch in groups for row in batch]
    known = all(re.fullmatch(prompts.TINY_QUESTION, question.strip()) for question in questions)
    if args.model == TINY and not known:
        say(args, f"minimas: {prompts.TINY_HINT}")
    results: list[Result] = []
    for kind, batch in groups:
        lens = Lens(lm, args.show_thoughts) if args.show_thoughts else None
        screen = Screen(args, batch, len(results), len(questions), lens)
        own: list[Result] = []
        try:
            own = getattr(agents, args.method)(
                lm,
                [row["question"] for row in batch],
                choices=[row.get("choices") for row in batch],
                kind=kind,
                on_event=screen,
                **options,
            )
        except ContextError as error:
            raise ContextError(f"{screen.label}{error}") from error
        finally:
            screen.show(own, settings | {"kind": kind})  # if interrupted, the text so far
        results += own
    return results
