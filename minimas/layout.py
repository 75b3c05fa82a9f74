"""Where the agents' prompts stand in the conversation: a chat turn for each agent, or one user turn for all of them.

    chat   system · user: P1 · assistant: ⟨thoughts⟩ · end of turn · system · user: P2 · assistant: ⟨thoughts⟩ · …
    turn   system · user: opening P1 ⟨thoughts⟩ P2 ⟨thoughts⟩ … Pn · assistant: (the last agent answers)

In layout "turn" no earlier assistant turn is empty, so the last agent has no empty answer to imitate (docs/results.md).
The part up to the opening is the *head*. Every cut of the KV cache keeps it, so that a paragraph always stands in
a well-formed user turn. Does not know: models, thoughts, the order in which agents work.
"""

from collections.abc import Sequence

from .teams import Team
from .tokenizer import Tokenizer, Turn

SEPARATOR = "\n\n"  # between two paragraphs


class ChatLayout:
    """Each agent's prompt is a chat turn of its own."""

    closes_turns = True

    def __init__(
        self, tokenizer: Tokenizer, team: Team, opening: str, prompts: Sequence[str]
    ) -> None:
        """`opening` and `prompts` are the team's and its agents', for one question, with everything filled in."""
        self.tokenizer, self.team, self.opening, self.prompts = tokenizer, team, opening, prompts

    def prompt(self, agent: int, first: bool) -> Turn:
        """Return the prompt of agent number `agent`; `first`: it is prefilled into an empty KV cache."""
        text = SEPARATOR.join(filter(None, [self.opening, self.prompts[agent]]))
        return self.tokenizer.turn(
            text, self.team.agents[agent].system, self.team.agents[agent].prefix
        )

    @property
    def head(self) -> Turn:
        """Return what the prompts of all agents have in common and hand-overs keep."""
        return Turn("")

    def head_tokens(self, agent: int) -> int:
        """Return how many tokens of the agent's prompt, prefilled into an empty KV cache, belong to the head."""
        return self.tokenizer.tokens_before(self.prompt(agent, first=True), len(self.head.text))


class TurnLayout(ChatLayout):
    """All prompts are paragraphs of one user turn. Thoughts follow a paragraph and precede the next one."""

    closes_turns = False

    def __init__(
        self, tokenizer: Tokenizer, team: Team, opening: str, prompts: Sequence[str]
    ) -> None:
        super().__init__(tokenizer, team, opening, prompts)
        parts = [opening]
        for prompt in prompts:
            parts += [SEPARATOR if any(parts) else "", prompt]
        last = team.agents[-1]
        before, opening_turn, *pairs = tokenizer.user_turn(parts, last.system, last.prefix)
        self._head = before + opening_turn
        self._paragraphs = pairs[
            1::2
        ]  # the last one with the end of the turn and the assistant header

    def prompt(self, agent: int, first: bool) -> Turn:
        paragraph = self._paragraphs[agent]
        if not first:
            return Turn(SEPARATOR) + paragraph
        return self._head + Turn(SEPARATOR if self.opening else "") + paragraph

    @property
    def head(self) -> Turn:
        return self._head


LAYOUTS: dict[str, type[ChatLayout]] = {"chat": ChatLayout, "turn": TurnLayout}
