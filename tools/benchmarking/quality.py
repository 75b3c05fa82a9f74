"""Measure the error of quantized weights in the KV cache (--memory-error) and in perplexity.

The reference is the same folder in bf16. Models are loaded one after another, and each stays in
memory until the next one is loaded. For --perplexity, the matrices of the reference are kept as
well. tools/benchmark.py runs this module, which does not depend on timing or answers.

    T prompt tokens   S thoughts   K key-value heads   d head size   D hidden   V vocabulary
"""

import argparse
import gc
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimas import LM, Aligner, KVCache, load, sequential, think
from minimas.core.model import prefill
from minimas.layout import user_text
from tools.evaluation.rows import read_rows

# How many tokens one forward pass takes: a step of decoding, or a chunk of a prefill.
CHUNK_TOKENS = {"one by one": 1, "in chunks": 512}
TABLE_STEPS = (1, 2, 5, 10, 20, 40, 80)  # latent steps that the tables show
ALIGNMENTS = ("ridge", "prenorm")
QUESTION = (
    "A farmer sells 14 boxes of apples at $12 each and 9 boxes of pears at $15 each. He pays $48 "
    "for the stall and a quarter of the rest to his helper. How much does he keep?"
)


def models(args: argparse.Namespace, folder: Path, wider: bool = False) -> Iterator[tuple[str, LM]]:
    """Yield (name, model) for bf16, for float32 if `wider`, for every format and every GGUF file.

    A model that cannot be loaded is left out with a message. The caller's variable keeps a model in
    memory until the next one is loaded. Raises ImportError or ValueError if bf16 cannot be loaded.
    """
    on_cpu = partial(load, device="cpu", dtype="bfloat16")
    loaders: dict[str, Any] = {"bf16": partial(on_cpu, folder)}
    if wider:
        loaders["float32"] = partial(load, folder, device="cpu", dtype="float32")
    for format in args.formats:
        loaders[format] = partial(on_cpu, folder, quantize=format)
    for path in args.gguf:
        loaders[path.name] = partial(on_cpu, path)
    for name, loader in loaders.items():
        try:
            lm = loader()
        except (ImportError, ValueError) as error:
            if name == "bf16":
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        print(f"{name}: loaded", file=sys.stderr, flush=True)
        yield name, lm
        del lm
        gc.collect()


# -- KV cache --------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """What one model computed after the prompt: its thoughts (S, D), and a cache of T + S slots."""

    thoughts: Tensor
    cache: KVCache


def roll_out(lm: LM, ids: list[int], align: Aligner, forced: Tensor | None = None) -> Rollout:
    """Prefill the prompt and take the largest number of latent steps in `TABLE_STEPS`.

    With `forced` (S, D) the model is fed these thoughts in place of its own.
    """
    own: list[Tensor] = []

    def feed(hidden: Tensor) -> Tensor:
        step = len(own)
        own.append(align(hidden)[0])  # (1, D)
        if forced is None:
            return own[-1][None]  # (1, 1, D)
        return forced[None, step : step + 1].to(hidden.dtype)  # (1, 1, D)

    cache = lm.model.new_cache(1)
    think(lm.model, feed, prefill(lm.model, [ids], cache), cache, TABLE_STEPS[-1])
    return Rollout(torch.cat(own).float(), cache)


