"""From hidden states to text, in three layers: one token a step, pieces of text as they come, a list of results.

Draws come from one generator per question, seeded by (seed, question), so that a text depends on no other question,
order or shard. Does not know: prompts, agents, alignment.

    B rows   T positions   D hidden   V vocabulary
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.cache import KVCache
from ..core.model import Qwen3, finite
from .tokenizer import TextStream, Tokenizer

KEPT = 0.75  # a batch is made smaller once this share of its rows, or less, still runs


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to stop; temperature 0 is greedy. Values out of range are a ValueError."""

    temperature: float = 0.0
    top_p: float = 1.0  # keep the fewest tokens whose probabilities reach this
    top_k: int = 0  # keep this many tokens; 0: all
    repetition_penalty: float = 1.0  # divides the positive scores of tokens already there; 1: none
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        wanted = {
            "temperature": "0 or more",
            "top_p": "more than 0 and at most 1",
            "repetition_penalty": "more than 0",
        }
        wanted |= {
            "top_k": "a whole number, 0 or more",
            "max_new_tokens": "a whole number, 1 or more",
        }
        for name, expected in wanted.items():
            value = getattr(self, name)
            good = isinstance(
                value, int if "whole" in expected else int | float
            ) and not isinstance(value, bool)
            good = (
                good and value < 1e300 and (value > 0 or (value == 0 and "0 or more" in expected))
            )
            if not good or (name == "top_p" and value > 1):
                raise ValueError(
                    f"{name} (--{name.replace('_', '-')}): found {value!r:.40}, expected {expected}"
                )

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], source: str = "generation_config.json"
    ) -> "Sampling":
        """The defaults of a generation_config.json; greedy unless it says do_sample."""
        names = ["repetition_penalty", "max_new_tokens"]
        if raw.get("do_sample"):
            names += ["temperature", "top_p", "top_k"]
        given = {"temperature": 1.0} if raw.get("do_sample") else {}  # as in Hugging Face
        try:
            return cls(**given | {name: raw[name] for name in names if raw.get(name) is not None})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


@dataclass(frozen=True)
class GeneratedText:
    """What one row wrote: its text, the ids of it, and why it stopped, "stop" (an end token) or "length"."""

    text: str
    ids: list[int]
    finish_reason: str


def generator(seed: int, question: str) -> torch.Generator:
    """The source of draws for one question, on the CPU, the same on every machine."""
    digest = hashlib.sha256(f"{seed}\n{question}".encode(errors="surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def sample(
    logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator | None]
) -> Tensor:
    """The next token of each row: logits (B, V), one generator a row (None: a row that has ended) -> (B,) int64."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    kept = min(sampling.top_k or logits.shape[1], logits.shape[1])
    scores, order = logits.double().topk(kept)  # (B, k), descending
    # From the largest: at a temperature near 0 the scores overflow, their differences do not.
    probabilities = ((scores - scores[:, :1]) / sampling.temperature).softmax(-1)
    # A token stays if the mass before it is short of top_p; the most likely one always does.
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.where(before < sampling.top_p, 0.0)
    mass = probabilities.cumsum(-1)  # (B, k)
    draws = [
        0.0 if g is None else torch.rand((), dtype=torch.float64, generator=g).item()
        for g in generators
    ]
    draw = torch.tensor(draws, dtype=torch.float64, device=mass.device)[:, None]  # (B, 1)
    place = torch.searchsorted(mass, draw * mass[:, -1:], right=True)
    place = place.minimum((probabilities > 0).sum(-1, keepdim=True) - 1)
    return order.gather(1, place)[:, 0]


def decode(
    model: Qwen3,
    hidden: Tensor,
    cache: KVCache,
    sampling: Sampling,
    end_ids: Collection[int],
    generators: Sequence[torch.Generator],
    prompts: Sequence[Sequence[int]],
    remember: bool = True,
) -> Iterator[list[int | None]]:
    """From hidden (B, 1, D) on, yield one token for every row, None for a row that has ended, until all have.

    A token is in memory once the iterator is asked for the next one; an end token never is. There is no limit here:
    the caller stops asking. `prompts` are the ids that a repetition penalty counts as already there. Without
    `remember` rows that have ended leave the batch, and `cache` is not to be used afterwards: 96 answers of unequal
    length took 1.6 times as long with all rows kept (Qwen2.5-0.5B, bf16, AVX2).
    """
    rows = list(range(len(generators)))  # the rows of the batch that are still there
    answers: list[int | None] = [None] * len(rows)
    running, seen = [True] * len(generators), [list(row) for row in prompts]
    while True:
        logits = finite(model.logits(hidden), model.name)[:, -1]  # (B, V)
        if (
            penalty := sampling.repetition_penalty
        ) != 1:  # Keskar et al., arXiv 1909.05858, as in Hugging Face
            for scores, there in zip(logits, seen, strict=True):
                old = scores[there]
                scores[there] = torch.where(old > 0, old / penalty, old * penalty)
        # An ended row draws no more: how long its neighbours go on must not move its generator.
        drawing = [source if on else None for source, on in zip(generators, running, strict=True)]
        tokens = sample(logits, sampling, drawing)  # (B,)
        ids = tokens.tolist()
        running = [
            still and token not in end_ids for still, token in zip(running, ids, strict=True)
        ]
        for row, still, token in zip(rows, running, ids, strict=True):
            answers[row] = token if still else None
        yield list(answers)
        if not any(running):
            return
        for there, token in zip(seen, ids, strict=True):
            there.append(token)
        # A compiled step is made for one number of rows: another one would be compiled anew.
        if not remember and sum(running) <= KEPT * len(rows) and model.step is None:
            kept = [place for place, still in enumerate(running) if still]
            rows, seen = [rows[place] for place in kept], [seen[place] for place in kept]
            generators = [generators[place] for place in kept]
            cache, tokens, running = cache.select(kept), tokens[kept], [True] * len(kept)
        hidden = model(
            model.embed(tokens[:, None]), cache, torch.tensor(running, dtype=torch.int64)
        )


def stream(
    model: Qwen3,
    tokenizer: Tokenizer,
    hidden: Tensor,
    cache: KVCache,
    sampling: Sampling,
    end_ids: Collection[int],
    generators: Sequence[torch.Generator],
    prompts: Sequence[Sequence[int]],
    remember: bool = False,
) -> Iterator[tuple[int, str, GeneratedText | None]]:
    """Yield (row, piece of text, None) as text comes, and (row, last piece, GeneratedText) when a row is done.

    With `remember` all that was written is in memory afterwards; without, the cache is not to be used any more.
    """
    texts = [TextStream(tokenizer) for _ in generators]
    running = set(range(len(texts)))
    steps = decode(model, hidden, cache, sampling, end_ids, generators, prompts, remember)
    for count, tokens in enumerate(steps, start=1):
        for row, token in enumerate(tokens):
            if row not in running:
                continue
            text, done = texts[row], None
            piece = "" if token is None else text.push(token)
            if token is None or count == sampling.max_new_tokens:
                running.discard(row)
                piece += text.finish()
                done = GeneratedText(text.text, text.ids, "stop" if token is None else "length")
            yield row, piece, done
        if count == sampling.max_new_tokens:
            if remember:
                next(steps, None)  # asked for one more, so that the last token is fed
            return


def generate(*args: Any, **kwargs: Any) -> list[GeneratedText]:
    """What each row writes, as one GeneratedText a row; takes what `stream` takes: model, tokenizer, hidden, cache …"""
    done = {row: written for row, _, written in stream(*args, **kwargs) if written is not None}
    return [done[row] for row in sorted(done)]
