"""Measure how errors spread: a wrong plan is injected at the first agent, by text or by thoughts.

The first number of a question is changed, and the first agent plans for the changed question, once
in text and once in thoughts. In the team's work on the original question, the plan then replaces
that agent's text or, embedding by embedding, its thoughts. Everything else, including the first
agent's prompt, comes from the original question. So both channels carry the same mistake.

    flips       of the questions that the team answers right without a plan, the share that it then
                answers wrong
    recovers    the share of them that it still answers right
    follows     the share of them whose answer is that of the changed question

This is done with the whole team, and with a team of only the first and the last agent, in which no
agent in between can repair the plan. As a control, an agent's own plan is injected in the same way.
It must not change any answer.

    B questions   n thoughts   D hidden
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minimas import Result, Team, latent_mas, single, text_mas
from minimas.agents import choose_team, hand_over_text
from minimas.core.rollout import Align
from minimas.results import Events, run_to_end
from minimas.text.generate import GeneratedText
from minimas.turns import Run, TurnResult
from tools.evaluation.grading import plain_grader
from tools.evaluation.probe import Tap
from tools.evaluation.rows import Row, kind_of, option_of
from tools.evaluation.stats import mcnemar, wilson

from .setting import FAILS, HOLDS, NOT_SHOWN, Finding, Setting, first_and_last

Outcome = dict[str, Any]  # of one question
ARMS = ("clean", "own plan", "wrong plan")
CHANNELS = ("text", "thoughts")
WHOLE, PAIR = "the whole team", "a team of the first and last agent"


def measure(setting: Setting) -> Finding:
    """Return flip and recovery rates of both channels, and McNemar's test between them."""
    rows = [row for row in setting.rows(tiny=100, other=6) if changed(row["question"])]
    whole = choose_team(setting.lm, "sequential")
    teams: dict[str, Any] = {}
    for name, team in ((WHOLE, whole), (PAIR, first_and_last(whole))):
        found: list[Outcome] = []
        for start in range(0, len(rows), setting.batch_size):
            found += outcomes(setting, rows[start : start + setting.batch_size], team)
        # If the changed question has the same answer, the plan is not wrong.
        found = [one for one in found if one["wrong answer"] not in (None, one["gold"])]
        if not found:
            expected = "expected questions whose answers change with their first number"
            raise ValueError(f"data (--data): found no wrong plan, {expected}")
        rates = {channel: rates_of(found, channel) for channel in CHANNELS}
        teams[name] = {"rates": rates, "paired": paired(found)}
    said = "; ".join(
        f"in {name}, {one['rates']['text']['flips']:.1%} by text and "
        f"{one['rates']['thoughts']['flips']:.1%} by thoughts (on {one['paired']['n']} questions, "
        f"{one['paired']['only text']} recoveries only by text and "
        f"{one['paired']['only thoughts']} only by thoughts; McNemar p = {one['paired']['p']:.2g})"
        for name, one in teams.items()
    )
    sentence = f"A wrong plan of the first agent makes right answers wrong: {said}."
    of_whole = teams[WHOLE]["paired"]
    better = of_whole["only thoughts"] > of_whole["only text"]
    verdict = NOT_SHOWN if of_whole["p"] >= 0.05 else HOLDS if better else FAILS
    return Finding(sentence, verdict, {"questions": len(found), "teams": teams})


def paired(found: Sequence[Outcome]) -> dict[str, Any]:
    """Return McNemar's test over the questions that both channels answer right without a plan."""
    both = [one for one in found if all(one[channel]["clean"] for channel in CHANNELS)]
    right = [tuple(one[channel]["wrong plan"] for channel in CHANNELS) for one in both]
    text, thoughts = right.count((True, False)), right.count((False, True))
    p = mcnemar(text, thoughts)
    return {"n": len(both), "only text": text, "only thoughts": thoughts, "p": p}