def memory_error(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Return the tables of --memory-error and all values.

    The tables show the keys and values of every layer, and the thoughts of each model after its
    own thoughts and after those of bf16.
    """
    samples: dict[str, Any] = {"prompt": {}, "thoughts": {}, "steps": {}}
    base: dict[str, Rollout] = {}
    aligners: dict[str, Aligner] = {}
    ids: list[int] = []
    for name, lm in models(args, args.memory_error, wider=True):
        if not base:
            ids = prompt_ids(args, lm)
            aligners = {kind: lm.aligner(kind) for kind in ALIGNMENTS}  # all models use these
        for kind, align in aligners.items():
            if name == "bf16":
                base[kind] = roll_out(lm, ids, align)
                continue
            thoughts, cache = base[kind]
            for fed, forced in (("its own", None), ("bf16's", thoughts)):
                label = f"{kind} | {name} | {fed}"
                found = roll_out(lm, ids, align, forced)
                samples["steps"][label] = compare(found.thoughts, thoughts)
                samples["thoughts"] |= layers(label, found.cache, cache, len(ids), None)
                samples["prompt"] |= layers(name, found.cache, cache, 0, len(ids))
    return memory_page(samples, len(ids), args.all_layers), samples


def prompt_ids(args: argparse.Namespace, lm: LM) -> list[int]:
    """Return the ids of the first agent's prompt. Raises ValueError without a tokenizer."""
    if lm.tokenizer is None:
        raise ValueError(
            f"{args.memory_error}: tokenizer.json is missing, expected one, as the prompt is text"
        )
    question = read_rows(args.questions)[0]["question"] if args.questions else QUESTION
    team = sequential()
    text = user_text(team.opening, team.agents[0].prompt)
    text = text.replace("{question}", question).replace("{context}", "")
    return lm.tokenizer.encode_turn(lm.tokenizer.turn(text))


def memory_page(samples: dict[str, Any], prompt_tokens: int, all_layers: bool) -> list[str]:
    """Return the tables of --memory-error."""
    lines = [
        f"Relative error compared with bf16, for a prompt of {prompt_tokens} tokens, per layer.",
        "float32 shows the rounding of bf16 itself. The keys of a model with biases, such as",
        "Qwen2, are mostly bias:",
        "",
        *layer_table("model | ", samples["prompt"], all_layers),
        "",
        "Thoughts: relative error (cosine) of the embedding at that step. The errors of a model",
        "that is fed its own thoughts add up. A model that is fed the thoughts of bf16 shows the",
        "error of each single step, after its own keys and values of these thoughts.",
        "",
        f"| map | model | fed | {' | '.join(map(str, TABLE_STEPS))} | largest |",
        "|---|---|---|" + "--:|" * (len(TABLE_STEPS) + 1),
    ]
    for label, steps in samples["steps"].items():
        shown = [steps[step - 1] for step in TABLE_STEPS]
        cells = [f"{error:.3f} ({cosine:.4f})" for error, cosine in shown]
        largest = max(steps)
        cells.append(f"{largest[0]:.3f} at {steps.index(largest) + 1}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    count = TABLE_STEPS[-1]
    lines += ["", f"Relative error of the keys and values of the {count} thoughts, per layer:", ""]
    return lines + layer_table("map | model | fed | ", samples["thoughts"], all_layers)


def compare(found: Tensor, expected: Tensor) -> list[tuple[float, float]]:
    """Return the relative error and the cosine of the thoughts (S, D), one pair per step."""
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)  # (S,)
    cosines = F.cosine_similarity(found, expected, dim=-1)  # (S,)
    return list(zip(errors.tolist(), cosines.tolist(), strict=True))


def layers(
    label: str, found: KVCache, expected: KVCache, first: int, last: int | None
) -> dict[str, list[float]]:
    """Return the relative error of keys and of values in the slots first … last - 1, per layer.

    If `last` is None, it is the number of filled slots.
    """
    end = int(expected.lengths[0]) if last is None else last
    errors: dict[str, list[float]] = {}
    for kind in ("keys", "values"):
        pairs = zip(getattr(found, kind), getattr(expected, kind), strict=True)
        errors[f"{label} | {kind}"] = [
            relative(mine[:, :, first:end], theirs[:, :, first:end])  # (1, K, end - first, d)
            for mine, theirs in pairs
        ]
    return errors


def layer_table(labels: str, errors: dict[str, list[float]], all_layers: bool) -> list[str]:
    """Return a Markdown table, one line per model. Its columns are layers and the largest error."""
    count = len(next(iter(errors.values())))
    shown: Sequence[int] = range(count)
    if not all_layers:
        shown = sorted({0, count // 4, count // 2, 3 * count // 4, count - 1})
    titles = [f"layer {layer}" for layer in shown] + ["largest"]
    lines = [
        f"| {labels}| " + " | ".join(titles) + " |",
        "|" + "---|" * (labels.count("|") + 1) + "--:|" * len(titles),
    ]
    for label, values in errors.items():
        largest = max(values)
        cells = [f"{values[layer]:.3f}" for layer in shown]
        cells.append(f"{largest:.3f} in {values.index(largest)}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


# -- perplexity ------------------------------------------------------------------------------------


def perplexity(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Return the table of --perplexity and the loss of every token.

    The same tokens are prefilled one by one and in chunks. The table also has the error of the
    weights.
    """
    samples: dict[str, Any] = {}
    windows: list[list[int]] = []
    exact: dict[str, Tensor] = {}
    for name, lm in models(args, args.perplexity):
        if not windows:
            windows = token_windows(args, lm)
            for key, weight in lm.model.state_dict().items():
                if key.endswith("_proj.weight"):
                    exact[key.removesuffix(".weight")] = weight
        errors = [relative(found, exact[key]) for key, found in matrices(lm.model, exact)]
        samples[name] = {"weights": sum(errors) / max(1, len(errors))}
        for way, chunk_tokens in CHUNK_TOKENS.items():
            parts = [losses(lm, window, chunk_tokens) for window in windows]
            samples[name][way] = torch.cat(parts).tolist()
            value = perplexity_of(samples[name][way])
            print(f"{name}, {way}: {value:.4f}", file=sys.stderr, flush=True)
    count = len(samples["bf16"]["in chunks"])
    lines = [
        f"Perplexity of {count:,} tokens of {args.text} in windows of {args.window}, prefilled one "
        "by one (the kernels of a step) and in chunks (those of a prefill). In brackets: the ratio "
        "to bf16 ± its standard error, paired by token.",
        "",
        f"| | {' | '.join(CHUNK_TOKENS)} | relative error of the weights |",
        "|---|" + "--:|" * (len(CHUNK_TOKENS) + 1),
    ]
    for name, values in samples.items():
        cells = []
        for way in CHUNK_TOKENS:
            against = ratio(values[way], samples["bf16"][way])
            cells.append(f"{perplexity_of(values[way]):.4f} ({against})")
        lines.append(f"| {name} | {' | '.join(cells)} | {values['weights']:.4f} |")
    return lines, samples


def token_windows(args: argparse.Namespace, lm: LM) -> list[list[int]]:
    """Return the first `--tokens` ids of the text, cut into windows of `--window` ids."""
    if lm.tokenizer is None:
        raise ValueError(
            f"{args.perplexity}: tokenizer.json is missing, expected one, as the model reads text"
        )
    ids = lm.tokenizer.encode(read_text(args.text))[: args.tokens]
    return [ids[i : i + args.window] for i in range(0, len(ids) - 1, args.window)]


def perplexity_of(losses: list[float]) -> float:
    """Return the perplexity of some losses in nats."""
    return math.exp(sum(losses) / len(losses))


def ratio(losses: list[float], base: list[float]) -> str:
    """Return the ratio of two perplexities on the same tokens, and its standard error.

    The error is paired by token and assumes that tokens are independent.
    """
    mine, theirs = (torch.tensor(values, dtype=torch.float64) for values in (losses, base))
    differences = mine - theirs
    value = differences.mean().exp().item()
    return f"{value:.4f} ± {value * differences.std().item() / len(losses) ** 0.5:.4f}"


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference divided by the norm of `expected`."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def losses(lm: LM, ids: list[int], chunk_tokens: int) -> Tensor:
    """Return −log p of every token except the first, (T − 1,), in chunks of `chunk_tokens`."""
    cache = lm.model.new_cache(1)
    tokens = torch.tensor([ids])  # (1, T)
    parts = []
    for start in range(0, len(ids) - 1, chunk_tokens):
        chunk = tokens[:, start : min(start + chunk_tokens, len(ids) - 1)]
        logits = lm.model.logits(lm.model(lm.model.embed(chunk), cache))[0].float()  # (chunk, V)
        targets = tokens[0, start + 1 : start + 1 + len(logits)]
        parts.append(F.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(parts)


def matrices(model: nn.Module, exact: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every matrix of the layers as the model multiplies by it, (out, in).

    The matrix is the module's output for the unit vectors. The bias is removed meanwhile, because a
    large bias hides the weights in 16 bits.
    """
    for name, module in model.named_modules():
        if name in exact:
            bias, module.bias = module.bias, None
            units = torch.eye(exact[name].shape[1], dtype=torch.bfloat16)
            yield name, module(units[None])[0].T  # (out, in)
            module.bias = bias


def read_text(path: Path) -> str:
    """Return a text file, or the questions and solutions of a .jsonl file."""
    if path.suffix != ".jsonl":
        return path.read_text(encoding="utf-8")
    rows = read_rows(path)
    texts = [f"{row['question']}\n{row.get('solution', row.get('answer', ''))}" for row in rows]
    return "\n\n".join(texts)
