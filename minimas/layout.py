"""Where the agents' prompts stand in the conversation: a chat turn per agent, or one user turn.

    chat   system · user: P1 · assistant: ⟨thoughts⟩ · end of turn · system · user: P2 · …
    turn   system · user: opening P1 ⟨thoughts⟩ P2 ⟨thoughts⟩ … Pn · assistant: (last agent answers)

In layout "turn" there is no empty assistant turn before the last agent's, so the last agent has no
empty answer to imitate (docs/results.md). The part up to the opening is the *head*. Every cut of
the KV cache keeps the head, so that a paragraph always stands in a well-formed user turn. This
file does not know models, thoughts, or the order in which agents work.
"""

from collections.abc import Sequence

from .teams import Team
from .text.tokenizer import Tokenizer, Turn

SEPARATOR = "\n\n"  # between two paragraphs


class ChatLayout:
    """Each agent's prompt is a chat turn of its own.

    `head` is what the prompts of all agents have in common and what hand-overs keep.
    """

    closes_turns = True

    def __init__(
        self, tokenizer: Tokenizer, team: Team, opening: str, prompts: Sequence[str]
    ) -> None:
        """`opening` and `prompts` are those of the team for one question, completely filled in."""
        self.tokenizer, self.team, self.opening, self.prompts = tokenizer, team, opening, prompts
        self.head = Turn("")

    def prompt(self, agent: int, first: bool) -> Turn:
        """Return the prompt of agent number `agent`; `first`: the KV cache before it is empty."""
        text = SEPARATOR.join(filter(None, [self.opening, self.prompts[agent]]))
        role = self.team.agents[agent]
        return self.tokenizer.turn(text, role.system, role.prefix)

    def head_tokens(self, agent: int) -> int:
        """Return how many tokens of the agent's prompt, as the first one, belong to the head."""
        return self.tokenizer.tokens_before(self.prompt(agent, first=True), len(self.head.text))


class TurnLayout(ChatLayout):
    """All prompts are paragraphs of one user turn; an agent's thoughts follow its paragraph."""

    closes_turns = False

    def __init__(
        self, tokenizer: Tokenizer, team: Team, opening: str, prompts: Sequence[str]
    ) -> None:
        super().__init__(tokenizer, team, opening, prompts)
        parts = [opening]
        for prompt in prompts:
            parts += [SEPARATOR if any(parts) else "", prompt]
        # The last agent's prompt is that of a single agent: the opening, then its paragraph.
        again = opening + SEPARATOR if opening and len(prompts) > 1 else ""
        parts.insert(-1, again)
        last = team.agents[-1]
        before, first, *pieces = tokenizer.user_turn(parts, last.system, last.prefix)
        self.head = before + first
        *earlier, again_piece, final = pieces
        self._paragraphs = [*earlier[1::2], final]  # the last one ends with the assistant header
        self._later = [*earlier[1::2], again_piece + final]

    def prompt(self, agent: int, first: bool) -> Turn:
        if first:
            separator = Turn(SEPARATOR if self.opening else "")
            return self.head + separator + self._paragraphs[agent]
        return Turn(SEPARATOR) + self._later[agent]


LAYOUTS: dict[str, type[ChatLayout]] = {"chat": ChatLayout, "turn": TurnLayout}
