"""A rollout of a team under autograd, and the losses of a solution after it.

It runs `minimas.agents` itself, so that a link is trained on what `latent_mas` will do with it.
Only the KV cache is another one (`cache.GradCache`), and each question may have a team of its own.
Does not know: what is trained, where questions come from.

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
from minimas.results import finish
from minimas.text.tokenizer import PromptText
from tools.evaluation.last_turn import PrefillOnce, SharingRun
from tools.evaluation.rows import Row, kind_of

from .cache import GradCache

Align = Callable[[Tensor], Tensor]


class How(NamedTuple):
    """The settings of `latent_mas` that stay the same in a training."""

    team: Team
    latent_steps: int
    transfer: str = "full"
    layout: str | None = None
    max_new_tokens: int = 24
    once: PrefillOnce | None = None  # for rollouts whose first prompts are the same


class Scores(NamedTuple):
    """What the last agent predicts while it is given one solution."""

    logits: Tensor  # (T, V), at least float32
    ids: Tensor  # (T,)


@dataclass
class TeamsRun(LatentRun, SharingRun):
    """A run of `latent_mas` in which each question may have a team of its own.

    The teams differ in their prompts only. None: all have `team`.
    """

    teams: Sequence[Team] | None = None

    def layouts(self, team: Team) -> list[Layout]:
        """Return where the prompts of each question's team stand in the conversation."""
        if self.teams is None:
            return super().layouts(team)
        own = [super(TeamsRun, self).layouts(one.with_layout(team.layout)) for one in self.teams]
        return [layouts[q] for q, layouts in enumerate(own)]


def team_of(row: Row, how: How) -> Team:
    """Return a row's own team, else that of `how`."""
    return Team.from_dict(row["team"], f"{row['id']}: team") if "team" in row else how.team


def require_alike(rows: Sequence[Row], how: How) -> None:
    """Raise ValueError naming the first row that cannot share a batch with the row before it.

    It is also raised for a team that cannot have the layout of `how`.
    """
    kinds = {kind_of(row) for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"--data: found kinds {', '.join(sorted(kinds))}, expected one kind")
    expected = None
    for row in rows:
        found = shape(team_of(row, how).with_layout(how.layout))
        if expected not in (None, found):
            raise ValueError(
                f"--data: {row['id']}: team: found {found}, expected {expected}, as in the rows "
                "before: only prompts may differ"
            )
        expected = found


def shape(team: Team) -> Any:
    """Return what must be equal in all teams of a batch."""

    def fields(agent: Agent) -> tuple[int | None, bool]:
        return agent.latent_steps, agent.writes

    return team.parallel, team.layout, [fields(agent) for agent in team.agents]


def start_run(lm: LM, rows: Sequence[Row], how: How, align: Align) -> TeamsRun:
    """Return a run on `rows`; its cache is differentiable if gradients are enabled."""
    model = lm.model
    memory = None
    if torch.is_grad_enabled():
        memory = GradCache(model.config, 1, model.dtype, model.device)
    teams = [team_of(row, how) for row in rows]
    kind = kind_of(rows[0])
    return TeamsRun(
        lm,
        [row["question"] for row in rows],
        kind,
        [row["choices"] for row in rows] if kind == "choice" else None,
        Sampling(temperature=0.0, max_new_tokens=how.max_new_tokens),
        memory=memory,
        team=teams[0],
        latent_steps=how.latent_steps,
        align=align,
        transfer=how.transfer,
        layout=how.layout,
        once=how.once,
        teams=teams if any("team" in row for row in rows) else None,
    )


def last_turn(
    lm: LM, rows: Sequence[Row], how: How, align: Align, others: bool = False
) -> LastTurn:
    """Let every agent but the last work; returns the last one's turn.

    With `others` each question gets what the agents of the next question hand over, as with
    transfer "shuffled": a control.
    """
    run = start_run(lm, rows, how, align)
    working = run.shifted() if others or how.transfer == "shuffled" else run
    return run.last_turn(finish(hand_over(working)))


def solution_scores(turn: LastTurn, texts: Sequence[str]) -> Iterator[Scores]:
    """Yield what the last agent predicts for each question's text, as in `minimas.nll`.

    Uses the turn's cache up. Scores are computed question by question: (B, T, V) takes gigabytes.
    """
    hidden, cache = turn.prefill()  # (B, 1, D)
    model = turn.run.lm.model
    encode = turn.run.tokenizer.encode_turn
    # All of a text is untrusted: a control token in a solution stays text.
    ids = [torch.tensor(encode(PromptText.from_user(text))).to(model.device) for text in texts]
    fed = [row[:-1] for row in ids]  # the last token predicts nothing
    padded = pad_sequence(fed, batch_first=True)  # (B, T - 1)
    if padded.numel():
        counts = [len(row) for row in fed]
        hidden = torch.cat([hidden, model(model.embed(padded), cache, counts)], 1)
    for q, row in enumerate(ids):
        logits = model.logits(hidden[q : q + 1, : len(row)])[0]  # (T, V)
        yield Scores(logits.to(torch.promote_types(logits.dtype, torch.float32)), row)


def nll(lm: LM, rows: Sequence[Row], how: How, align: Align, others: bool = False) -> list[Tensor]:
    """Return the gold NLL of each token, one tensor (T,) per question."""
    turn = last_turn(lm, rows, how, align, others)
    scores = solution_scores(turn, [row["solution"] for row in rows])
    return [F.cross_entropy(logits, ids, reduction="none") for logits, ids in scores]


def divergence(
    lm: LM, rows: Sequence[Row], how: How, align: Align, others: bool = False
) -> list[Tensor]:
    """Return KL(with the prompts' cache ‖ as in `how`) at each token, (T,) per question.

    The teacher is the same team without thoughts, whose whole cache is handed over.
    """
    texts = [row["solution"] for row in rows]
    teacher = how._replace(latent_steps=0, transfer="full")
    with torch.no_grad():
        taught = [
            scores.logits.log_softmax(-1)
            for scores in solution_scores(last_turn(lm, rows, teacher, align), texts)
        ]
    found = solution_scores(last_turn(lm, rows, how, align, others), texts)
    return [
        F.kl_div(scores.logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
        for scores, wanted in zip(found, taught, strict=True)
    ]


OBJECTIVES: dict[str, Callable[..., list[Tensor]]] = {"nll": nll, "distill": divergence}


@torch.no_grad()
def answers(lm: LM, rows: Sequence[Row], how: How, align: Align) -> list[bool]:
    """Return whether each question is answered right, greedily."""
    results: list[Result] = finish(last_turn(lm, rows, how, align).answer())
    return [
        grade(kind_of(row), result.text, row["answer"], row.get("choices"))
        for row, result in zip(rows, results, strict=True)
    ]
