"""Measure what thoughts cost: FLOPs and seconds, by thoughts m and prompt tokens t.

torch counts the FLOPs on a model of the same shape. Unless the model is weights/tiny, its copy has
no values (device "meta"), so that any size is counted within a minute. Seconds are measured on the
model itself. According to the paper, an agent costs O((d² m + d m² + d t m) L). Two formulas are
fitted to the counts: one with these three terms, and one with the two terms of the prefill as well,
d² t and d t².

    t prompt tokens   m thoughts or generated tokens   d hidden size   L layers
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minimas import Config, Qwen3

from .setting import FAILS, HOLDS, Finding, Setting

PROMPTS = (16, 64, 256, 1024)
TIMED_PROMPTS = (16, 64, 256)
THOUGHTS = (0, 5, 10, 20, 40)
USUAL = (256, 40)  # t and m in the sentence: a usual prompt, and as many thoughts as in the paper
PAPER = ("m", "m²", "t m")
PREFILL = ("t", "t²")
Grid = dict[tuple[int, int], float]  # (t, m) -> FLOPs or seconds


def measure(setting: Setting) -> Finding:
    """Return counts, seconds and fitted exponents, for thoughts and for generated text."""
    model = setting.lm.model
    config = model.config
    with torch.device("cpu" if setting.is_tiny else "meta"):
        shape = Qwen3(config)
    counts = {name: flops(shape, PROMPTS, name == "text") for name in ("thoughts", "text")}
    seconds = timed(model, TIMED_PROMPTS, repeats=3 if setting.is_tiny else 1)
    grid = counts["thoughts"]
    fits = {
        "paper's terms": fit(grid, config, PAPER),
        "with the prefill": fit(grid, config, (*PAPER, *PREFILL)),
    }
    t, m = USUAL
    share = grid[t, 0] / grid[t, m]
    # The number of generated tokens that, according to the paper, m thoughts stand for.
    tokens = m * config.hidden_size / math.log2(config.vocab_size)
    text = cost_of_tokens(counts["text"], t, m, tokens)
    exponents = {
        "FLOPs by m": exponent({m: grid[t, m] - grid[t, 0] for m in THOUGHTS[1:]}),
        "FLOPs by t": exponent({t: grid[t, 0] for t in PROMPTS}),
        "seconds by m": exponent(
            {n: seconds["thoughts"][t, n] - seconds["thoughts"][t, 0] for n in THOUGHTS[1:]}
        ),
        "seconds by t": exponent({t: seconds["thoughts"][t, 0] for t in TIMED_PROMPTS}),
    }
    error, whole = (fits[name]["worst error"] for name in fits)
    sentence = (
        f"The paper's three terms differ from the counted FLOPs by up to {error:.0%}, and by at "
        f"most {whole:.1e} together with the two terms of the prefill, which takes {share:.0%} of "
        f"the FLOPs at t = {t} and m = {m}. FLOPs grow as m^{exponents['FLOPs by m']:.2f} and "
        f"t^{exponents['FLOPs by t']:.2f}, seconds as m^{exponents['seconds by m']:.2f} and "
        f"t^{exponents['seconds by t']:.2f}; {m} generated tokens cost "
        f"{counts['text'][t, m] / grid[t, m]:.2f} times the FLOPs of {m} thoughts, and the "
        f"{tokens:.0f} tokens for which these thoughts stand in the paper cost "
        f"{text / grid[t, m]:.1f} times as much."
    )
    figures = {
        "counted FLOPs": listed(counts),
        "measured seconds": listed(seconds),
        "fits": fits,
        "exponents": exponents,
        "prefill's share": {str(n): grid[n, 0] / grid[n, m] for n in PROMPTS},
        "tokens that the paper counts for the thoughts": tokens,
        "usual": {"t": t, "m": m},
    }
    return Finding(sentence, HOLDS if error < 0.05 else FAILS, figures)


def work(model: Qwen3, t: int, text: bool) -> Iterator[int]:
    """Prefill t positions, then think or generate greedily. Yields each m in `THOUGHTS`."""
    cache, D = model.new_cache(1), model.config.hidden_size
    x = torch.zeros(1, t, D, dtype=model.dtype, device=model.device)
    matrix = torch.zeros(D, D, dtype=model.dtype, device=model.device)  # in place of W_a
    hidden = model(x, cache)[:, -1:]
    for done in range(THOUGHTS[-1] + 1):
        if done in THOUGHTS:
            yield done
        step = model.embed(model.logits(hidden).argmax(-1)) if text else hidden @ matrix
        hidden = model(step, cache)


def flops(model: Qwen3, prompts: Sequence[int], text: bool) -> Grid:
    """Return the counted FLOPs for each t in `prompts` and each m in `THOUGHTS`."""
    found: Grid = {}
    for t in prompts:
        # torch does not count the fused attention of a CPU, but it counts separate operations.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            for m in work(model, t, text):
                found[t, m] = counter.get_total_flops()
        print(f"claims: counted t = {t}", file=sys.stderr)
    return found


def timed(model: Qwen3, prompts: Sequence[int], repeats: int) -> dict[str, Grid]:
    """Return the shortest time of several runs in seconds, for thoughts and for text.

    A warm-up comes before the runs, and runs of thoughts and of text take turns. On a CPU,
    processor time is measured, because other work does not lengthen it.
    """
    on_gpu = model.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    found: dict[str, Grid] = {"thoughts": {}, "text": {}}
    for name in found:
        next(work(model, prompts[0], name == "text"))
    for _, t, name in itertools.product(range(repeats), prompts, found):
        grid, start = found[name], clock()
        for m in work(model, t, name == "text"):
            if on_gpu:
                torch.cuda.synchronize(model.device)
            grid[t, m] = min(grid.get((t, m), math.inf), clock() - start)
    return found


def fit(grid: Grid, config: Config, names: Sequence[str]) -> dict[str, Any]:
    """Return the coefficients of a formula's terms, and its largest relative error on the grid.

    A term includes the paper's factors of d and L. The fit minimizes relative errors, so that small
    FLOP counts weigh as much as large ones.
    """
    d, L = config.hidden_size, config.num_hidden_layers
    terms: dict[str, Callable[[int, int], float]] = {
        "m": lambda t, m: d * d * m * L,
        "m²": lambda t, m: d * m * m * L,
        "t m": lambda t, m: d * t * m * L,
        "t": lambda t, m: d * d * t * L,
        "t²": lambda t, m: d * t * t * L,
    }
    # Without thoughts every term of the paper is 0, so no coefficients could fit.
    used = {place: flops for place, flops in grid.items() if place[1]}
    rows = [[terms[name](*place) / count for name in names] for place, count in used.items()]
    a = torch.tensor(rows, dtype=torch.float64)
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    scale = a.norm(dim=0)
    found: Tensor = torch.linalg.lstsq(a / scale, ones, driver="gelsd").solution[:, 0] / scale
    errors = (a @ found - 1).abs()
    coefficients = dict(zip(names, found.tolist(), strict=True))
    return {"coefficients": coefficients, "worst error": float(errors.max())}


def exponent(points: dict[int, float]) -> float:
    """Return the slope of log y over log x by least squares. Points with y ≤ 0 are left out."""
    pairs = [(math.log(x), math.log(y)) for x, y in points.items() if y > 0]
    if len(pairs) < 2:
        return math.nan
    xs, ys = zip(*pairs, strict=True)
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    return float(slope / sum((x - mean_x) ** 2 for x in xs))


def cost_of_tokens(grid: Grid, t: int, m: int, tokens: float) -> float:
    """Return the FLOPs of more generated tokens than were counted, extrapolated from the counts.

    The curve over m is quadratic: each step costs the same, plus a little more for each slot.
    """
    a, b, c = (grid[t, n] for n in (0, m // 2, m))
    half = m / 2
    second = (c - 2 * b + a) / (half * half)  # twice the coefficient of m²
    first = (b - a) / half - second * half / 2
    return a + first * tokens + second * tokens * tokens / 2


def listed(grids: dict[str, Grid]) -> dict[str, list[dict[str, float]]]:
    """Return grids as JSON values."""
    return {
        name: [{"t": t, "m": m, "value": value} for (t, m), value in sorted(grid.items())]
        for name, grid in grids.items()
    }
