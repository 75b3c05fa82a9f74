"""Run a team up to its last agent, for tests of what that agent receives."""

from collections.abc import Sequence
from typing import Any

from minimas import LM
from minimas.agents import LastTurn, LatentRun, hand_over
from minimas.results import run_to_end


def last_turn(
    lm: LM, questions: Sequence[str], team: Any = "sequential", **options: Any
) -> LastTurn:
    run = LatentRun(lm, questions, team=team, **options)
    working = run.shifted() if run.transfer == "shuffled" else run
    return run.last_turn(run_to_end(hand_over(working)))
