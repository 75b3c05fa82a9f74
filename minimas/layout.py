"""Where the agents' prompts go in the conversation: a chat turn per agent, or one user turn.

    chat   system · user: opening P1 · assistant: ⟨thoughts⟩ · user: opening P2 · …
    turn   system · user: opening P1 ⟨thoughts⟩ P2 ⟨thoughts⟩ … opening Pn · assistant: …

Without the thoughts, all prompts of a team, one after the other, are the conversation exactly as
the chat template renders it. A template that makes this impossible raises an error. In layout
"turn" there is no empty assistant turn before the last agent's, so the last agent has no empty
answer to imitate (docs/results.md).

In layout "turn", the system message, the user header and the first opening are the *preamble*.
Every transfer keeps it in the KV cache except "none", after which the next prompt begins with it.
So a paragraph is always inside a user turn. This file does not depend on models, thoughts, or the
order in which agents work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .teams import Team
from .text.tokenizer import PromptText, Tokenizer

SEPARATOR = "\n\n"  # between two paragraphs


@dataclass
class Layout:
    """Layout "chat", the base class: each agent's prompt is a chat turn of its own.

    `opening` and `prompts` are the team's, completely filled in for one question. `preamble` is the
    beginning that a transfer always keeps. Here it is empty, because every chat turn repeats the
    opening. `continues` means that a conversation comes before the first agent's prompt, and
    `closes_turns` that an earlier agent's turn is closed before the hand-over.
    """

    tokenizer: Tokenizer
    team: Team
    opening: str
    prompts: Sequence[str]
    continues: bool = False
    closes_turns = True
    preamble = PromptText("")

    def prompt(self, agent: int, first: bool) -> PromptText:
        """Return the prompt of agent number `agent`, -1 for the last.

        It is `first` if nothing is handed over to it, so that it begins the conversation or follows
        the memory.
        """
        text = user_text(self.opening, self.prompts[agent])
        role = self.team.agents[agent]
        last = len(self.prompts[agent:]) == 1
        return self.tokenizer.turn(
            text, role.system, role.prefix, first and not self.continues, last
        )

    def preamble_ids(self, agent: int) -> list[int]:
        """Return the ids of the preamble, as tokenized within the agent's prompt if it is first."""
        return [
            token
            for token, start, _ in self.tokenizer.tokens(self.prompt(agent, first=True))
            if start < len(self.preamble.text)
        ]


@dataclass
class TurnLayout(Layout):
    """Layout "turn": prompts are paragraphs of one user turn, each followed by its thoughts."""

    closes_turns = False

    def __post_init__(self) -> None:
        *earlier, last = self.prompts
        # Opening, separator, paragraph 0, separator, paragraph 1, … The last paragraph begins with
        # the opening again, like a single agent's prompt.
        parts = [self.opening, self.opening and SEPARATOR]
        for paragraph in [*earlier, user_text(self.opening, last) if earlier else last]:
            parts += [paragraph, SEPARATOR]
        role = self.team.agents[-1]
        header, opening, *pieces = self.tokenizer.user_turn(
            parts[:-1], role.system, role.prefix, not self.continues
        )
        self.preamble = header + opening
        # Separator i comes before paragraph i. The last paragraph includes the end of the user turn
        # and the header of the answer.
        self._separators = pieces[::2]
        self._paragraphs = pieces[1::2]

    def prompt(self, agent: int, first: bool) -> PromptText:
        paragraph = self._paragraphs[agent]
        if not first:
            return self._separators[agent] + paragraph
        if paragraph is self._paragraphs[-1]:
            return super().prompt(agent, first)  # it has the opening already
        return self.preamble + self._separators[0] + paragraph


def user_text(opening: str, prompt: str) -> str:
    """Return the text of a user message: the opening, if there is one, and an agent's prompt."""
    return SEPARATOR.join(filter(None, [opening, prompt]))
