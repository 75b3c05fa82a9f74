"""Generation of text from hidden states, in three layers: tokens, pieces of text, finished texts.

`decode` yields one token per row and step, `stream` turns the tokens into pieces of text, and
`generate` returns the finished texts. Random numbers come from one generator per question, seeded
by (seed, question). A text is therefore independent of the other questions in the batch and of
their order. This file does not depend on prompts, agents or alignment.

    B rows   T new positions   D hidden   V vocabulary
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from ..core.cache import KVCache
from ..core.errors import ParameterError
from ..core.model import Qwen3, finite
from ..core.rotary import for_float64
from .tokenizer import TextStream, Tokenizer

SHRINK_AT = 0.75  # ended rows leave the batch once at most this share of its rows is running
SMALLEST = 5e-324  # the smallest float above 0: bound of settings that must be above 0
LARGEST = 1e300  # bound of settings that must be finite


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when generation stops.

    Raises ValueError naming the field and its command-line flag if a value is out of range.
    """

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # keep the fewest tokens whose probabilities add up to this
    top_k: int = 0  # keep this many tokens; 0: all
    # Divides the positive scores of the tokens in an agent's own prompt and answer; 1: none.
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    min_p: float = 0.0  # keep tokens of at least this share of the largest probability; 0: all

    def __post_init__(self) -> None:
        for name, low, high, expected in (
            ("temperature", 0, LARGEST, "0 to 1e300"),
            ("top_p", SMALLEST, 1, "more than 0 and at most 1"),
            ("top_k", 0, LARGEST, "a whole number, 0 or more"),
            ("repetition_penalty", SMALLEST, LARGEST, "more than 0"),
            ("max_new_tokens", 1, LARGEST, "a whole number, 1 or more"),
            ("min_p", 0, 1, "0 to 1"),
        ):
            value = getattr(self, name)
            kinds = (int, type(getattr(Sampling, name)))
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                raise ParameterError(name, f"found {value!r:.40}, expected {expected}")

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], source: str = "generation_config.json"
    ) -> "Sampling":
        """Read the settings of a generation_config.json; greedy unless it sets `do_sample`.

        Raises ValueError naming `source` and the field if a value is out of range.
        """
        given = {name: value for name, value in raw.items() if value is not None}
        names = {"repetition_penalty", "max_new_tokens"}
        if given.get("do_sample"):
            names = set(cls.__dataclass_fields__)
            given = {"temperature": 1.0, "top_k": 50} | given  # the defaults of Hugging Face
        try:
            return cls(**{name: given[name] for name in names & given.keys()})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


@dataclass(frozen=True)
class GeneratedText:
    """The text of one row, its token ids, and why it ended: "stop" (an end token) or "length"."""

    text: str
    ids: list[int]
    finish_reason: str


