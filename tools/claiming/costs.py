"""Measure what an answer costs: seconds and tokens of a single agent, text agents, latent agents.

All methods answer the same questions in one run, batch by batch in a changing order, after a
warm-up. Prefilled tokens, thoughts and generated tokens are counted separately, whereas the paper
counts only generated tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tools.evaluation.arms import Arm
from tools.evaluation.figures import share_point

from .setting import FAILS, HOLDS, NOT_SHOWN, Finding, Record, Setting, run_arms, values

SINGLE = "single"
TEAMS = ("sequential", "hierarchical")
WORK = {"read": "prefilled", "thought": "thoughts", "written": "generated"}


def measure_speed(setting: Setting) -> Finding:
    """Return the seconds per question of each method, and their ratios, also by batch."""
    arms = measured(setting)
    ratios = {
        f"{team}: {other} / latent_mas": ratio(arms[name], arms[f"latent_mas, {team}"])
        for team in TEAMS
        for other, name in (("text_mas", f"text_mas, {team}"), (SINGLE, SINGLE))
    }
    said = []
    for team in TEAMS:
        text, alone = (ratios[f"{team}: {other} / latent_mas"] for other in ("text_mas", SINGLE))
        said.append(
            f"the {team} latent team is {text['ratio']:.2f} times as fast as text agents (batches "
            f"{text['low']:.2f} to {text['high']:.2f}) and {alone['ratio']:.2f} times as fast as a "
            "single agent"
        )
    sentence = "; ".join(said).capitalize() + "."
    against_text = [line for name, line in ratios.items() if "text_mas" in name]
    faster = all(line["low"] > 1 for line in against_text)
    slower = all(line["high"] < 1 for line in against_text)
    verdict = HOLDS if faster else FAILS if slower else NOT_SHOWN
    return Finding(sentence, verdict, {"arms": shown(arms), "ratios": ratios})


def measure_tokens(setting: Setting) -> Finding:
    """Return the tokens per question by method and kind, and how many fewer are generated."""
    arms = measured(setting)
    written = {name: mean(arm, "written") for name, arm in arms.items()}
    fewer = {
        f"{team}: than {other}": 1 - written[f"latent_mas, {team}"] / written[name]
        for team in TEAMS
        for other, name in (("text_mas", f"text_mas, {team}"), (SINGLE, SINGLE))
    }
    said = [
        f"{fewer[f'{team}: than text_mas']:.1%} fewer tokens than text agents and "
        f"{fewer[f'{team}: than {SINGLE}']:.1%} fewer than a single agent ({team})"
        for team in TEAMS
    ]
    total = {name: sum(mean(arm, what) for what in WORK) for name, arm in arms.items()}
    sentence = (
        f"The latent team generates {', and '.join(said)}; with prefilled tokens and thoughts, "
        f"the sequential team computes {total['latent_mas, sequential']:.0f} positions per "
        f"question, compared with {total['text_mas, sequential']:.0f} for text agents and "
        f"{total[SINGLE]:.0f} for a single agent."
    )
    verdict = HOLDS if all(fewer[f"{team}: than text_mas"] > 0 for team in TEAMS) else FAILS
    return Finding(sentence, verdict, {"arms": shown(arms), "fewer generated tokens": fewer})


def measured(setting: Setting) -> dict[str, list[Record]]:
    """Return the records of each method and team, all from one run."""
    bench = setting.bench(setting.rows(tiny=80, other=6))
    steps = setting.steps(most=20)
    arms = [Arm(SINGLE, method=SINGLE)]
    for team in TEAMS:
        arms.append(Arm(f"text_mas, {team}", method="text_mas", team=team))
        arms.append(
            Arm(
                f"latent_mas, {team}", team=team, latent_steps=steps, align="ridge", transfer="full"
            )
        )
    found = run_arms(bench, arms, warm_up=True)
    return {arm.name: [record for record in found if record["arm"] == arm.name] for arm in arms}


def shown(arms: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Return each arm's means per question, and the share of right answers."""
    return {
        name: {what: mean(records, what) for what in (*WORK, "seconds")}
        | {"right": share_point(values(records, "correct"))}
        for name, records in arms.items()
    }


def mean(records: Sequence[Record], field: str) -> float:
    """Return the mean of a field."""
    return sum(float(record[field]) for record in records) / len(records)


def ratio(first: Sequence[Record], second: Sequence[Record]) -> dict[str, float]:
    """Return the ratio of two arms' seconds, and the lowest and highest ratio of a batch."""
    by_batch = []
    for batch in {record["batch"] for record in first}:
        own, other = (
            sum(r["seconds"] for r in records if r["batch"] == batch) for records in (first, second)
        )
        by_batch.append(own / other)
    whole = mean(first, "seconds") / mean(second, "seconds")
    return {"ratio": whole, "low": min(by_batch), "high": max(by_batch), "batches": len(by_batch)}
