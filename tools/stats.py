"""The few statistics of a paired comparison: exact where that is cheap, drawn from a fixed seed where not.

Does not know: what is compared.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Z95 = 1.959963984540054
DRAWS = 10_000


def wilson(right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson interval of a share, 95 % by default: never below 0 or above 1, and of use at 0 of n."""
    if n == 0:
        return 0.0, 1.0
    share, square = right / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, min(share, middle - half)), min(
        1.0, max(share, middle + half)
    )  # at 0 and 1 it rounds past them


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p of McNemar's test: how likely discordant pairs are split so unevenly by a fair coin."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) * 2
    return min(1.0, tail / 2**n)


def bootstrap(
    values: Sequence[float], draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of `values` and its 95 % percentile bootstrap interval; for pairs, pass their differences."""
    data = torch.tensor(values, dtype=torch.float64)
    source = torch.Generator().manual_seed(seed)
    means = torch.cat(
        [
            data[torch.randint(len(data), (part, len(data)), generator=source)].mean(-1)
            for part in [1000] * (draws // 1000)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(data.mean()), low, high


def sign_flips(differences: Sequence[float], draws: int = 20_000, seed: int = 0) -> float:
    """The two-sided p of a mean difference under random signs: exact for up to 14 pairs, else from `draws` of them."""
    data = torch.tensor(differences, dtype=torch.float64)
    n, observed = len(data), data.mean().abs() * (1 - 1e-12)
    if n <= 14:
        bits = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1  # (2ⁿ, n)
        return float(((1 - 2.0 * bits.double()) @ data / n).abs().ge(observed).double().mean())
    source, larger = torch.Generator().manual_seed(seed), 0
    for part in [1000] * (draws // 1000):
        signs = 1 - 2.0 * torch.randint(2, (part, n), generator=source).double()
        larger += int((signs @ data / n).abs().ge(observed).sum())
    return (larger + 1) / (draws // 1000 * 1000 + 1)  # the observed signs are one of the draws


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error (0 for a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(
        sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
    )


def by_question(values: Mapping[tuple[str, int], float]) -> list[float]:
    """The mean over each question's seeds, (question, seed) -> value, in the order in which questions first come."""
    several: dict[str, list[float]] = {}
    for (question, _), value in values.items():
        several.setdefault(question, []).append(value)
    return [sum(of) / len(of) for of in several.values()]


def share(graded: Sequence[float]) -> list[float]:
    """The share of right answers and its interval, from one value a question: Wilson's, or a bootstrap's of fractions.

    Several seeds of one question are no further questions, so the interval is over questions.
    """
    whole = set(graded) <= {0.0, 1.0}
    interval = wilson(int(sum(graded)), len(graded)) if whole else bootstrap(graded)[1:]
    return [sum(graded) / len(graded), *interval]


def paired(
    first: Mapping[tuple[str, int], float],
    second: Mapping[tuple[str, int], float],
    exact: bool = False,
) -> dict[str, Any] | None:
    """The difference first − second over the (question, seed) that both have; None: there are none.

    `exact`: of right and wrong answers the p is McNemar's, where every question has one seed; else of random signs.
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    pairs = by_question({key: first[key] - second[key] for key in shared})
    mean, low, high = bootstrap(pairs)
    line = {"n": len(pairs), "mean": mean, "low": low, "high": high, "error": mean_error(pairs)[1]}
    line |= {
        name: sum(of[key] for key in shared) / len(shared)
        for name, of in (("first", first), ("second", second))
    }
    if exact and set(pairs) <= {-1.0, 0.0, 1.0}:
        return line | {"p": mcnemar(pairs.count(1.0), pairs.count(-1.0))}
    return line | {"p": sign_flips(pairs)}
