"""Run a rollout of a team under autograd, and compute the losses of a solution after it.

The rollout calls `minimas.agents` itself, so that a link is trained on what `latent_mas` will do
with it. There are two differences: the KV cache is a `cache.GradCache`, and each question may have
its own team. This module does not depend on what is trained or where questions come from.

    B questions   T tokens of a solution   D hidden   V vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minimas import LM, Agent, Result, Sampling, Team
from minimas.agents import LastTurn, LatentRun, hand_over
from minimas.answers import grade
from minimas.layout import Layout
from minimas.results import run_to_end
from minimas.text.tokenizer import PromptText
from tools.evaluation.last_turn import PrefillOnce, SharingRun
from tools.evaluation.rows import Row, kind_of, own_team

from .cache import GradCache

Align = Callable[[Tensor], Tensor]


class TeamSettings(NamedTuple):
    """The settings of `latent_mas` that do not change during training."""

    team: Team
    latent_steps: int | None  # per agent; None: the agent's own, else the model's
    transfer: str = "full"
    layout: str | None = None
    max_new_tokens: int = 24
    once: PrefillOnce | None = None  # for rollouts with the same first prompts


class Scores(NamedTuple):
    """What the last agent predicts while it is given one solution."""

    logits: Tensor  # (T, V), at least float32
    ids: Tensor  # (T,)


@dataclass
class TeamsRun(LatentRun, SharingRun):
    """A run of `latent_mas` in which each question may have its own team.

    The teams differ only in their prompts. If `teams` is None, all questions have `team`.
    """

    teams: Sequence[Team] | None = None

    def layouts(self, team: Team) -> list[Layout]:
        """Return the layout of the prompts of each question's team."""
        if self.teams is None:
            return super().layouts(team)
        own = [super(TeamsRun, self).layouts(one.with_layout(team.layout)) for one in self.teams]
        return [layouts[q] for q, layouts in enumerate(own)]


def team_of(row: Row, settings: TeamSettings) -> Team:
    """Return a row's own team, or that of `settings` if it has none."""
    return own_team(row) if "team" in row else settings.team


def require_alike(rows: Sequence[Row], settings: TeamSettings) -> None:
    """Raise ValueError naming the first row that cannot share a batch with the row before it.

    A team that cannot have the layout of `settings` also raises ValueError.
    """
    kinds = {kind_of(row) for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"--data: found kinds {', '.join(sorted(kinds))}, expected one kind")
    expected = None
    for row in rows:
        found = shape(team_of(row, settings).with_layout(settings.layout))
        if expected not in (None, found):
            raise ValueError(
                f"--data: {row['id']}: team: found {found}, expected {expected}, as in the rows "
                "before it, because only prompts may differ"
            )
        expected = found


def shape(team: Team) -> Any:
    """Return what must be equal in all teams of a batch."""

    def fields(agent: Agent) -> tuple[int | None, bool]:
        return agent.latent_steps, agent.writes

    return team.parallel, team.layout, [fields(agent) for agent in team.agents]


def start_run(lm: LM, rows: Sequence[Row], settings: TeamSettings, align: Align) -> TeamsRun:
    """Return a run on `rows`, with a differentiable cache if gradients are enabled."""
    model = lm.model
    memory = None
    if torch.is_grad_enabled():
        memory = GradCache(model.config, 1, model.dtype, model.device)
    teams = [team_of(row, settings) for row in rows]
    kind = kind_of(rows[0])
    return TeamsRun(
        lm,
        [row["question"] for row in rows],
        kind,
        [row["choices"] for row in rows] if kind == "choice" else None,
        Sampling(temperature=0.0, max_new_tokens=settings.max_new_tokens),
        memory=memory,
        team=teams[0],
        latent_steps=settings.latent_steps,
        align=align,
        transfer=settings.transfer,
        layout=settings.layout,
        once=settings.once,
        teams=teams if any("team" in row for row in rows) else None,
    )


def last_turn(
    lm: LM, rows: Sequence[Row], settings: TeamSettings, align: Align, others: bool = False
) -> LastTurn:
    """Run every agent except the last one. Returns the last agent's turn.

    With `others`, each question gets what the agents of the next question hand over, as with
    transfer "shuffled". This is a control.
    """
    run = start_run(lm, rows, settings, align)
    working = run.shifted() if others or settings.transfer == "shuffled" else run
    return run.last_turn(run_to_end(hand_over(working)))


def solution_scores(turn: LastTurn, texts: Sequence[str]) -> Iterator[Scores]:
    """Yield what the last agent predicts for each question's text, as in `minimas.nll`.

    The turn's cache cannot be used again afterwards. Scores are computed question by question,
    because (B, T, V) would take gigabytes.
    """
    hidden, cache = turn.prefill_and_think()  # (B, 1, D)
    model = turn.run.lm.model
    encode = turn.run.tokenizer.encode_turn
    # The whole text is untrusted, so a control token in a solution stays text.
    ids = [torch.tensor(encode(PromptText.from_user(text))).to(model.device) for text in texts]
    fed = [row[:-1] for row in ids]  # the last token predicts nothing
    padded = pad_sequence(fed, batch_first=True)  # (B, T - 1)
    if padded.numel():
        counts = [len(row) for row in fed]
        hidden = torch.cat([hidden, model(model.embed(padded), cache, counts)], 1)
    for q, row in enumerate(ids):
        logits = model.logits(hidden[q : q + 1, : len(row)])[0]  # (T, V)
        yield Scores(logits.to(torch.promote_types(logits.dtype, torch.float32)), row)


def nll(
    lm: LM, rows: Sequence[Row], settings: TeamSettings, align: Align, others: bool = False
) -> list[Tensor]:
    """Return the gold NLL of each token, one tensor (T,) per question."""
    turn = last_turn(lm, rows, settings, align, others)
    scores = solution_scores(turn, [row["solution"] for row in rows])
    return [F.cross_entropy(logits, ids, reduction="none") for logits, ids in scores]


def divergence(
    lm: LM, rows: Sequence[Row], settings: TeamSettings, align: Align, others: bool = False
) -> list[Tensor]:
    """Return KL(teacher ‖ team) at each token, (T,) per question.

    The teacher is the same team without thoughts, which hands over its whole cache.
    """
    texts = [row["solution"] for row in rows]
    teacher = settings._replace(latent_steps=0, transfer="full")
    with torch.no_grad():
        taught = [
            scores.logits.log_softmax(-1)
            for scores in solution_scores(last_turn(lm, rows, teacher, align), texts)
        ]
    found = solution_scores(last_turn(lm, rows, settings, align, others), texts)
    return [
        F.kl_div(scores.logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
        for scores, wanted in zip(found, taught, strict=True)
    ]


OBJECTIVES: dict[str, Callable[..., list[Tensor]]] = {"nll": nll, "distill": divergence}


@torch.no_grad()
def answers(lm: LM, rows: Sequence[Row], settings: TeamSettings, align: Align) -> list[bool]:
    """Return whether the greedy answer to each question is right."""
    results: list[Result] = run_to_end(last_turn(lm, rows, settings, align).answer())
    return [
        grade(kind_of(row), result.text, row["answer"], row.get("choices"))
        for row, result in zip(rows, results, strict=True)
    ]
