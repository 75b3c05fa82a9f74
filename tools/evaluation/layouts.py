"""Layouts that differ from "turn" and "chat" in where thoughts start or in what follows them.

They show why the layout matters (docs/results.md), and are for measurements with ChatML models
only. U is the user's text, A the assistant header, ⟨t⟩ stands for thoughts, and E ends a turn:

    chat              system U1 E A ⟨t⟩ E  U2 E A ⟨t⟩ E  …               (the library's)
    chat:systems      system U1 E A ⟨t⟩ E  system U2 E A ⟨t⟩ E  …        (the authors')
    chat:sentence     as chat, with a fixed sentence between ⟨t⟩ and E
    chat:user-end     as chat, with ⟨t⟩ at the end of U; the assistant turns are empty
    chat:users        as chat:user-end, without assistant turns before the last agent's turn
    chat:lead         as chat; the last agent's answer begins with a fixed sentence
    turn              system U: P1 ⟨t⟩ P2 ⟨t⟩ … E A                      (the library's)
    turn:lead         as turn; the last agent's answer begins with a fixed sentence
    assistant         system U E A "Plan:" ⟨t⟩ "Check of the plan:" ⟨t⟩ … "Solution:"

For turns that are not closed, use `chat` with `--close no`. This module does not use models, arms
or files.
"""

from dataclasses import dataclass, replace

from minimas.layout import Layout, TurnLayout
from minimas.teams import Team
from minimas.text.tokenizer import PromptText

SENTENCE = "I have worked it out."
LEAD = "Let's solve this step by step."
HEADINGS = ("Plan:", "\nCheck of the plan:", "\nBetter plan:", "\nSolution, step by step:")


class Systems(Layout):
    """Chat turns that are rendered separately, each with the system message of the template."""

    def prompt(self, agent: int, first: bool) -> PromptText:
        return super().prompt(agent, first=True)


class Sentence(Layout):
    """Chat turns with a fixed sentence after the thoughts."""

    closes_turns = False

    def prompt(self, agent: int, first: bool) -> PromptText:
        turn = super().prompt(agent, first)
        return turn if first else PromptText(SENTENCE + self.tokenizer.turn_end) + turn


class UserEnd(Layout):
    """Chat turns with the thoughts at the end of the user's text, then an empty assistant turn."""

    closes_turns = False
    assistant_turns = True

    def prompt(self, agent: int, first: bool) -> PromptText:
        turn = super().prompt(agent, first)
        end = turn.untrusted[-1][1]
        rest = turn.text[end:]  # the end of the user turn and the assistant header
        own = turn if agent == -1 else turn.cut(0, end)
        if first:
            return own
        if self.assistant_turns:
            return PromptText(rest + self.tokenizer.turn_end) + own
        return PromptText(self.tokenizer.turn_end) + own


class Users(UserEnd):
    """The same as `UserEnd` without the empty assistant turns."""

    assistant_turns = False


class OneAssistantTurn(Layout):
    """One assistant turn after the prompt of the last agent, with a heading for each agent."""

    closes_turns = False

    def prompt(self, agent: int, first: bool) -> PromptText:
        turn = super().prompt(-1, first)
        last = agent in (-1, len(self.prompts) - 1)
        heading = HEADINGS[-1] if last else HEADINGS[min(agent, len(HEADINGS) - 2)]
        return turn + PromptText(heading) if first else PromptText(heading)


@dataclass(frozen=True)
class Variant:
    """A layout for measurements: its class, the library's layout, and the start of the answer."""

    form: type[Layout]
    base: str = "chat"
    lead: str = ""

    def team(self, team: Team) -> Team:
        """Return the team in the library's layout that the variant modifies."""
        *before, last = team.agents
        agents = (*before, replace(last, prefix=self.lead)) if self.lead else team.agents
        return replace(team, layout=self.base, agents=agents)


VARIANTS = {
    "chat:systems": Variant(Systems),
    "chat:sentence": Variant(Sentence),
    "chat:user-end": Variant(UserEnd),
    "chat:users": Variant(Users),
    "chat:lead": Variant(Layout, lead=LEAD),
    "turn:lead": Variant(TurnLayout, "turn", LEAD),
    "assistant": Variant(OneAssistantTurn),
}
