"""What the command line prints: answers and JSON on stdout, progress and bills on stderr.

Does not know: arguments beyond --json and --quiet, how an answer comes about.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from .results import AgentEnd, AgentStart, AgentTrace, Event, Piece, Result, Usage
from .rows import Row
from .streams import silence


def say(args: Namespace, text: str) -> None:
    """Print a line on stderr, unless --quiet. A failure must not cost the answer on stdout."""
    try:
        if not args.quiet:
            tqdm.write(text, file=sys.stderr)
    except OSError:
        silence(sys.stderr)


def bill(name: str, usages: Sequence[Usage]) -> str:
    """Return what an agent, or all of them, needed, in one line."""
    total = Usage.total(usages)
    return (
        f"{name:>14}: {total.prompt_tokens:,} prompt tokens, {total.latent_steps:,} latent steps, "
        f"{total.output_tokens:,} generated, {total.seconds:.2f} s, "
        f"KV cache {total.memory_bytes / 1e6:,.2f} MB"
    )


class Screen:
    """Shows one batch: the answer on stdout as it is generated, progress and bills on stderr.

    The batch begins with row number `first`, from 0, of the `total` of a file.
    """

    def __init__(self, args: Namespace, batch: list[Row], first: int = 0, total: int = 1) -> None:
        self.args, self.batch = args, batch
        numbers = range(first + 1, first + 1 + len(batch))
        self.labels = [f"[{number}/{total}] " if total > 1 else "" for number in numbers]
        self.label = "to ".join(dict.fromkeys([self.labels[0], self.labels[-1]]))
        self.streams = len(batch) == 1 and not args.json
        self.gap = "\n" if first else ""  # between two answers
        self.texts, self.steps = [""] * len(batch), 0
        self.bar = tqdm(disable=True)

    def __call__(self, event: Event) -> None:
        """Show one event of a method."""
        if isinstance(event, AgentStart):
            steps = event.latent_steps
            self.steps = max(self.steps, steps)
            title = f"{self.label}{event.agent}: {event.prompt_tokens} prompt tokens"
            unit = " steps" if steps else " tokens"
            hidden = self.args.quiet or None  # None: hidden unless stderr is a terminal
            self.bar = tqdm(desc=title, total=steps or None, unit=unit, leave=False, disable=hidden)
        elif isinstance(event, AgentEnd):
            self.bar.close()
            if self.streams and self.texts[0]:
                print(flush=True)  # the answer is complete
            for start in range(0, len(event.traces), len(self.batch)):
                traces = event.traces[start : start + len(self.batch)]
                say(self.args, bill(self.label + traces[0].name, traces))
        else:
            self.bar.update()
            if isinstance(event, Piece) and event.final:
                self._add(event)

    def _add(self, piece: Piece) -> None:
        self.texts[piece.question] += piece.text
        if self.streams and piece.text:
            self.bar.close()
            print(self.gap + piece.text, end="", flush=True)
            self.gap = ""

    def show(self, results: Sequence[Result], settings: dict[str, Any]) -> None:
        """Print what is not on stdout yet; of a batch without results, the text so far."""
        self.bar.close()
        if not results and any(self.texts):
            results = [Result("", text, None, "interrupted", [AgentTrace()]) for text in self.texts]
        for row, label, result in zip(self.batch, self.labels, results, strict=False):
            if self.args.json:
                record = {"id": row.get("id"), **settings, "latent_steps": self.steps}
                record |= asdict(result)
                record |= {"question": row["question"], "usage": asdict(result.usage)}
                print(json.dumps(record, default=str), flush=True)
            elif not self.streams or not result.text:
                print(self.gap + result.text, flush=True)
            self.gap = "\n"
            if result.finish_reason == "length":
                last = result.agents[-1]
                limit = f"cut off at --max-new-tokens {last.output_tokens}"
                said = last.prompt + last.text
                if said.rfind("<think>") > said.rfind("</think>"):
                    limit += ", still thinking: pass more, such as 4096, or --no-think"
                say(self.args, f"{'':>14}  {label}{limit}")
