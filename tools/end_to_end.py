"""`latent_mas` against `text_mas` and `single` on a real model, question by question; run by tools/benchmark.py.

One engine, the same questions and limit of tokens, greedy; and `latent_mas` once more as tools/evaluate.py runs it,
with marks of every memory, grades, records and a synced file: what that costs. The methods take turns on every batch of
questions, in an order that turns, so that a machine that slows down slows all. Does not know: formats, kernels, others'
code.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from minimas import Result, Sampling, latent_mas, load, single, text_mas
from tools.evaluation.arms import Arm
from tools.evaluation.bench import Bench
from tools.evaluation.feeders import Feeders
from tools.evaluation.grading import plain_grader
from tools.evaluation.ledger import Ledger
from tools.evaluation.rows import kind_of, read_rows

METHODS: dict[str, Callable[..., list[Result]]] = {
    "single": single,
    "text_mas": text_mas,
    "latent_mas": latent_mas,
}
HARNESS = "evaluate.py"  # latent_mas once more, with all that tools/evaluate.py does around it


def report(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The tables of --end-to-end, one for each batch size, and every sample."""
    lm = load(args.end_to_end, device="cpu", quantize=args.quantize, compile=args.compile)
    asked = read_rows(args.questions)[: args.limit]
    if "code" in (kinds := {kind_of(row) for row in asked}) or len(kinds) > 1:
        raise ValueError(
            f"{args.questions}: kind: found {', '.join(sorted(kinds))}, expected one, and no code"
        )
    sampling = Sampling(temperature=0.0, max_new_tokens=args.max_new_tokens)
    steps = lm.default_steps if args.latent_steps is None else args.latent_steps
    thinking, feeder = {"latent_steps": steps, "align": args.align}, Feeders(lm)

    def harness(part: list[dict[str, Any]]) -> list[dict[str, Any]]:
        bench = Bench(lm, part, len(part), sampling, plain_grader, feeder)
        records = bench.compute(0, Arm(HARNESS, **thinking), 0)
        with tempfile.TemporaryDirectory() as folder:
            book = Ledger(Path(folder) / "results.jsonl", {})
            book.append(records)
            book.close()
        return records

    def answer(method: str, part: list[dict[str, Any]]) -> dict[str, Any]:
        questions, started = [row["question"] for row in part], time.perf_counter()
        if method == HARNESS:
            records = harness(part)
            seconds = (time.perf_counter() - started) / len(part)
            kept = {key: [r[key] for r in records] for key in ("read", "thought", "written")}
            right, cut = (
                [bool(r["correct"]) for r in records],
                [r["finish_reason"] == "length" for r in records],
            )
            return kept | {"seconds": [seconds] * len(part), "right": right, "cut": cut}
        several = {
            "kind": kind_of(part[0]),
            "choices": [row.get("choices") for row in part],
            "sampling": sampling,
        }
        several |= thinking | {"align": feeder(args.align)} if method == "latent_mas" else {}
        results = METHODS[method](lm, questions, **several)
        seconds = (time.perf_counter() - started) / len(part)
        usages = [result.usage for result in results]
        return {
            "seconds": [seconds] * len(part), "read": [u.prompt_tokens for u in usages],
            "right": [bool(plain_grader(row, r.text)) for r, row in zip(results, part, strict=True)],
            "thought": [u.latent_steps for u in usages], "written": [u.output_tokens for u in usages],
            "cut": [r.finish_reason == "length" for r in results],
        }  # fmt: skip

    lines = [
        f"Weights: {args.quantize or 'as stored'}{', compiled' if args.compile else ''}; {len(asked)} questions, "
        f"greedy, at most {args.max_new_tokens} tokens an agent, {steps} thoughts ({args.align})."
    ]
    samples: dict[str, Any] = {}
    for batch in args.batch_sizes:
        parts = [asked[i : i + batch] for i in range(0, len(asked), batch)]
        started = time.perf_counter()
        names = [*METHODS, HARNESS]
        for method in names:  # packing and compiling
            answer(method, parts[0])
        say(f"batch {batch}: a first time, not counted, took {time.perf_counter() - started:.1f} s")
        found: dict[str, dict[str, list[Any]]] = {method: {} for method in names}
        for turn, part in enumerate(parts):
            for place in range(len(names)):
                method = names[(turn + place) % len(names)]
                for key, values in answer(method, part).items():
                    found[method].setdefault(key, []).extend(values)
            say(f"batch {batch}: {min((turn + 1) * batch, len(asked))} of {len(asked)} questions")
        samples[f"batch {batch}"] = found
        lines += table(batch, found)
    return lines, samples


def table(batch: int, found: dict[str, dict[str, list[Any]]]) -> list[str]:
    """One line a method; the last columns compare `latent_mas` with it."""
    lines = [
        "",
        "| batch | | s a question | median | read | thought | written | right | cut off | latent_mas: faster, of the "
        "totals (medians) | fewer written |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    latent = found["latent_mas"]
    for method, of in found.items():
        count = len(of["seconds"])
        each = [f"{sum(of[key]) / count:.0f}" for key in ("read", "thought", "written")]
        right = f"{sum(of['right'])} of {len(of['right'])}" if of["right"] else ""
        against = " | "
        if of is not latent:
            total = sum(of["seconds"]) / sum(latent["seconds"])
            fewer = 1 - sum(latent["written"]) / max(1, sum(of["written"]))
            against = f"{total:.2f} × ({median(of['seconds']) / median(latent['seconds']):.2f} ×) | {fewer:.0%}"
        cells = [
            f"{sum(of['seconds']) / count:.2f}",
            f"{median(of['seconds']):.2f}",
            *each,
            right,
            sum(of["cut"]),
        ]
        lines.append(f"| {batch} | {method} | {' | '.join(map(str, cells))} | {against} |")
    return lines


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
