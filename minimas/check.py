"""Measure a hand-over on built-in questions: `python -m minimas check MODEL`.

The last agent of a team answers in four settings: without a KV cache, with the cache of the other
agents' prompts, and with the cache of prompts and latent thoughts from each of two maps. These are
the paper's map ("ridge") and the one that leaves out the final norm's gain ("prenorm"). Two things
are measured on six built-in questions: the loss of a worked solution (see `nll`), and the length of
the first 24 tokens of the answers. A harmful cache shows in at least one of them: garbled states
raise the loss, and a bare number in place of reasoning is short.

Six questions show only large effects, and 24 tokens do not show whether long answers get shorter.
`tools/evaluate.py --audit` measures the same on your own data.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import sub
from statistics import fmean, stdev
from typing import Any, NamedTuple

from .agents import LatentRun, choose_team, hand_over
from .load import LM
from .nll import losses_after
from .results import OnEvent, run_to_end
from .text.generate import Sampling

STEPS = 10  # latent steps per agent: enough for a harmful map to show its effect
MAX_NEW_TOKENS = 24  # an answer with reasoning is longer, a bare number is shorter
HARM = 0.02  # nats per token; a smaller rise of the loss is not called harm
SHORT = 0.6  # share of the length without a cache; a shorter answer has lost its reasoning
T_95 = 2.571  # Student's t, two-sided 95 %, for six questions

# Questions, each with a worked solution on the next line.
TEXT = """\
A baker makes 6 trays of 9 rolls and sells 38 of the rolls. How many rolls are left?
The baker makes 6 × 9 = 54 rolls. After selling 38, there are 54 − 38 = 16 rolls left. \\boxed{16}

A train ticket costs 14 dollars, and a child pays half. What do two adults and \
three children pay?
A child pays 14 / 2 = 7 dollars. Two adults pay 2 × 14 = 28 dollars and three children \
3 × 7 = 21 dollars. Together that is 28 + 21 = 49 dollars. \\boxed{49}

A tank holds 240 liters. It is a quarter full, and a pump adds 15 liters a minute. After \
how many minutes is it full?
The tank contains 240 / 4 = 60 liters, so 240 − 60 = 180 liters are missing. The pump \
needs 180 / 15 = 12 minutes. \\boxed{12}

Liam has three times as many stamps as Mia. Together they have 84 stamps. How many stamps \
does Liam have?
If Mia has x stamps, Liam has 3x, and 4x = 84. So x = 84 / 4 = 21, and Liam has 3 × 21 = \
63 stamps. \\boxed{63}

A jacket costs 80 dollars. Its price is cut by 25 %, and then 6 dollars are added for \
shipping. What does it cost now?
The cut is 80 × 0.25 = 20 dollars, so the jacket costs 80 − 20 = 60 dollars. With \
shipping it is 60 + 6 = 66 dollars. \\boxed{66}

