"""Where the agents' prompts stand in the conversation: a chat turn for each agent, or one user turn for all of them.

    chat   system · user: P1 · assistant: ⟨thoughts⟩ · end of turn · system · user: P2 · assistant: ⟨thoughts⟩ · …
    turn   system · user: opening P1 ⟨thoughts⟩ P2 ⟨thoughts⟩ … Pn · assistant: (the last agent answers)

In layout "turn" no earlier assistant turn is empty, so the last agent has no empty answer to imitate (docs/results.md).
The part up to the opening is the *head*. Every cut of the KV cache keeps it, so that a paragraph always stands in
a well-formed user turn. Does not know: models, thoughts, the order in which agents work.
"""

from collections.abc import Sequence

from .teams import Team
from .text.tokenizer import Tokenizer, Turn

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
        for number, prompt in enumerate(prompts):
            # The last agent is asked as a single agent is: the opening, then its paragraph.
            again = opening if 0 < number == len(prompts) - 1 else ""
            parts += [SEPARATOR if any(parts) else "", again, SEPARATOR if again else "", prompt]
        last = team.agents[-1]
        before, opening_piece, *pieces = tokenizer.user_turn(parts, last.system, last.prefix)
        self._head = before + opening_piece
        self._again = pieces[-3] + pieces[-2]
        self._paragraphs = pieces[3::4]  # the last one ends with the assistant header

    def prompt(self, agent: int, first: bool) -> Turn:
        paragraph = self._paragraphs[agent]
        if first:
            return self._head + Turn(SEPARATOR if self.opening else "") + paragraph
        again = self._again if agent in (-1, len(self.prompts) - 1) else Turn("")
        return Turn(SEPARATOR) + again + paragraph

    @property
    def head(self) -> Turn:
        return self._head


LAYOUTS: dict[str, type[ChatLayout]] = {"chat": ChatLayout, "turn": TurnLayout}
