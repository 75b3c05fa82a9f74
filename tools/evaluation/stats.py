"""Statistics of paired comparisons.

They are exact where that is fast, and otherwise use random draws from a fixed seed. This module
does not depend on what is compared.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
CHUNK = 1_000  # draws that are computed together
Values = Mapping[tuple[str, int], float]  # (question, seed) -> value


def wilson(right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson interval of the share right / n, 95 % by default.

    The interval stays between 0 and 1, and is meaningful even for 0 of n.
    """
    if n == 0:
        return 0.0, 1.0
    share, square = right / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # At a share of 0 or 1, rounding errors would exclude the share from the interval.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    It is the probability that a fair coin splits the discordant pairs at least as unevenly.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) * 2
    return float(min(1.0, tail / 2**n))


def bootstrap(
    values: Sequence[float], draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of `values` and the limits of its 95 % percentile bootstrap interval.

    For pairs, pass their differences. `draws` is rounded down to a multiple of `CHUNK`.
    """
    data = torch.tensor(values, dtype=torch.float64)
    source, parts = torch.Generator().manual_seed(seed), []
    for _ in range(draws // CHUNK):
        chosen = torch.randint(len(data), (CHUNK, len(data)), generator=source)
        parts.append(data[chosen].mean(-1))
    limits = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(parts), limits).tolist()
    return float(data.mean()), low, high


def sign_flips(differences: Sequence[float], draws: int = 20_000, seed: int = 0) -> float:
    """Return the two-sided p-value of a mean difference under random signs.

    It is exact for at most 14 pairs. For more pairs it is estimated from `draws` random assignments
    of signs, rounded down to a multiple of `CHUNK`.
    """
    data = torch.tensor(differences, dtype=torch.float64)
    n, observed = len(data), data.mean().abs() * (1 - 1e-12)
    if n <= 14:
        bits = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1  # (2ⁿ, n)
        return float(((1 - 2.0 * bits.double()) @ data / n).abs().ge(observed).double().mean())
    source, larger = torch.Generator().manual_seed(seed), 0
    for _ in range(draws // CHUNK):
        signs = 1 - 2.0 * torch.randint(2, (CHUNK, n), generator=source).double()
        larger += int((signs @ data / n).abs().ge(observed).sum())
    return (larger + 1) / (draws // CHUNK * CHUNK + 1)  # the observed signs count as one draw


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error (0 for a single value)."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, 0.0
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (n - 1) / n)


def by_question(values: Values) -> list[float]:
    """Return the mean over the seeds of each question, in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for (question, _), value in values.items():
        groups.setdefault(question, []).append(value)
    return [sum(group) / len(group) for group in groups.values()]


def share(graded: Sequence[float]) -> list[float]:
    """Return [share of right answers, low, high] from one value per question.

    The interval is Wilson's. With several seeds the values are fractions, and the interval is a
    bootstrap over the questions, because seeds of one question are not independent questions.
    """
    if set(graded) <= {0.0, 1.0}:
        interval = wilson(int(sum(graded)), len(graded))
    else:
        interval = bootstrap(graded)[1:]
    return [sum(graded) / len(graded), *interval]


def paired(first: Values, second: Values, exact: bool = False) -> dict[str, Any] | None:
    """Return the paired difference first − second, over the (question, seed) pairs that both have.

    Returns None if there are none. The p-value comes from random signs. With `exact` it is
    McNemar's, if the values are right and wrong answers with one seed per question.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    pairs = by_question({key: first[key] - second[key] for key in common})
    mean, low, high = bootstrap(pairs)
    line = {"n": len(pairs), "mean": mean, "low": low, "high": high, "error": mean_error(pairs)[1]}
    line["first"] = sum(first[key] for key in common) / len(common)
    line["second"] = sum(second[key] for key in common) / len(common)
    if exact and set(pairs) <= {-1.0, 0.0, 1.0}:
        return line | {"p": mcnemar(pairs.count(1.0), pairs.count(-1.0))}
    return line | {"p": sign_flips(pairs)}


def p_value(line: Mapping[str, Any]) -> str:
    """Return the p-value of a paired difference as text."""
    return "p < 0.001" if line["p"] < 0.001 else f"p = {line['p']:.2g}"
