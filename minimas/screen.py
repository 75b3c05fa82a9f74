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

from .results import AgentTrace, Result, Usage, Watcher
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


class Screen(Watcher):
    """Shows one batch: the answer on stdout as it is generated, progress and bills on stderr."""

    def __init__(
        self, args: argparse.Namespace, batch: list[Row], settings: dict[str, Any]
    ) -> None:
        self.args, self.batch, self.settings = args, batch, settings
        self.streams = len(batch) == 1 and not args.json
        self.texts = [""] * len(batch)
        self.bar = tqdm(disable=True)

    def begin(self, agent: str, reads: int, thinks: int) -> None:
        title = f"{agent}: {reads} prompt tokens"
        hidden = self.args.quiet or None  # None: hidden unless stderr is a terminal
        self.bar = tqdm(total=thinks, desc=title, leave=False, file=sys.stderr, disable=hidden)

    def thought(self) -> None:
        self.bar.update()

    def text(self, question: int, piece: str) -> None:
        self.bar.close()
        self.texts[question] += piece
        if self.streams:
            print(piece, end="", flush=True)

    def end(self, traces: Sequence[AgentTrace]) -> None:
        self.bar.close()
        if self.streams and self.texts[0]:
            print(flush=True)  # the answer is complete
        if not self.args.quiet:
            print_bill(traces[0].name, traces)

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
