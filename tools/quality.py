"""What four and eight bits do to a memory (--memory-error) and to a text (--perplexity); run by tools/benchmark.py.

Everything is measured against the same folder in bf16, one other model at a time. Does not know: clocks, answers.

    T tokens read   S thoughts   K key-value heads   d head size   D hidden   V vocabulary
"""

import argparse
import gc
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimas import LM, Aligner, KVCache, load, sequential, think
from minimas.core.model import CHUNK, prefill
from tools.evaluation.rows import read_rows

WAYS = {"one by one": 1, "in chunks": CHUNK}
AT = (1, 2, 5, 10, 20, 40, 80)  # thoughts at which the tables look
ALIGNMENTS = ("ridge", "prenorm")
QUESTION = (
    "A farmer sells 14 boxes of apples at $12 each and 9 boxes of pears at $15 each. He pays $48 for the stall and a "
    "quarter of the rest to his helper. How much does he keep?"
)


def models(args: argparse.Namespace, folder: Path, wider: bool = False) -> Iterator[tuple[str, LM]]:
    """(name, model) for bf16 first, then (`wider`) float32, every format, every GGUF file; what cannot run is said."""
    ways: dict[str, Any] = {"bf16": partial(load, folder, device="cpu", dtype="bfloat16")}
    if wider:
        ways["float32"] = partial(load, folder, device="cpu", dtype="float32")
    for format in args.formats:
        ways[format] = partial(load, folder, device="cpu", dtype="bfloat16", quantize=format)
    for path in args.gguf:
        ways[path.name] = partial(load, path, device="cpu", dtype="bfloat16")
    for name, way in ways.items():
        try:
            lm = way()
        except (ImportError, ValueError) as error:
            if name == "bf16":
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        print(f"{name}: loaded", file=sys.stderr, flush=True)
        yield name, lm
        del lm
        gc.collect()


# -- memory ------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """What one model made of the prompt: its thoughts (S, D), and the memory of T + S slots."""

    thoughts: Tensor
    cache: KVCache


def roll_out(lm: LM, ids: list[int], align: Aligner, forced: Tensor | None = None) -> Rollout:
    """Read the prompt, think `AT[-1]` thoughts; with `forced` (S, D) those are fed instead of the model's own."""
    own: list[Tensor] = []

    def feed(hidden: Tensor) -> Tensor:
        own.append(align(hidden)[0])  # (1, D)
        return (
            own[-1][None]
            if forced is None
            else forced[None, len(own) - 1 : len(own)].to(hidden.dtype)
        )

    cache = lm.model.new_cache(1)
    think(lm.model, feed, prefill(lm.model, [ids], cache), cache, AT[-1])
    return Rollout(torch.cat(own).float(), cache)


def memory_error(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The tables of --memory-error: keys and values of every layer, thoughts on their own and on bf16's memory."""
    question = read_rows(args.questions)[0]["question"] if args.questions else QUESTION
    text = sequential().agents[0].prompt.replace("{question}", question).replace("{context}", "")
    samples: dict[str, Any] = {"prompt": {}, "thoughts": {}, "steps": {}}
    base: dict[str, Rollout] = {}
    aligners: dict[str, Aligner] = {}
    ids: list[int] = []
    for name, lm in models(args, args.memory_error, wider=True):
        if not base:
            if lm.tokenizer is None:
                raise ValueError(
                    f"{args.memory_error}: tokenizer.json is missing, expected one: the prompt is text"
                )
            ids = lm.tokenizer.encode_turn(lm.tokenizer.turn(text))
            aligners = {kind: lm.aligner(kind) for kind in ALIGNMENTS}  # the same maps for all
        for kind, align in aligners.items():
            if name == "bf16":
                base[kind] = roll_out(lm, ids, align)
                continue
            for fed in ("its own", "bf16's"):
                made = roll_out(lm, ids, align, None if fed == "its own" else base[kind].thoughts)
                samples["steps"][f"{kind} | {name} | {fed}"] = compare(
                    made.thoughts, base[kind].thoughts
                )
                samples["thoughts"] |= layers(
                    f"{kind} | {name} | {fed}", made.cache, base[kind].cache, len(ids), None
                )
                samples["prompt"] |= layers(name, made.cache, base[kind].cache, 0, len(ids))
    lines = [
        f"Relative error against bf16, of a prompt of {len(ids)} tokens, per layer (float32 shows what bf16 itself",
        "rounds off; the keys of a model with biases, such as Qwen2's, are mostly bias):", "",
        *layer_table("model | ", samples["prompt"], args.all_layers), "",
        "Thoughts: relative error (cosine) of the embedding made at that step. A model that is fed its own thoughts",
        "adds its errors up; one that is fed bf16's shows what each step adds (its memory of them is its own).", "",
        f"| map | model | fed | {' | '.join(map(str, AT))} | largest |", "|---|---|---|" + "--:|" * (len(AT) + 1),
    ]  # fmt: skip
    for label, steps in samples["steps"].items():
        cells = [
            f"{error:.3f} ({cosine:.4f})" for error, cosine in (steps[step - 1] for step in AT)
        ]
        cells.append(f"{(most := max(steps))[0]:.3f} at {steps.index(most) + 1}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", f"Relative error of the memory of the {AT[-1]} thoughts, per layer:", ""]
    lines += layer_table("map | model | fed | ", samples["thoughts"], args.all_layers)
    return lines, samples


def compare(found: Tensor, expected: Tensor) -> list[tuple[float, float]]:
    """Relative error and cosine of the thoughts (S, D), one pair a step."""
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)  # (S,)
    cosines = F.cosine_similarity(found, expected, dim=-1)
    return list(zip(errors.tolist(), cosines.tolist(), strict=True))


