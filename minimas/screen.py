"""What the command line prints: answers and JSON on stdout, progress and bills on stderr.

Does not know: arguments beyond --json and --quiet, how an answer comes about.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from shutil import get_terminal_size
from typing import Any

from tqdm import tqdm
from tqdm.utils import disp_trim

from .lens import Lens, ThoughtView
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

    The batch begins with row number `first`, from 0, of the `total` of a file. With a `lens`,
    thoughts are shown too.
    """

    def __init__(
        self,
        args: Namespace,
        batch: list[Row],
        first: int = 0,
        total: int = 1,
        lens: Lens | None = None,
    ) -> None:
        self.args, self.batch, self.lens = args, batch, lens
        places = range(len(batch))
        self.labels = [f"[{first + i + 1}/{total}] " if total > 1 else "" for i in places]
        self.label = "to ".join(dict.fromkeys([self.labels[0], self.labels[-1]]))
        self.streams = len(batch) == 1 and not args.json
        self.gap = "\n" if first else ""  # between two answers
        self.texts, self.steps = [""] * len(batch), 0
        self.bar = tqdm(disable=True)

    def __call__(self, event: Event) -> None:
        """Show one event of a method."""
        if self.lens:
            self.lens(event)
        if isinstance(event, AgentStart):
            steps = event.latent_steps
            self.steps = max(self.steps, steps)
            self.bar = tqdm(
                desc=f"{self.label}{event.agent}: {event.prompt_tokens} prompt tokens",
                total=steps or None,
                unit=" steps" if steps else " tokens",
                leave=False,
                disable=self.args.quiet or None,  # None: hidden unless stderr is a terminal
            )
        elif isinstance(event, AgentEnd):
            self.bar.close()
            if self.streams and self.texts[0]:
                print(flush=True)  # the answer is complete
            for start in range(0, len(event.traces), len(self.batch)):
                traces = event.traces[start : start + len(self.batch)]
                say(self.args, bill(self.label + traces[0].name, traces))
                if self.lens:
                    self._show_thoughts(self.lens.seen[start - len(event.traces) :])
        else:
            self.bar.update()
            if isinstance(event, Piece) and event.final:
                self.texts[event.question] += event.text
                if self.streams and event.text:
                    self.bar.close()
                    print(self.gap + event.text, end="", flush=True)
                    self.gap = ""

    def _show_thoughts(self, seen: list[tuple[AgentTrace, list[ThoughtView]]]) -> None:
        width = len(self.labels[-1])
        for label, (_, thoughts) in zip(self.labels, seen, strict=False):
            for number, thought in enumerate(thoughts, start=1):
                line = f"  {label:>{width}}{number:>3}  entropy {thought.entropy:5.2f}"
                for text, chance in thought.tokens:
                    line += f" {chance:4.0%} {text!r:<12.12}"
                say(self.args, disp_trim(line, get_terminal_size().columns))

    def show(self, results: Sequence[Result], settings: dict[str, Any]) -> None:
        """Print what is not on stdout yet; of a batch without results, the text so far."""
        self.bar.close()
        if not results and any(self.texts):
            results = [Result("", text, None, "interrupted", [AgentTrace()]) for text in self.texts]
        for i, result in enumerate(results):
            row, label = self.batch[i], self.labels[i]
            if self.args.json:
                record = {"id": row.get("id")} | asdict(replace(result, memory=None)) | settings
                record |= {"latent_steps": self.steps, "usage": asdict(result.usage)}
                record["question"] = row["question"]
                if self.lens:
                    own = self.lens.seen[i :: len(self.batch)]
                    record["thoughts"] = [
                        [one._asdict() for one in thoughts] for _, thoughts in own
                    ]
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