def generator(seed: int, question: str) -> torch.Generator:
    """Return the random generator of one question, on the CPU; it is the same on every machine."""
    digest = hashlib.sha256(f"{seed}\n{question}".encode(errors="surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def sample(
    logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator | None]
) -> Tensor:
    """Return the next token of each row, (B,) int64, from logits (B, V).

    `generators` holds one generator per row, or None for a row that has ended, so that no random
    number is drawn for it. At temperature 0 no generator is used.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    count = min(sampling.top_k or logits.shape[1], logits.shape[1])
    scores, order = for_float64(logits).double().topk(count)  # (B, count), descending
    # Relative to the largest: near temperature 0 the scores overflow, but their differences do not.
    probabilities = ((scores - scores[:, :1]) / sampling.temperature).softmax(-1)
    # A token stays if the probabilities before it sum to less than top_p. The first always stays.
    earlier = probabilities.cumsum(-1) - probabilities
    stays = (earlier < sampling.top_p) & (probabilities >= sampling.min_p * probabilities[:, :1])
    probabilities = probabilities.where(stays, 0.0)
    mass = probabilities.cumsum(-1)  # (B, count)
    draws = [
        0.0 if g is None else torch.rand((), dtype=torch.float64, generator=g).item()
        for g in generators
    ]
    # A blocking copy would make the host wait for the previous step.
    draw = torch.tensor(draws, dtype=torch.float64).to(mass.device, non_blocking=True)  # (B,)
    place = torch.searchsorted(mass, draw[:, None] * mass[:, -1:], right=True)  # (B, 1)
    possible = (probabilities > 0).sum(-1, keepdim=True)  # number of tokens, 0 for NaN
    place = place.minimum(possible.clamp_min(1) - 1)
    return order.gather(1, place)[:, 0].to(logits.device)  # (B,)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> None:
    """Lower the scores (B, V) of each row's earlier tokens, `seen` (B, n), in place.

    A token that is repeated in `seen` counts once. Keskar et al., arXiv 1909.05858, in the form of
    Hugging Face.
    """
    old = logits.gather(1, seen)  # (B, n)
    logits.scatter_(1, seen, torch.where(old > 0, old / penalty, old * penalty))


def decode(
    model: Qwen3,
    hidden: Tensor,
    cache: KVCache,
    sampling: Sampling,
    end_ids: Collection[int],
    generators: Sequence[torch.Generator],
    prompts: Sequence[Sequence[int]],
    keeps_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Yield one token per row in each step, from hidden (B, 1, D) on; None for ended rows.

    The iterator ends when all rows have ended. It has no limit, so the caller must stop. A token
    enters the KV cache when the next step is requested, and an end token never does. `prompts`
    holds the earlier tokens per row, for a repetition penalty. Without `keeps_cache`, ended rows
    leave the batch (96 answers of unequal length, Qwen2.5-0.5B, bf16, AVX2: 1.6 times as fast), and
    `cache` must not be used again. Raises ValueError naming the model if a score is not finite.
    """
    rows = list(range(len(prompts)))  # the rows in the batch
    running = set(rows)
    # Copied to the device once. A short row is repeated up to the longest row's length.
    longest = max(map(len, prompts))
    seen = torch.tensor([[*islice(cycle(ids), longest)] for ids in prompts], dtype=torch.int64)
    seen = seen.to(model.device, non_blocking=True)  # (B, n)
    while True:
        logits = model.logits(hidden)[:, -1]  # (B, V)
        if sampling.repetition_penalty != 1:
            penalize(logits, seen, sampling.repetition_penalty)
        # Nothing is drawn for ended rows: their generators must not depend on the other rows.
        tokens = sample(  # (B,)
            logits, sampling, [generators[row] if row in running else None for row in rows]
        )
        seen = torch.cat([seen, tokens[:, None]], 1)
        # The only copy to the host in a step: on a GPU it waits for all kernels.
        chosen = tokens.where(logits.isfinite().all(-1), -1).tolist()
        if -1 in chosen:
            finite(logits.cpu(), model.name)
        step = dict(zip(rows, chosen, strict=True))
        running -= {row for row, token in step.items() if token in end_ids}
        yield [step[row] if row in running else None for row in range(len(prompts))]
        if not running:
            return
        # A compiled step has a fixed number of rows.
        if not keeps_cache and len(running) <= SHRINK_AT * len(rows) and model.step is None:
            staying = [i for i, row in enumerate(rows) if row in running]
            cache = cache.select(staying)
            tokens = tokens[staying]
            seen = seen[staying]
            rows = sorted(running)
        hidden = model(model.embed(tokens[:, None]), cache, [int(row in running) for row in rows])


def stream(
    model: Qwen3,
    tokenizer: Tokenizer,
    hidden: Tensor,
    cache: KVCache,
    sampling: Sampling,
    end_ids: Collection[int],
    generators: Sequence[torch.Generator],
    prompts: Sequence[Sequence[int]],
    keeps_cache: bool = False,
) -> Iterator[tuple[int, str, GeneratedText | None]]:
    """Yield (row, piece of text, None) per token, and (row, last piece, GeneratedText) at the end.

    The parameters are those of `decode`. Stops after `max_new_tokens`. With `keeps_cache`, the KV
    cache holds all generated tokens afterwards. Without it, the cache must not be used again.
    """
    running = {row: TextStream(tokenizer) for row in range(len(generators))}
    steps = decode(model, hidden, cache, sampling, end_ids, generators, prompts, keeps_cache)
    for count, tokens in enumerate(steps, start=1):
        at_limit = count == sampling.max_new_tokens
        for row, text in list(running.items()):
            token = tokens[row]
            done = None
            piece = "" if token is None else text.push(token)
            if token is None or at_limit:
                del running[row]
                piece += text.finish()
                done = GeneratedText(text.text, text.ids, "stop" if token is None else "length")
            yield row, piece, done
        if at_limit:
            if keeps_cache:
                next(steps, None)  # the last token enters the KV cache
            return


def generate(
    model: Qwen3,
    tokenizer: Tokenizer,
    hidden: Tensor,
    cache: KVCache,
    sampling: Sampling,
    end_ids: Collection[int],
    generators: Sequence[torch.Generator],
    prompts: Sequence[Sequence[int]],
    keeps_cache: bool = False,
) -> list[GeneratedText]:
    """Return the finished text of each row, from hidden (B, 1, D) on. Parameters: see `stream`."""
    # locals(): all parameters, by name
    done = {row: text for row, _, text in stream(**locals()) if text is not None}
    return [done[row] for row in sorted(done)]