def layers(
    label: str, found: KVCache, expected: KVCache, first: int, last: int | None
) -> dict[str, list[float]]:
    """Relative error of keys and of values in the slots first … last, layer by layer."""
    last = int(expected.lengths[0]) if last is None else last

    def error(mine: Tensor, theirs: Tensor) -> float:
        return relative(mine[:, :, first:last], theirs[:, :, first:last])  # (1, K, S, d)

    return {
        f"{label} | {kind}": [
            error(*pair) for pair in zip(getattr(found, kind), getattr(expected, kind), strict=True)
        ]
        for kind in ("keys", "values")
    }


def layer_table(labels: str, errors: dict[str, list[float]], everything: bool) -> list[str]:
    """One line a model; the columns are some layers, and the largest error with its layer."""
    count = len(next(iter(errors.values())))
    shown = (
        range(count)
        if everything
        else sorted({0, count // 4, count // 2, 3 * count // 4, count - 1})
    )
    titles = [f"layer {layer}" for layer in shown] + ["largest"]
    lines = [
        f"| {labels}| " + " | ".join(titles) + " |",
        "|" + "---|" * (labels.count("|") + 1) + "--:|" * len(titles),
    ]
    for label, of in errors.items():
        most = max(range(count), key=of.__getitem__)
        cells = [f"{of[layer]:.3f}" for layer in shown] + [f"{of[most]:.3f} in {most}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


# -- text --------------------------------------------------------------------------------------------------------------


def perplexity(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The table of --perplexity: the same tokens one by one and in chunks, and the error of the weights themselves."""
    samples: dict[str, Any] = {}
    windows: list[list[int]] = []
    exact: dict[str, Tensor] = {}
    for name, lm in models(args, args.perplexity):
        if not windows:
            if lm.tokenizer is None:
                raise ValueError(
                    f"{args.perplexity}: tokenizer.json is missing, expected one: a text is to be read"
                )
            ids = lm.tokenizer.encode(the_text(args.text))[: args.tokens]
            windows = [ids[i : i + args.window] for i in range(0, len(ids) - 1, args.window)]
            stored = lm.model.state_dict().items()
            exact = {
                key.removesuffix(".weight"): w for key, w in stored if key.endswith("_proj.weight")
            }
        weights = [relative(found, exact[key]) for key, found in matrices(lm.model, exact)]
        samples[name] = {"weights": sum(weights) / max(1, len(weights))}
        for way, step in WAYS.items():
            samples[name][way] = torch.cat(
                [losses(lm, window, step) for window in windows]
            ).tolist()
            print(
                f"{name}, {way}: {perplexity_of(samples[name][way]):.4f}",
                file=sys.stderr,
                flush=True,
            )
    count = len(samples["bf16"]["in chunks"])
    lines = [
        f"Perplexity of {count:,} tokens of {args.text} in windows of {args.window}, read one by one (the kernels of a "
        "step) and in chunks (those of a prefill); in brackets the ratio to bf16 ± a standard error, paired.", "",
        "| | " + " | ".join(WAYS) + " | relative error of the weights |", "|---|" + "--:|" * (len(WAYS) + 1),
    ]  # fmt: skip
    for name, of in samples.items():
        cells = [
            f"{perplexity_of(of[way]):.4f} ({ratio(of[way], samples['bf16'][way])})" for way in WAYS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {of['weights']:.4f} |")
    return lines, samples


def perplexity_of(losses: list[float]) -> float:
    return math.exp(sum(losses) / len(losses))


def ratio(losses: list[float], base: list[float]) -> str:
    """Of two perplexities on the same tokens, and its standard error, as if tokens were independent."""
    differences = torch.tensor(losses, dtype=torch.float64) - torch.tensor(
        base, dtype=torch.float64
    )
    value = differences.mean().exp().item()
    return f"{value:.4f} ± {value * differences.std().item() / len(losses) ** 0.5:.4f}"


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def losses(lm: LM, ids: list[int], step: int) -> Tensor:
    """−log p of every token but the first, reading `step` tokens at a time into one memory: (T − 1,)."""
    cache, parts = lm.model.new_cache(1), []
    tokens = torch.tensor([ids])
    for start in range(0, len(ids) - 1, step):
        part = tokens[:, start : min(start + step, len(ids) - 1)]
        logits = lm.model.logits(lm.model(lm.model.embed(part), cache))[0].float()  # (T, V)
        parts.append(
            F.cross_entropy(
                logits, tokens[0, start + 1 : start + 1 + len(logits)], reduction="none"
            )
        )
    return torch.cat(parts)


def matrices(model: nn.Module, exact: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every matrix of the layers as the model multiplies by it, (out, in): what it makes of the unit vectors."""
    for name, module in model.named_modules():
        if name in exact:
            bias, module.bias = module.bias, None  # large ones would hide the weights in 16 bits
            yield name, module(torch.eye(exact[name].shape[1], dtype=torch.bfloat16)[None])[0].T
            module.bias = bias


def the_text(path: Path) -> str:
    """A text file, or the questions and solutions of a .jsonl file."""
    if path.suffix != ".jsonl":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(
        f"{row['question']}\n{row.get('solution', row.get('answer', ''))}"
        for row in read_rows(path)
    )
