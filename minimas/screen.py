"""What the command line prints: answers and JSON on stdout, progress and bills on stderr.

Does not know: arguments beyond --json and --quiet, how an answer comes about.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from .results import AgentEnd, AgentStart, AgentTrace, Event, Piece, Result, Thought, Usage
from .rows import Row


def print_json(value: dict[str, Any]) -> None:
    """Print one line of JSON. Where stdout is not UTF-8, it is ASCII with escapes."""
    escaped = str(sys.stdout.encoding).lower() != "utf-8"
    print(json.dumps(value, ensure_ascii=escaped), flush=True)


def print_bill(name: str, usages: Sequence[Usage]) -> None:
    """Print what an agent, or all of them, needed."""
    bill = Usage.total(usages)
    tokens = f"{bill.prompt_tokens:,} prompt tokens, {bill.latent_steps:,} latent steps, "
    spent = f"{bill.output_tokens:,} generated, {bill.seconds:.2f} s, "
    memory = f"KV cache {bill.memory_bytes / 1e6:,.2f} MB"
    print(f"{name:>14}: {tokens}{spent}{memory}", file=sys.stderr, flush=True)


class Screen:
    """Shows one batch: the answer on stdout as it is generated, progress and bills on stderr."""

    def __init__(
        self, args: argparse.Namespace, batch: list[Row], settings: dict[str, Any]
    ) -> None:
        self.args, self.batch, self.settings = args, batch, settings
        self.streams = len(batch) == 1 and not args.json
        self.texts = [""] * len(batch)
        self.bar = tqdm(disable=True)

    def __call__(self, event: Event) -> None:
        """Show one event of the methods."""
        if isinstance(event, AgentStart):
            title = f"{event.agent}: {event.prompt_tokens} prompt tokens"
            hidden = self.args.quiet or None  # None: hidden unless stderr is a terminal
            steps = event.latent_steps
            self.bar = tqdm(total=steps, desc=title, leave=False, file=sys.stderr, disable=hidden)
        elif isinstance(event, Piece):
            if event.final:
                self._add(event)
        elif isinstance(event, AgentEnd):
            self.bar.close()
            if self.streams and self.texts[0]:
                print(flush=True)  # the answer is complete
            if not self.args.quiet:
                for first in range(0, len(event.traces), len(self.batch)):
                    traces = event.traces[first : first + len(self.batch)]
                    print_bill(traces[0].name, traces)
        elif isinstance(event, Thought):
            self.bar.update()

    def _add(self, piece: Piece) -> None:
        self.bar.close()
        self.texts[piece.question] += piece.text
        if self.streams:
            print(piece.text, end="", flush=True)

    def show(self, results: Sequence[Result | None]) -> None:
        """Print what is not on stdout yet. None is a question that was interrupted."""
        self.bar.close()
        for row, text, result in zip(self.batch, self.texts, results, strict=True):
            if result is None and text:
                result = Result(row["question"], text, None, "interrupted", [AgentTrace()])
            if result is None:
                continue
            if self.args.json:
                done = dataclasses.asdict(result) | {"usage": dataclasses.asdict(result.usage)}
                print_json({"id": row.get("id"), **self.settings, **done})
            elif not self.streams:
                print(text, flush=True)
            if result.finish_reason == "length" and not self.args.quiet:
                limit = result.agents[-1].output_tokens
                print(f"{'':>14}  cut off at --max-new-tokens {limit}", file=sys.stderr)