def rates_of(found: Sequence[Outcome], channel: str) -> dict[str, Any]:
    """Return the rates of one channel, with intervals.

    They are shares of the questions that the channel answers right without an injected plan.
    """
    clean = [one[channel] | {"gold": one["gold"]} for one in found if one[channel]["clean"]]
    n, recovered = len(clean), sum(one["wrong plan"] for one in clean)
    follows = sum(one["follows"] for one in clean)
    control = sum(one[channel]["own plan"] != one[channel]["clean"] for one in found)
    return {
        "right when clean": [n, len(found)],
        "recovers": recovered / n if n else 0.0,
        "recovers, 95 %": list(wilson(recovered, n)),
        "flips": (n - recovered) / n if n else 0.0,
        "flips, 95 %": list(wilson(n - recovered, n)),
        "follows": follows / n if n else 0.0,
        "follows, 95 %": list(wilson(follows, n)),
        "own plan changes": control,
    }


def changed(question: str) -> str | None:
    """Return a question with another first number, or None if it has no number."""
    found = re.search(r"\d+", question)
    if found is None:
        return None
    number = int(found[0])
    other = number + 1 if number < 8 else number - 1  # the tiny task begins with 2 to 8
    return question[: found.start()] + str(other) + question[found.end() :]


def outcomes(setting: Setting, rows: Sequence[Row], team: Team) -> list[Outcome]:
    """Return whether answers are right with and without a plan, for each question and channel."""
    lm, kind = setting.lm, kind_of(rows[0])
    questions = [row["question"] for row in rows]
    wrong = [str(changed(question)) for question in questions]
    shared: dict[str, Any] = {"kind": kind, "sampling": setting.sampling}
    shared["choices"] = [row.get("choices") for row in rows]
    answers = [result.answer for result in single(lm, wrong, **shared)]

    pair = first_and_last(team)
    plans = [result.agents[0].text for result in text_mas(lm, wrong, team=pair, **shared)]
    clean_text = text_mas(lm, questions, team=team, **shared)
    own_plans = [result.agents[0].text for result in clean_text]

    def by_text(given: Sequence[str]) -> list[Result]:
        run = ForcedRun(lm, questions, **shared, plans=list(given))
        return run_to_end(run_to_end(hand_over_text(run, team)).answer())

    steps, align = setting.steps(most=20), lm.aligner("ridge")
    thinking = shared | {"latent_steps": steps}
    tap, own = Tap(align), Tap(align)
    latent_mas(lm, wrong, team=pair, align=tap, **thinking)
    clean_latent = latent_mas(lm, questions, team=team, align=own, **thinking)

    def by_thoughts(given: Tap) -> list[Result]:
        first = torch.cat(given.thoughts[:steps], 1)  # (B, n, D)
        return latent_mas(lm, questions, team=team, align=Forced(first, align), **thinking)

    results = {
        "text": (clean_text, by_text(own_plans), by_text(plans)),
        "thoughts": (clean_latent, by_thoughts(own), by_thoughts(tap)),
    }
    found: list[Outcome] = []
    for q, row in enumerate(rows):
        gold = option_of(row["answer"], row["choices"]) if row.get("choices") else row["answer"]
        one: Outcome = {"gold": gold, "wrong answer": answers[q]}
        for channel, arms in results.items():
            right = [bool(plain_grader(row, given[q].text)) for given in arms]
            one[channel] = dict(zip(ARMS, right, strict=True))
            one[channel]["follows"] = arms[-1][q].answer == answers[q]
        found.append(one)
    return found


@dataclass
class ForcedRun(Run):
    """A run of `text_mas` whose first agent generates the given texts, one per question."""

    plans: list[str] = field(default_factory=list)

    def turn(self, *args: Any, **options: Any) -> Events[TurnResult]:
        """Take one turn. The first turn ends with the given texts."""
        plans = list(self.plans)
        self.plans.clear()  # in place: every agent takes its turn on a copy of the run
        options["decodes"] = not plans
        result = yield from super().turn(*args, **options)
        if not plans:
            return result
        outputs = [GeneratedText(plan, self.tokenizer.encode(plan), "stop") for plan in plans]
        return result._replace(outputs=outputs)


class Forced:
    """A map that returns given thoughts (B, n, D) first, and then the results of `align`."""

    def __init__(self, thoughts: Tensor, align: Align) -> None:
        self.given, self.align = list(thoughts.split(1, 1)), align

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map (B, 1, D) to (B, 1, D)."""
        return self.given.pop(0) if self.given else self.align(hidden)
