"""Check that the layouts for measurements differ from the library's layouts as documented."""

import itertools
from dataclasses import replace

import pytest

from minimas import LM
from minimas.teams import sequential
from tools.evaluation.last_turn import VariantRun, latent_turn
from tools.evaluation.layouts import HEADINGS, LEAD, SENTENCE, VARIANTS

from ..text import SHORT, load_text_lm, text_folder

TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """Return a random model with a chat template that has its own system message."""
    return load_text_lm(text_folder(tmp_path_factory.mktemp("model"), chat_template=TEMPLATE))


def shown(lm: LM, name: str) -> str:
    """Return the conversation of one question, with • in place of each thought."""
    variant = VARIANTS[name]
    team = variant.team(sequential())
    run = VariantRun(lm, ["Why?"], team=team, latent_steps=1, variant=variant)
    [layout] = run.layouts_per_question
    closing = "" if not run.closes_turns else "<|im_end|>\n"
    parts = [layout.prompt(i, first=i == 0).text for i in range(3)]
    return "".join(part + "•" + closing for part in parts) + layout.prompt(-1, first=False).text


@pytest.mark.parametrize("count", [2, 6])
def test_the_last_of_any_number_of_agents_gives_the_solution(lm: LM, count: int) -> None:
    """A sixth agent ended in an IndexError."""
    team = sequential()
    *earlier, last = team.agents
    team = replace(team, agents=(*(earlier * 2)[: count - 1], last))
    variant = VARIANTS["assistant"]
    run = VariantRun(lm, ["Why?"], team=variant.team(team), latent_steps=1, variant=variant)
    [layout] = run.layouts_per_question
    for i in range(count):
        is_last = layout.prompt(i, first=False).text == HEADINGS[-1]
        assert is_last == (i == count - 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_layout_matches_its_description(lm: LM, name: str) -> None:
    """Thoughts in another place, or a missing end of turn, would be measured under its name."""
    text = shown(lm, name)
    user, header, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
    before = {piece.rsplit("\n", 1)[-1] or piece[-len(header) :] for piece in text.split("•")[:3]}
    after = {piece[: len(end)] for piece in text.split("•")[1:]}
    turns = (text.count("system\n"), text.count(user), text.count(header))
    expected = {
        "chat:systems": (4, 4, 4),
        "chat:sentence": (1, 4, 4),
        "chat:user-end": (1, 4, 4),
        "chat:users": (1, 4, 1),
        "chat:lead": (1, 4, 4),
        "turn:lead": (1, 1, 1),
        "assistant": (1, 1, 1),
    }
    assert turns == expected[name]
    if name == "assistant":
        assert [heading in text for heading in HEADINGS] == [True] * 4
        assert before == {"Plan:", "Check of the plan:", "Better plan:"}
    elif name in ("chat:user-end", "chat:users"):
        assert after == {end} and header not in before
    elif name == "chat:sentence":
        assert text.count(f"•{SENTENCE}{end}") == 3 and before == {header}
    elif name != "turn:lead":
        assert text.count(f"{header}•{end}") == 3
    assert text.endswith(LEAD) == name.endswith("lead")


def test_each_layout_gives_the_last_agent_another_state(lm: LM) -> None:
    """A layout that is not passed on would be measured as layout chat."""
    states = {}
    for name, variant in VARIANTS.items():
        team = variant.team(sequential())
        turn = latent_turn(lm, ["Why?"], team=team, latent_steps=2, sampling=SHORT, variant=variant)
        states[name] = turn.turn.prefill_and_think()[0]
    for one, other in itertools.combinations(states, 2):
        assert float((states[one] - states[other]).abs().max()) > 1e-6, (one, other)
