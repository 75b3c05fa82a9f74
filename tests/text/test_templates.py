"""Prompts compared with `apply_chat_template` of transformers, for the templates of many families.

A prompt must equal what transformers renders, or be refused in one line that names the file.
"""

import functools
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimas import LM, Agent, Sampling, Team, Tokenizer, latent_mas, text_mas

from ..models import TINY
from . import load_text_lm, plain_tokenizer, text_folder, with_template
from .templates import TEMPLATES

transformers = pytest.importorskip("transformers")
USERS = [
    "How many?",
    " x",
    "x ",
    "\n\nx\n",
    "  \n a b \t",
    "{{ 1 }}",
    "a\n\n  b ",
    "<think>x</think>",
]
SYSTEMS = [None, "Be brief.", " s \n"]
# In these, a second turn is not simply appended to the first one and its end.
NO_CHAT = {"phi 3, another end of the conversation", "falcon, a turn has no end"}
NO_SYSTEM = {"gemma, no system message"}
MOVES_SYSTEM = {"mistral, system message in the last user message"}
names = pytest.mark.parametrize("name", sorted(TEMPLATES))
Messages = list[tuple[str, str]]


@functools.cache
def lm_with(name: str) -> LM:
    """Return the random model with the tokenizer of weights/tiny and one of the templates."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATES[name]}
        lm = load_text_lm(text_folder(path, **special))
        # Load them before the folder is deleted.
        assert lm.tokenizer and lm.sampling and lm.end_ids and lm.teams == {}
        return lm


def tokenizer_with(name: str) -> Tokenizer:
    tokenizer = lm_with(name).tokenizer
    assert tokenizer is not None
    return tokenizer


@functools.cache
def theirs() -> Any:
    file = str(TINY / "tokenizer.json")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=file, bos_token="<s>", eos_token="</s>"
    )


def rendered(name: str, messages: Messages) -> str:
    """Return what transformers renders, up to the open assistant turn."""
    conversation = [{"role": role, "content": text} for role, text in messages]
    options = {"chat_template": TEMPLATES[name], "tokenize": False, "add_generation_prompt": True}
    return str(theirs().apply_chat_template(conversation, **options))


def with_system(system: str | None, *messages: tuple[str, str]) -> Messages:
    return list(messages) if system is None else [("system", system), *messages]


@names
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_turn_of_any_family_equals_the_one_of_transformers(name: str, system: str | None) -> None:
    """Templates may strip messages, merge a system message into the user's, or add one."""
    tokenizer = tokenizer_with(name)
    if system is not None and name in NO_SYSTEM:
        with pytest.raises(ValueError, match=r"^\S+/tokenizer_config\.json: the chat template .*"):
            tokenizer.turn("x", system)
        return
    for user in USERS:
        turn = tokenizer.turn(user, system)
        assert turn.text == rendered(name, with_system(system, ("user", user)))
        start, end = turn.untrusted[-1]
        assert turn.text[start:end].strip() == user.strip()
        expected = plain_tokenizer(TINY).encode(turn.text, add_special_tokens=False).ids
        assert "<think>" in user or tokenizer.encode_turn(turn) == expected


def chat_prompts(name: str, users: list[str], system: str | None) -> tuple[list[str], str]:
    """Return the prompts of agents in chat turns, and the conversation that they are part of."""
    agents = [Agent(str(i), "{question} " + user) for i, user in enumerate(users)]
    agents[0] = replace(agents[0], system=system)
    run: Any = {"latent_steps": 1, "sampling": Sampling(max_new_tokens=1), "layout": "chat"}
    [result] = latent_mas(lm_with(name), ["\nQ?"], Team(tuple(agents)), **run)
    messages = with_system(system)
    for agent in agents:
        messages += [("user", agent.prompt.replace("{question}", "\nQ?")), ("assistant", "A")]
    return [trace.prompt for trace in result.agents], rendered(name, messages[:-1])


@names
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat_turns_add_up_to_the_conversation_of_transformers(
    name: str, system: str | None
) -> None:
    """The second agent's turn repeated `<s>` or the default system message."""
    refused = NO_CHAT | (set() if system is None else NO_SYSTEM | MOVES_SYSTEM)
    for users in itertools.islice(itertools.product(USERS, repeat=2), 0, None, 13):
        if name in refused:
            with pytest.raises(ValueError, match=r"^\S+/tokenizer_config\.json: .*chat.template"):
                chat_prompts(name, [*users, "z"], system)
        else:
            prompts, expected = chat_prompts(name, [*users, "z"], system)
            assert ("A" + tokenizer_with(name).turn_end).join(prompts) == expected


