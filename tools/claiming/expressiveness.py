"""Measure how much one thought holds: how many random tokens a linear probe reads out of it.

Sequences of random tokens are prefilled in a user message. The state after the first N tokens is
mapped to a thought, and a linear probe, trained on other sequences, names each of the N tokens. A
thought right after the tokens is the most favourable case, because agents think after more text.
According to the paper, one thought can stand for d_h / log2 |V| tokens, a bound that assumes one
bit per number.

    planted    the probe on a linear code of the same tokens, with as many numbers as a thought
    shuffled   the probe with another sequence's tokens as targets, which must read nothing

    S sequences   N tokens   A alphabet   D hidden
"""

import math
from typing import Any

import torch
from torch import Tensor

from minimas import LM
from minimas.core.model import prefill
from minimas.text.tokenizer import Tokenizer
from tools.evaluation.stats import bootstrap

from .setting import FAILS, HOLDS, Finding, Setting

SEQUENCES = 20  # per unit of --limit
ALPHABET = 64  # tokens to draw from; a probe needs many examples of each
TINY_COUNTS, COUNTS = (1, 2, 4, 8, 16), (1, 2, 4)
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # relative to the mean variance of a dimension
SHARES = (0.7, 0.15)  # of the sequences, to train and to choose the ridge; the rest are for testing


def measure(setting: Setting) -> Finding:
    """Return how many of N random tokens are read out of a thought and of a code, and by chance."""
    lm, S = setting.lm, SEQUENCES * setting.count(tiny=200, other=35)
    counts = TINY_COUNTS if setting.is_tiny else COUNTS
    ids, letters = random_tokens(lm, S, counts[-1], setting.seed)
    states = prefixes(lm, ids, counts)  # N -> (S, D)
    align, D = lm.aligner("ridge"), lm.model.config.hidden_size
    bound = D / math.log2(lm.model.config.vocab_size)
    lines: dict[str, list[dict[str, float]]] = {"thought": [], "planted": [], "shuffled": []}
    for N in counts:
        targets = letters[:, :N]
        thoughts = align(states[N]).double()
        sources = {
            "thought": (thoughts, targets),
            "planted": (planted(targets, D, setting.seed), targets),
            "shuffled": (thoughts, targets.roll(1, 0)),
        }
        for name, (features, wanted) in sources.items():
            lines[name].append({"N": N} | tokens_read(features, wanted))
    best = max(lines["thought"], key=lambda line: line["read"])
    code = max(lines["planted"], key=lambda line: line["read"])
    wrong = max(lines["shuffled"], key=lambda line: line["read"])
    sentence = (
        f"A linear probe reads at most {best['read']:.2f} [{best['low']:.2f}, {best['high']:.2f}] "
        f"random tokens out of one thought (N = {best['N']}), compared with d_h / log2 V = "
        f"{bound:.1f}; it reads {code['read']:.1f} tokens out of a linear code of {D} numbers (N = "
        f"{code['N']}), and {wrong['read']:.2f} with wrong targets."
    )
    figures = {"bound": bound, "sequences": S, "alphabet": ALPHABET, "lines": lines}
    return Finding(sentence, HOLDS if best["read"] >= bound / 2 else FAILS, figures)


def random_tokens(lm: LM, S: int, N: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return sequences of random tokens (S, N), as ids and as numbers below the alphabet's size.

    The alphabet is drawn from all tokens except control tokens.
    """
    assert lm.tokenizer is not None
    source = torch.Generator().manual_seed(seed)
    every = torch.randperm(lm.tokenizer.size, generator=source).tolist()
    control = set(lm.tokenizer.control.values())
    alphabet = torch.tensor([token for token in every if token not in control][:ALPHABET])
    letters = torch.randint(len(alphabet), (S, N), generator=source)
    return alphabet[letters], letters


def prefixes(lm: LM, ids: Tensor, counts: tuple[int, ...], batch: int = 100) -> dict[int, Tensor]:
    """Return the state after the first N tokens of a user message, N -> (S, D)."""
    model, tokenizer = lm.model, lm.tokenizer
    assert isinstance(tokenizer, Tokenizer)
    before = tokenizer.encode_turn(tokenizer.user_turn(["x"])[0])
    cache = model.new_cache(1)
    prefill(model, [before], cache)
    kept: dict[int, list[Tensor]] = {N: [] for N in counts}
    for part in ids.split(batch):
        own = cache.select([0] * len(part))
        hidden = model(model.embed(part.to(model.device)), own)  # (batch, N, D)
        for N in counts:
            kept[N].append(hidden[:, N - 1])
    return {N: torch.cat(parts) for N, parts in kept.items()}


def planted(letters: Tensor, D: int, seed: int) -> Tensor:
    """Return a linear code (S, D) of sequences (S, N).

    A code is the sum of one random vector per place and token. What a probe reads out of it shows
    how much the probe could find in D numbers.
    """
    source = torch.Generator().manual_seed(seed)
    N = letters.shape[1]
    table = torch.randn(N, ALPHABET, D, generator=source, dtype=torch.float64)
    code: Tensor = torch.stack([table[i, letters[:, i]] for i in range(N)]).sum(0)
    return code


def tokens_read(features: Tensor, letters: Tensor) -> dict[str, Any]:
    """Return how many of a sequence's tokens (S, N) a probe reads out of its features (S, D).

    "by place" is the share of right tokens above chance at each place, (share − 1/A) / (1 − 1/A).
    "read" is its sum over the places, with a bootstrap interval over the tested sequences. The
    probe is a ridge regression to one-hot targets, whose ridge is chosen on sequences that are not
    tested.
    """
    S, N = letters.shape
    edges = [round(S * SHARES[0]), round(S * sum(SHARES))]
    train, choose, test = torch.arange(S).tensor_split(edges)
    x = features - features[train].mean(0)
    targets = torch.nn.functional.one_hot(letters, ALPHABET).double().flatten(1)  # (S, N · A)
    shift = targets[train].mean(0)
    values, vectors = torch.linalg.eigh(x[train].T @ x[train] / len(train))
    products = vectors.T @ (x[train].T @ (targets[train] - shift)) / len(train)  # (D, N · A)

    def right(rows: Tensor, ridge: float) -> Tensor:
        weights = products / (values.clamp_min(0) + ridge * values.mean())[:, None]
        scores = x[rows] @ vectors @ weights + shift  # (rows, N · A)
        named: Tensor = scores.view(len(rows), N, -1).argmax(-1)  # (rows, N)
        return named == letters[rows]

    ridge = max(RIDGES, key=lambda value: float(right(choose, value).double().mean()))
    found = right(test, ridge).double()
    above = (found - 1 / ALPHABET) / (1 - 1 / ALPHABET)
    read, low, high = bootstrap(above.sum(1).tolist())
    return {
        "read": read,
        "low": low,
        "high": high,
        "by place": above.mean(0).tolist(),
        "ridge": ridge,
    }
