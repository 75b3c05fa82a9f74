"""The moment before the last agent's turn, when all the others have worked.

This is the only file of tools/evaluation that uses how `minimas.agents` splits a call into the
others' work and the last agent's turn. Does not know: arms, rows, files.
"""

from collections.abc import Sequence
from typing import Any

import torch

from minimas import LM, KVCache, Qwen3, Tokenizer
from minimas.agents import Briefing, brief, brief_text
from minimas.nll import Loss, losses
from minimas.results import AgentTrace, Result
from minimas.teams import Agent, Team
from minimas.text.tokenizer import Turn
from minimas.turns import Shared

__all__ = ["LastTurn", "Shared", "latent_turn", "text_turn"]


def latent_turn(
    lm: LM, questions: Sequence[str], handed: "LastTurn | None" = None, **settings: Any
) -> "LastTurn":
    """Let every agent but the last work, as in `latent_mas`, which names the settings.

    With `handed` nobody works: the last agent gets that memory, a row per question. `shared` in the
    settings keeps first prompts that were prefilled, for other calls with the same questions.
    """
    given = None if handed is None else handed.briefing
    return LastTurn(brief(lm, questions, handed=given, **settings))


def text_turn(
    lm: LM, questions: Sequence[str], team: Team | str | None, **settings: Any
) -> "LastTurn":
    """Let every agent but the last work, as in `text_mas`; with `team` None as in `single`."""
    return LastTurn(brief_text(lm, questions, team, **settings))


class LastTurn:
    """The last agent, its prompts and the memory that it gets, a row per question.

    Use `answer` or `losses` once; the memory is used up.
    """

    def __init__(self, briefing: Briefing) -> None:
        run = briefing.run
        self.briefing = briefing
        self.model: Qwen3 = run.lm.model
        self.tokenizer: Tokenizer = run.tokenizer
        self.closing_tokens = len(run.closing)  # of the text that closes a turn
        self.memory: KVCache = briefing.memory
        self.prompts: list[Turn] = briefing.turns
        self.agent: Agent = briefing.agent
        self.latent_steps: int = briefing.steps

    def traces(self, question: int) -> list[AgentTrace]:
        """Return the traces of the agents that have worked on one question, in order."""
        count = len(self.prompts)
        return [trace for act, _ in self.briefing.acts for trace in act[question::count]]

    def answer(self) -> list[Result]:
        """Let the last agent answer."""
        return self.briefing.answer()

    def losses(
        self, texts: Sequence[Sequence[str]], memory: KVCache | None = None
    ) -> list[list[Loss]]:
        """Return the loss of each question's texts, as what the last agent would generate.

        `memory` replaces the memory that it gets.
        """
        briefing = self.briefing
        return losses(briefing if memory is None else briefing._replace(memory=memory), texts)


def slots(memory: KVCache) -> list[int]:
    """Return how many slots each row of a memory holds."""
    return [int(length) for length in torch.as_tensor(memory.lengths)]
