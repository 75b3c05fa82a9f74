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
from .streams import say
from .turns import with_opened_think


def print_json(value: dict[str, Any]) -> None:
    """Print one line of JSON. Where stdout is not UTF-8, it is ASCII with escapes."""
    escaped = str(sys.stdout.encoding).lower() != "utf-8"
    print(json.dumps(value, ensure_ascii=escaped), flush=True)


def bill(name: str, usages: Sequence[Usage]) -> str:
    """Return what an agent, or all of them, needed, in one line."""
    total = Usage.total(usages)
    tokens = f"{total.prompt_tokens:,} prompt tokens, {total.latent_steps:,} latent steps, "
    spent = f"{total.output_tokens:,} generated, {total.seconds:.2f} s, "
    return f"{name:>14}: {tokens}{spent}KV cache {total.memory_bytes / 1e6:,.2f} MB"


class Screen(Watcher):
    """Shows `rows` in batches: answers on stdout as they are generated, progress on stderr."""

    def __init__(self, args: argparse.Namespace, rows: Sequence[Row]) -> None:
        self.args, self.rows, self.batch = args, rows, range(0)
        self.gap = ""  # a blank line between two answers
        self.bar = tqdm(disable=True)

    def start(self, size: int) -> None:
        """Begin the batch of the next `size` rows."""
        self.batch = range(self.batch.stop, self.batch.stop + size)
        self.texts, self.steps = [""] * size, 0
        self.streams = size == 1 and not self.args.json

    def label(self, rows: range) -> str:
        """Return which rows of a file these are, such as "[3-4/12] "; "" for a single question."""
        if len(self.rows) == 1:
            return ""
        last = f"-{rows.stop}" if len(rows) > 1 else ""
        return f"[{rows.start + 1}{last}/{len(self.rows)}] "

    def tell(self, text: str) -> None:
        """Print a line on stderr, unless --quiet."""
        if not self.args.quiet:
            say(text)

    def begin(self, agent: str, reads: int, thinks: int) -> None:
        self.steps = max(self.steps, thinks)
        self.bar = tqdm(
            desc=f"{self.label(self.batch)}{agent}: {reads} prompt tokens",
            total=thinks or None,
            unit=" steps",
            leave=False,
            file=sys.stderr,
            disable=self.args.quiet or None,  # None: hidden unless stderr is a terminal
        )

    def thought(self) -> None:
        self.bar.update()

    def generated(self) -> None:
        self.bar.unit = " tokens"
        self.bar.update()

    def text(self, question: int, piece: str) -> None:
        self.texts[question] += piece
        if self.streams:
            self.bar.close()
            print(self.gap + piece, end="", flush=True)
            self.gap = ""

    def end(self, traces: Sequence[AgentTrace]) -> None:
        self.bar.close()
        if self.streams and self.texts[0]:
            print(flush=True)  # the answer is complete
        self.tell(bill(self.label(self.batch) + traces[0].name, traces))

    def show(self, results: Sequence[Result | None], settings: dict[str, Any]) -> None:
        """Print what is not on stdout yet. None is a question that was interrupted."""
        self.bar.close()
        for row, text, result in zip(self.batch, self.texts, results, strict=True):
            if result is None and text:
                question = self.rows[row]["question"]
                result = Result(question, text, None, "interrupted", [AgentTrace()])
            if result is None:
                continue
            if self.args.json:
                used = {"id": self.rows[row].get("id"), **settings, "latent_steps": self.steps}
                usage = dataclasses.asdict(result.usage)
                print_json(used | dataclasses.asdict(result) | {"usage": usage})
            elif not self.streams or not text:
                print(self.gap + text, flush=True)
            self.gap = "\n"
            if result.finish_reason == "length":
                last = result.agents[-1]
                limit = f"cut off at --max-new-tokens {last.output_tokens}"
                said = with_opened_think(last.prompt, text)
                if "<think>" in said and "</think>" not in said:
                    limit += ", still thinking: pass more, such as 4096, or --no-think"
                self.tell(f"{'':>14}  {self.label(range(row, row + 1))}{limit}")
