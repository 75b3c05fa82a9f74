"""Compare `latent_mas`, `text_mas` and `single` on the same questions of a real model.

All methods use the same model, questions and limit of tokens, and decode greedily. `latent_mas`
runs once more as tools/evaluate.py runs it, with marks of every KV cache, grades, records and a
synced file, to measure what that costs. The methods take turns on every batch of questions, and
the first one changes from batch to batch, so a machine that slows down affects all alike.
tools/benchmark.py runs this module, which does not depend on formats, kernels or other libraries.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from minimas import LM, Result, Sampling, latent_mas, load, single, text_mas
from tools.evaluation.arms import Arm
from tools.evaluation.bench import Bench
from tools.evaluation.feeders import Feeders
from tools.evaluation.grading import plain_grader
from tools.evaluation.ledger import Ledger
from tools.evaluation.rows import kind_of, read_rows
from tools.shared.streams import print_progress

METHODS: dict[str, Callable[..., list[Result]]] = {
    "single": single,
    "text_mas": text_mas,
    "latent_mas": latent_mas,
}
HARNESS = "evaluate.py"  # latent_mas with all that tools/evaluate.py does
NAMES = (*METHODS, HARNESS)
Rows = list[dict[str, Any]]
Columns = dict[str, list[Any]]  # one value per question


class Asker:
    """Asks a model questions with any of the methods, and records what that costs."""

    def __init__(self, lm: LM, args: argparse.Namespace) -> None:
        self.lm = lm
        self.sampling = Sampling(temperature=0.0, max_new_tokens=args.max_new_tokens)
        steps = lm.default_steps if args.latent_steps is None else args.latent_steps
        self.thinking = {"latent_steps": steps, "align": args.align}
        self.feeders = Feeders(lm)

    def ask(self, name: str, rows: Rows) -> Columns:
        """Ask one batch of questions. Returns seconds, counts of tokens, and grades."""
        started = time.perf_counter()
        found = self._harness(rows) if name == HARNESS else self._method(name, rows)
        seconds = (time.perf_counter() - started) / len(rows)
        return {"seconds": [seconds] * len(rows)} | found

    def _harness(self, rows: Rows) -> Columns:
        bench = Bench(self.lm, rows, len(rows), self.sampling, plain_grader, self.feeders)
        records = bench.compute(0, Arm(HARNESS, **self.thinking), 0)
        with tempfile.TemporaryDirectory() as folder:
            ledger = Ledger(Path(folder) / "results.jsonl", {})
            ledger.append(records)
            ledger.close()
        found = {key: [record[key] for record in records] for key in ("read", "thought", "written")}
        found["right"] = [bool(record["correct"]) for record in records]
        found["cut"] = [record["finish_reason"] == "length" for record in records]
        return found

    def _method(self, name: str, rows: Rows) -> Columns:
        options: dict[str, Any] = {
            "kind": kind_of(rows[0]),
            "choices": [row.get("choices") for row in rows],
            "sampling": self.sampling,
        }
        if name == "latent_mas":
            options |= self.thinking | {"align": self.feeders(self.thinking["align"])}
        results = METHODS[name](self.lm, [row["question"] for row in rows], **options)
        pairs = zip(rows, results, strict=True)
        return {
            "read": [result.usage.prompt_tokens for result in results],
            "thought": [result.usage.latent_steps for result in results],
            "written": [result.usage.output_tokens for result in results],
            "right": [bool(plain_grader(row, result.text)) for row, result in pairs],
            "cut": [result.finish_reason == "length" for result in results],
        }


def report(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Return the tables of --end-to-end, one per batch size, and every sample.

    Raises ValueError if the questions are of several kinds, or of the kind code.
    """
    lm = load(args.end_to_end, device="cpu", quantize=args.quantize, compile=args.compile)
    rows = read_rows(args.questions)[: args.limit]
    kinds = {kind_of(row) for row in rows}
    if "code" in kinds or len(kinds) > 1:
        found = ", ".join(sorted(kinds))
        raise ValueError(
            f"{args.questions}: kind: found {found}, expected one kind other than code"
        )
    asker = Asker(lm, args)
    weights = (args.quantize or "as stored") + (", compiled" if args.compile else "")
    lines = [
        f"Weights: {weights}; {len(rows)} questions, greedy, at most {args.max_new_tokens} tokens "
        f"per agent, {asker.thinking['latent_steps']} latent steps ({args.align})."
    ]
    samples: dict[str, Any] = {}
    for batch in args.batch_sizes:
        found_by_method = take_turns(asker, rows, batch)
        samples[f"batch {batch}"] = found_by_method
        lines += table(batch, found_by_method)
    return lines, samples


def take_turns(asker: Asker, rows: Rows, batch: int) -> dict[str, Columns]:
    """Ask all questions with all methods, batch by batch. Returns the columns of each method."""
    parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    started = time.perf_counter()
    for name in NAMES:  # the first calls pack weights and compile
        asker.ask(name, parts[0])
    print_progress(f"batch {batch}: the warm-up took {time.perf_counter() - started:.1f} s")
    found: dict[str, Columns] = {name: {} for name in NAMES}
    for turn, part in enumerate(parts):
        for place in range(len(NAMES)):
            name = NAMES[(turn + place) % len(NAMES)]
            for key, values in asker.ask(name, part).items():
                found[name].setdefault(key, []).extend(values)
        done = min((turn + 1) * batch, len(rows))
        print_progress(f"batch {batch}: {done} of {len(rows)} questions")
    return found


def table(batch: int, found: dict[str, Columns]) -> list[str]:
    """Return a Markdown table, one line per method.

    The last columns compare `latent_mas` with the method.
    """
    lines = [
        "",
        "| batch | | s per question | median | prompt tokens | latent steps | generated tokens "
        "| right | cut off | speed-up by latent_mas, totals (medians) | fewer generated tokens |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    latent = found["latent_mas"]
    for name, columns in found.items():
        seconds, count = columns["seconds"], len(columns["seconds"])
        cells = [str(batch), name, f"{sum(seconds) / count:.2f}", f"{median(seconds):.2f}"]
        cells += [f"{sum(columns[key]) / count:.0f}" for key in ("read", "thought", "written")]
        right = columns["right"]
        cells += [f"{sum(right)} of {len(right)}" if right else "", str(sum(columns["cut"]))]
        if name == "latent_mas":
            cells += ["", ""]
        else:
            total = sum(seconds) / sum(latent["seconds"])
            medians = median(seconds) / median(latent["seconds"])
            fewer = 1 - sum(latent["written"]) / max(1, sum(columns["written"]))
            cells += [f"{total:.2f} × ({medians:.2f} ×)", f"{fewer:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
