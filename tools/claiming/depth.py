"""Measure how many thoughts help: accuracy or gold NLL by the number of thoughts per agent."""

from tools.evaluation import figures
from tools.evaluation.arms import grid
from tools.evaluation.figures import Point
from tools.evaluation.stats import p_value, paired

from .setting import FAILS, HOLDS, NOT_SHOWN, Finding, Setting, run_arms, values

TINY_STEPS = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 40, 80)
STEPS = (0, 2, 5, 10, 20, 40, 80)
PAPER = range(40, 81)  # where the paper finds the best number of thoughts


def measure(setting: Setting) -> Finding:
    """Return the curve over 0 to 80 thoughts per agent, and the best number of thoughts.

    The curve is that of accuracy for weights/tiny, and that of the gold NLL for other models, which
    needs no generated text. The best number of thoughts is chosen and tested on the same questions,
    so its p-value is optimistic.
    """
    metric = "accuracy" if setting.is_tiny else "nll"
    field, sign = ("correct", 1) if setting.is_tiny else ("nll", -1)
    counts = TINY_STEPS if setting.is_tiny else STEPS
    arms = grid(
        method=["latent_mas"], metric=[metric], latent_steps=counts, align=["ridge"],
        transfer=["full"],
    )  # fmt: skip
    bench = setting.bench(setting.rows(tiny=100, other=6))
    records = run_arms(bench, arms)
    by_count = {n: values(records, field, latent_steps=n) for n in counts}
    means = {n: sum(found.values()) / len(found) for n, found in by_count.items()}
    best = max(counts, key=lambda n: sign * means[n])
    figure = figures.steps(records)
    most = counts[-1]
    said, zero, last = (
        f"{means[n]:.1%} right" if setting.is_tiny else f"a gold NLL of {means[n]:.3f}"
        for n in (best, 0, most)
    )
    against_last = paired(by_count[best], by_count[most], exact=setting.is_tiny)
    against_zero = paired(by_count[best], by_count[0], exact=setting.is_tiny)
    assert against_last and against_zero
    sentence = (
        f"{best} thoughts per agent are best, with {said}, compared with {zero} without thoughts "
        f"({p_value(against_zero)}) and {last} with {most} thoughts ({p_value(against_last)})."
    )
    helps = best > 0 and against_zero["p"] < 0.05
    figure.pop("what")
    figure |= {"best": best, "means": means, "best − most": against_last, "best − 0": against_zero}
    return Finding(sentence, verdict(best, helps, against_last), figure)


def verdict(best: int, helps: bool, against_last: Point) -> str:
    """Return the verdict: whether thoughts help, with a best number in the range of the paper."""
    if not helps:
        return NOT_SHOWN if best else FAILS
    if best in PAPER:
        return HOLDS
    return FAILS if against_last["p"] < 0.05 else NOT_SHOWN