A farm has 5 fields with 48 apple trees each. A storm breaks 1 tree in 8. How many trees \
are still standing?
There are 5 × 48 = 240 trees. The storm breaks 240 / 8 = 30 of them. 240 − 30 = 210 trees \
are still standing. \\boxed{210}"""

QUESTIONS = [pair.split("\n") for pair in TEXT.split("\n\n")]
ASKED, SOLUTIONS = zip(*QUESTIONS, strict=True)
GREEDY = Sampling(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass
class ArmReport:
    """The measurements of one setting.

    `nll` is in nats per token of the solution, and `difference` is its difference from "prompts
    only". `tokens` is the mean length of an answer, `ended` the share that ended before the limit.
    """

    name: str
    nll: float
    difference: Interval | None
    tokens: float
    ended: float


@dataclass
class Report:
    """The outcome of a check; `verdict` is one sentence, `command` the recommended command line."""

    model: str
    layout: str
    latent_steps: int
    max_new_tokens: int
    questions: int
    arms: list[ArmReport]
    verdict: str
    command: str

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        lines = [
            f"{self.questions} built-in questions, sequential team, layout {self.layout}, "
            f"{self.latent_steps} latent steps per agent, at most {self.max_new_tokens} generated "
            "tokens",
            f"{'last agent gets':<24}{'gold NLL':>9}  {'− prompts only, 95 %':<26} tokens  ended",
        ]
        for arm in self.arms:
            lines.append(
                f"{arm.name:<24}{arm.nll:>9.3f}  {arm.difference or ''!s:<26}"
                f"{arm.tokens:>7.1f}{arm.ended:>7.0%}"
            )
        return [*lines, self.verdict, f"recommended: {self.command}"]


def check(
    lm: LM,
    layout: str | None = None,
    latent_steps: int = STEPS,
    on_event: OnEvent | None = None,
) -> Report:
    """Measure what hand-overs in the sequential team do to the last agent's greedy answers.

    `layout=None` is the team's own. A check takes two minutes for 0.5B parameters on two CPU cores.
    Raises ValueError for a model without a tokenizer, or one whose context is too short.
    """
    team = choose_team(lm, "sequential").with_layout(layout)
    settings: dict[str, Any] = {
        "no cache": {"latent_steps": 0, "team": replace(team, agents=team.agents[-1:])},
        "prompts only": {"latent_steps": 0},
        f"{latent_steps} thoughts, ridge": {"align": "ridge"},
        f"{latent_steps} thoughts, prenorm": {"align": "prenorm"},
    }
    how = {"sampling": GREEDY, "team": team, "latent_steps": latent_steps}
    found = {
        name: _measure(LatentRun(lm, ASKED, "math", **how | own), on_event)
        for name, own in settings.items()
    }
    base, _ = found["prompts only"]
    arms = []
    for name, (nlls, tokens) in found.items():
        difference = None if nlls is base else interval(list(map(sub, nlls, base)))
        ended = fmean(count < MAX_NEW_TOKENS for count in tokens)
        arms.append(ArmReport(name, fmean(nlls), difference, fmean(tokens), ended))
    verdict, flags = judge(team.layout, latent_steps, arms)
    return Report(
        lm.model.name,
        team.layout,
        latent_steps,
        MAX_NEW_TOKENS,
        len(ASKED),
        arms,
        verdict,
        f"python -m minimas ask --model {shlex.quote(lm.model.name)} {flags}QUESTION",
    )


def _measure(run: LatentRun, on_event: OnEvent | None) -> tuple[list[float], list[int]]:
    """Return the loss of each solution, and the number of tokens of each answer."""
    hidden, cache = run.last_turn(run_to_end(hand_over(run), on_event)).prefill_and_think()
    losses = losses_after(run, hidden, cache, SOLUTIONS)
    answers = run_to_end(run.decode(hidden, cache, [[]] * len(ASKED)))
    return [loss.mean for loss in losses], [len(answer.ids) for answer in answers]


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of six paired differences with Student's 95 % interval."""
    mean = fmean(values)
    error = T_95 * stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - error, mean + error)


def judge(layout: str, latent_steps: int, arms: Sequence[ArmReport]) -> tuple[str, str]:
    """Return the verdict in one sentence, and the flags of the recommended command line."""
    alone, prompts, *mapped = arms
    sample = f"On {len(QUESTIONS)} questions in layout {layout}:"
    shortest = SHORT * alone.tokens
    lengths = f"{prompts.tokens:.0f} tokens with the prompts' cache, {alone.tokens:.0f} without"
    if prompts.tokens < shortest:
        return (
            f"{sample} the cache of the prompts alone makes answers short ({lengths}), "
            "so their reasoning is lost.",
            "--layout turn " if layout == "chat" else "--method single ",
        )
    said = f"{sample} answers do not shrink to a bare number ({lengths}, at most {MAX_NEW_TOKENS})"
    harms = []
    for name, arm in zip(("the paper's map", "prenorm"), mapped, strict=True):
        rise: Any = arm.difference  # only "prompts only" has none
        harms.append(arm.tokens < shortest or (rise.low > 0 and rise.mean > HARM))
        said += (
            f"; {name} {'hurts' if harms[-1] else 'shows no harm'} "
            f"({rise} nats per token, {arm.tokens:.0f} tokens)"
        )
    flags = f"--layout {layout} --latent-steps {0 if all(harms) else latent_steps} "
    return f"{said}.", flags + "--align prenorm " * (harms == [True, False])