@names
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_paragraphs_of_one_turn_add_up_to_the_turn_of_transformers(
    name: str, system: str | None
) -> None:
    """This holds with and without an opening, whatever the template strips from the message."""
    run: Any = {"latent_steps": 1, "sampling": Sampling(max_new_tokens=1)}
    pairs = list(zip(USERS, USERS[::-1], strict=True))
    for opening, (first, last) in itertools.product(["", "{question}"], pairs):
        agents = [Agent(str(i), text, system=system) for i, text in enumerate([first, "b", last])]
        question = " \nQ " if opening else "unused"
        agents[1] = replace(agents[1], prompt=agents[1].prompt if opening else "{question} b")
        team = Team(tuple(agents), layout="turn", opening=opening)
        begin = [question] if opening else []
        filled = [agent.prompt.replace("{question}", question) for agent in agents]
        text = "\n\n".join([*begin, *filled[:-1], *begin, filled[-1]])
        if system and name in NO_SYSTEM:
            with pytest.raises(ValueError, match=r"^\S+/tokenizer_config\.json: .*chat.template"):
                latent_mas(lm_with(name), [question], team, **run)
        else:
            [result] = latent_mas(lm_with(name), [question], team, **run)
            prompts = "".join(trace.prompt for trace in result.agents)
            assert prompts == rendered(name, with_system(system, ("user", text)))


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - NO_CHAT))
def test_a_conversation_of_text_agents_equals_the_one_of_transformers(name: str) -> None:
    """`<s>` or a default system message was inserted before every turn."""
    agents = tuple(Agent(str(i), text) for i, text in enumerate([" {question}", "b\n", "c"]))
    [result] = text_mas(lm_with(name), ["Q?"], Team(agents), sampling=Sampling(max_new_tokens=3))
    first, second, last = result.agents
    messages = [("user", " Q?"), ("assistant", "FIRST"), ("user", "b\n")]
    ends = rendered(name, messages).split("FIRST")
    assert first.prompt == rendered(name, messages[:1])
    assert second.prompt == first.text.join(ends)
    messages += [("assistant", "SECOND"), ("user", "c")]
    before, between, end = rendered(name, messages).replace("SECOND", "FIRST").split("FIRST")
    assert last.prompt == before + first.text + between + second.text + end


@pytest.mark.parametrize("name", sorted(NO_CHAT))
def test_a_template_without_a_second_turn_works_for_all_other_methods(name: str) -> None:
    """It is refused only for prompts that need a second turn."""
    lm, run = lm_with(name), dict[str, Any](sampling=Sampling(max_new_tokens=1))
    alone = Team((Agent("a", "{question}"),))
    notes = Team((Agent("a", "{question}"), Agent("b", "{question}{context}")))
    assert latent_mas(lm, ["Q?"], alone, 1, **run) and text_mas(lm, ["Q?"], notes, **run)
    with pytest.raises(ValueError, match=r"^\S+/tokenizer_config\.json: chat_template: found one"):
        text_mas(lm, ["Q?"], Team((*alone.agents, *alone.agents)), **run)


SIDES = {"lstrip": str.lstrip, "rstrip": str.rstrip, "strip": str.strip}
SPACES = st.text(" \n\tab", max_size=6)


@given(st.sampled_from(sorted(SIDES)), st.sampled_from(["", "'\\n'", "' '"]), SPACES, SPACES)
@settings(max_examples=200)
def test_a_template_may_strip_either_side_and_any_whitespace(
    side: str, characters: str, user: str, system: str
) -> None:
    """Only stripping both sides was supported: `lstrip` or `strip('\\n')` was refused."""
    call = f".{side}({characters})"
    tokenizer = stripping(call)
    stripped = [
        SIDES[side](text, characters.encode().decode("unicode_escape").strip("'") or None)
        for text in (system, user)
    ]
    turn = tokenizer.turn(user, system)
    assert turn.text == "".join(f"[ {text} ]" for text in stripped)
    assert [turn.text[a:b] for a, b in turn.untrusted] == stripped


def stripping(call: str) -> Tokenizer:
    return with_template(
        "{% for m in messages %}{{ '[ ' + m.content" + call + " + ' ]' }}{% endfor %}"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.content }}]{{ m.content }}{% endfor %}",
        "{% for m in messages | reverse %}[{{ m.content }}]{% endfor %}",
        "{% for m in messages %}[{{ m.content | replace('a', 'b') }}]{% endfor %}",
        "{% for m in messages %}[{{ m.content }}]{{ m.content | length }}{% endfor %}",
        "{% for m in messages %}[{{ m.content.split() | join(' ') }}]{% endfor %}",
    ],
)
def test_a_template_that_repeats_moves_or_changes_a_message_is_refused(
    tmp_path: Path, template: str
) -> None:
    """The user's part and the template's part of the text can no longer be told apart."""
    folder = text_folder(tmp_path, chat_template=template)
    with pytest.raises(ValueError, match=r"^\S+/tokenizer_config\.json: chat_template: found"):
        Tokenizer(folder).turn("a  cat", "sys")


def test_a_variable_in_a_generation_block_is_local(tmp_path: Path) -> None:
    """In transformers, the block has its own scope."""
    template = (
        "{% set x = 'out' %}{%- generation -%}{% set x = 'in' %}{{ x }}{%- endgeneration %}{{ x }}"
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    tokenizer = Tokenizer(text_folder(tmp_path, chat_template=template))
    conversation = [{"role": "user", "content": "hi"}]
    expected = theirs().apply_chat_template(conversation, chat_template=template, tokenize=False)
    assert tokenizer.turn("hi").text == expected == "inout[hi]"


def test_the_reference_distinguishes_wrong_prompts() -> None:
    """The negative control: another user text, another role, no open turn."""
    right = rendered("llama 3", [("user", "x")])
    assert tokenizer_with("llama 3").turn("x").text == right
    for messages in ([("user", "y")], [("system", "x")], [("user", "x"), ("user", "x")]):
        assert rendered("llama 3", messages) != right
    assert json.loads(json.dumps(right)).count("<s>") == 1


def test_a_template_that_numbers_the_turns_is_refused_for_later_turns() -> None:
    """The third agent's turn had the number of the second one."""
    numbered = (
        "{% for m in messages %}{% if m.role == 'user' %}[Round {{ loop.index0 // 2 + 1 }}]"
        "{{ m.content }}:{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    tokenizer = with_template(numbered)
    assert tokenizer.turn("hello").text == "[Round 1]hello:"
    with pytest.raises(ValueError, match="numbers the turns"):
        tokenizer.turn("hello", first=False)
    plain = with_template(numbered.replace("{{ loop.index0 // 2 + 1 }}", ""))
    assert plain.turn("hello", first=False).text == "[Round ]hello:"
