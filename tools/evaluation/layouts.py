"""Layouts to compare with "turn" and "chat": where thoughts start, and what follows them.

They say why the layout matters (docs/results.md). They are for measurements only and for ChatML
models. U is the user's text, A the assistant header, ⟨t⟩ are thoughts, and E ends a turn:

    chat              system U1 E A ⟨t⟩ E  U2 E A ⟨t⟩ E  …               (the library's)
    chat:systems      system U1 E A ⟨t⟩ E  system U2 E A ⟨t⟩ E  …        (the authors')
    chat:sentence     as chat, with a fixed sentence between ⟨t⟩ and E
    chat:user-end     as chat, with ⟨t⟩ at the end of U: the assistant turns are empty
    chat:users        as chat:user-end, without assistant turns before the last agent's
    chat:lead         as chat, and the last agent's answer begins with a given sentence
    turn              system U: P1 ⟨t⟩ P2 ⟨t⟩ … E A                      (the library's)
    turn:lead         as turn, and the last agent's answer begins with a given sentence
    assistant         system U E A "Plan:" ⟨t⟩ "Check of the plan:" ⟨t⟩ … "Solution:"

Turns that stay open are `chat` with `--close no`. Does not know: models, arms, files.
"""

from dataclasses import dataclass, replace

from minimas.layout import LAYOUTS, ChatLayout
from minimas.teams import Team
from minimas.text.tokenizer import Turn

SENTENCE = "I have worked it out."
LEAD = "Let's solve this step by step."
HEADINGS = ("Plan:", "\nCheck of the plan:", "\nBetter plan:", "\nSolution, step by step:")


class Systems(ChatLayout):
    """Chat turns that are each rendered alone, with the template's own system message."""

    def prompt(self, agent: int, first: bool) -> Turn:
        return super().prompt(agent, first=True)


class Sentence(ChatLayout):
    """Chat turns in which a fixed sentence follows the thoughts."""

    closes_turns = False

    def prompt(self, agent: int, first: bool) -> Turn:
        turn = super().prompt(agent, first)
        return turn if first else Turn(SENTENCE + self.tokenizer.turn_end) + turn


class UserEnd(ChatLayout):
    """Chat turns whose thoughts follow the user's text; an empty assistant turn comes after."""

    closes_turns = False
    assistant_turns = True

    def prompt(self, agent: int, first: bool) -> Turn:
        turn = super().prompt(agent, first)
        end = turn.untrusted[-1][1]
        rest = turn.text[end:]  # the end of the user turn and the assistant header
        own = turn if agent == -1 else turn.cut(0, end)
        if first:
            return own
        if self.assistant_turns:
            return Turn(rest + self.tokenizer.turn_end) + own
        return Turn(self.tokenizer.turn_end) + own


class Users(UserEnd):
    """The same without the empty assistant turns."""

    assistant_turns = False


class OneAssistantTurn(ChatLayout):
    """One assistant turn after the single agent's prompt; each agent has a heading in it."""

    closes_turns = False

    def prompt(self, agent: int, first: bool) -> Turn:
        turn = super().prompt(-1, first)
        heading = HEADINGS[agent]
        return turn + Turn(heading) if first else Turn(heading)


@dataclass(frozen=True)
class Variant:
    """A layout of measurements: its form, the team's own layout, and how the answer begins."""

    form: type[ChatLayout]
    base: str = "chat"
    lead: str = ""

    def team(self, team: Team) -> Team:
        """Return the team in the layout on which the variant builds."""
        *before, last = team.agents
        agents = (*before, replace(last, prefix=self.lead)) if self.lead else team.agents
        return replace(team, layout=self.base, agents=agents)


VARIANTS = {
    "chat:systems": Variant(Systems),
    "chat:sentence": Variant(Sentence),
    "chat:user-end": Variant(UserEnd),
    "chat:users": Variant(Users),
    "chat:lead": Variant(LAYOUTS["chat"], lead=LEAD),
    "turn:lead": Variant(LAYOUTS["turn"], "turn", LEAD),
    "assistant": Variant(OneAssistantTurn),
}
