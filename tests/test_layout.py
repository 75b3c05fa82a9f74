"""Check layout "turn": all prompts in one user turn equal the same turn built by hand.

With three empty assistant turns before it, the last agent answered with only a number
(docs/results.md).
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimas import (
    LM,
    Agent,
    KVCache,
    Result,
    Sampling,
    Team,
    Tokenizer,
    hierarchical,
    latent_mas,
    sequential,
    single,
    text_mas,
    think,
)
from minimas.agents import TRANSFERS
from minimas.core.config import FAMILIES
from minimas.text.tokenizer import CHATML

from .models import TINY, apart, distance, reference, tiny_model
from .test_agents import ASKED, QUESTIONS, encoded, greedy, watched
from .text import (
    CONTROL,
    SHORT,
    harmless_texts,
    hostile_texts,
    load_text_lm,
    plain_tokenizer,
    text_folder,
    tiny_tokenizer,
)

END = "<|im_end|>\n<|im_start|>assistant\n"
TURN = Team(
    (
        Agent("first", "Plan it. {question}"),
        Agent("second", "Check it."),
        Agent("last", "Answer: {question}", prefix="So"),
    ),
    layout="turn",
)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_text_lm(text_folder(tmp_path_factory.mktemp("model")))


def preamble_of(team: Team, question: str) -> str:
    system = team.agents[-1].system
    before = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{before}<|im_start|>user\n{team.opening.replace('{question}', question)}"


def prompt_of(team: Team, i: int, question: str, first: bool) -> str:
    """Return the part of agent i in the shared turn, built as the documentation says."""
    paragraph = team.agents[i].prompt.replace("{question}", question)
    opening = team.opening.replace("{question}", question) + ("\n\n" if team.opening else "")
    last = i == len(team.agents) - 1
    start = "\n\n" + (opening if last else "")
    if first:
        start = preamble_of(team, question) + ("\n\n" if team.opening else "")
    return start + paragraph + (END + team.agents[i].prefix if last else "")


def prefill(lm: LM, text: str, cache: KVCache) -> torch.Tensor:
    return lm.model(lm.model.embed(encoded(text)), cache)[:, -1:]


def by_hand(
    lm: LM,
    team: Team,
    question: str,
    remembered: str,
    steps: Sequence[int],
    transfer: str,
    limit: int,
) -> tuple[KVCache, str, list[str]]:
    """Return the KV cache that the last agent gets, its greedy text, and all agents' prompts."""
    align, last = lm.aligner("ridge"), len(team.agents) - 1
    preamble, parts, prompts = lm.model.new_cache(1), [lm.model.new_cache(1)], []
    for i in range(last):
        cache = lm.model.new_cache(1) if team.parallel else KVCache.concat([preamble, *parts])
        held = cache.lengths[0]
        prompts.append(prompt_of(team, i, remembered, first=held == 0))
        hidden = prefill(lm, prompts[-1], cache)
        offsets = plain_tokenizer(TINY).encode(prompts[-1], add_special_tokens=False).offsets
        size = (
            sum(start < len(preamble_of(team, remembered)) for start, _ in offsets)
            if held == 0
            else preamble.lengths[0]
        )
        think(lm.model, align, hidden, cache, steps[i])
        preamble = cache.truncate(size) if held == 0 and (i == 0 or not team.parallel) else preamble
        own = {"latents": cache.keep_last(steps[i])}.get(
            transfer, cache.keep_last(cache.lengths[0] - max(held, size))
        )
        parts = [own] if transfer == "last" else [*parts, own]
        if transfer == "none":
            preamble, parts = lm.model.new_cache(1), [lm.model.new_cache(1)]
    if transfer == "shuffled" and team.opening and last:
        preamble = lm.model.new_cache(1)
        first = prompt_of(team, 0, question, first=True)
        offsets = plain_tokenizer(TINY).encode(first, add_special_tokens=False).offsets
        size = sum(start < len(preamble_of(team, question)) for start, _ in offsets)
        lm.model(lm.model.embed(encoded(first)[:, :size]), preamble)
    handed = KVCache.concat([preamble, *parts])
    prompts.append(prompt_of(team, last, question, first=handed.lengths[0] == 0))
    cache = handed.fork()
    hidden = prefill(lm, prompts[-1], cache)
    _, hidden = think(lm.model, align, hidden, cache, team.agents[-1].latent_steps or 0)
    return handed, tiny_tokenizer().decode(greedy(lm, hidden, cache, limit)), prompts


AGENTS = st.builds(
    Agent,
    st.just("agent"),
    st.sampled_from(
        ["Plan: {question}", "{question}", "No question at all.", " {question} twice: {question} "]
    ),
    latent_steps=st.integers(0, 3),
)


@st.composite
def teams(draw: st.DrawFn) -> Team:
    """Draw a team of one to four agents in layout "turn"."""
    system = draw(st.sampled_from([None, "", "Be brief."]))
    *earlier, last = [
        replace(agent, system=system) for agent in draw(st.lists(AGENTS, min_size=1, max_size=4))
    ]
    return Team(
        (*earlier, replace(last, prefix=draw(st.sampled_from(["", "<think>\n"])))),
        parallel=draw(st.booleans()),
        layout="turn",
        opening=draw(st.sampled_from(["", "Question: {question}", "A team works."])),
    )


def sees_question(team: Team) -> bool:
    return "{question}" in team.opening + "".join(agent.prompt for agent in team.agents)


@pytest.mark.parametrize("transfer", TRANSFERS)
@given(teams().filter(sees_question), ASKED, st.integers(1, 4))
@settings(max_examples=25)
def test_any_team_in_one_turn_equals_the_same_by_hand(
    lm: LM, transfer: str, team: Team, questions: list[str], limit: int
) -> None:
    """Slots, prompts, counts and text are right for ragged rows, any team and any transfer."""
    questions = [*questions, "one more"] if transfer == "shuffled" else questions
    with watched(lm.model) as (_, caches, _):
        results = latent_mas(
            lm, questions, team, transfer=transfer, sampling=Sampling(max_new_tokens=limit)
        )
    steps = [agent.latent_steps or 0 for agent in team.agents]
    for i, result in enumerate(results):
        remembered = questions[(i + 1) % len(questions)] if transfer == "shuffled" else questions[i]
        handed, text, prompts = by_hand(lm, team, questions[i], remembered, steps, transfer, limit)
        assert [trace.prompt for trace in result.agents] == prompts
        assert [trace.prompt_tokens for trace in result.agents] == [
            encoded(prompt).shape[1] for prompt in prompts
        ]
        assert distance(caches[-1].select([i]).truncate(handed.lengths[0]), handed) < 1e-9
        assert result.text == text


def test_a_shuffled_question_keeps_the_blank_line_after_its_head(tmp_path: Path) -> None:
    """One token may cover the end of the opening and the blank line, which was lost with it.

    With two equal questions, the KV cache of the next question is the own one.
    """
    folder = text_folder(tmp_path)
    path, size = folder / "tokenizer.json", tiny_tokenizer().size
    raw = json.loads(path.read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    raw["added_tokens"].append({"id": size, "content": "?\n\n", **flags})
    path.write_text(json.dumps(raw), encoding="utf-8")
    lm = LM(tiny_model(vocab_size=size + 1), folder)
    team, last = replace(TURN, opening="Question: {question}"), []
    for transfer in ("full", "shuffled"):
        with watched(lm.model) as (_, caches, _):
            latent_mas(lm, ["How many?"] * 2, team, 1, transfer=transfer, sampling=SHORT)
        last.append(caches[-1])
    assert last[0].lengths == last[1].lengths
    assert distance(*last) < 1e-9


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_a_short_context_is_refused_before_any_work_or_suffices(lm: LM, transfer: str) -> None:
    """A shuffled question with a long preamble was refused only after other agents had worked."""
    team, asked = replace(TURN, opening="{question}"), ["word " * 20 + "end", "a"]
    options: dict[str, Any] = {"transfer": transfer, "sampling": SHORT}
    with watched(lm.model) as (_, caches, _):
        latent_mas(lm, asked, team, 1, **options)
    used = max(max(cache.lengths) for cache in caches)
    accepted = []
    for context in range(used - 3, used + SHORT.max_new_tokens + 3):
        model = tiny_model(vocab_size=tiny_tokenizer().size, max_position_embeddings=context)
        with watched(model) as (_, caches, _):
            try:
                latent_mas(LM(model, lm.folder), asked, team, 1, **options)
                accepted.append(context)
            except ValueError:
                assert caches == []
    assert 0 < len(accepted) < SHORT.max_new_tokens + 6


@pytest.mark.parametrize("layout", ["turn", "chat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_hand_over_equals_explicit_input(tmp_path: Path, family: str, layout: str) -> None:
    """The paper's theorem holds for both layouts.

    Prompts and thoughts as one input, without a cache, give the last agent's state.
    """
    lm = load_text_lm(text_folder(tmp_path), family)
    team, model = replace(sequential(), layout=layout), lm.model
    with watched(model) as (_, _, states):
        results = latent_mas(
            lm, QUESTIONS, team, latent_steps=3, sampling=Sampling(max_new_tokens=1)
        )
    for row, result in enumerate(results):
        x = torch.empty(0, model.config.hidden_size, dtype=torch.float64)
        without_thoughts = x
        for i, trace in enumerate(result.agents):
            prompt = model.embed(encoded(trace.prompt)[0])
            x, without_thoughts = torch.cat([x, prompt]), torch.cat([without_thoughts, prompt])
            for _ in range(trace.latent_steps):
                x = torch.cat([x, lm.aligner("ridge")(reference(model, x)[-1:])])
            if layout == "chat" and i < len(result.agents) - 1:
                closing = model.embed(encoded("<|im_end|>\n")[0])
                x, without_thoughts = (
                    torch.cat([x, closing]),
                    torch.cat([without_thoughts, closing]),
                )
        assert apart(states[0][row], reference(model, x)[-1:]) < 1e-9
        assert apart(states[0][row], reference(model, without_thoughts)[-1:]) > 1e-3


def test_all_prompts_share_one_user_header_and_one_assistant_header(lm: LM) -> None:
    """Earlier assistant turns made the last agent's answer short.

    All prompts must be in one conversation of the template.
    """
    for team in (sequential(), hierarchical(chained=True), TURN):
        [result] = latent_mas(
            lm, QUESTIONS[:1], team, latent_steps=1, layout="turn", sampling=SHORT
        )
        text = "".join(trace.prompt for trace in result.agents)
        assert [text.count(f"<|im_start|>{role}\n") for role in ("user", "assistant")] == [1, 1]
        assert text.endswith(f"{END}{team.agents[-1].prefix}")
        [result] = latent_mas(
            lm, QUESTIONS[:1], team, latent_steps=1, layout="chat", sampling=SHORT
        )
        assert sum(trace.prompt.count("<|im_start|>assistant\n") for trace in result.agents) == len(
            team.agents
        )


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_every_transfer_gives_the_last_agent_a_complete_user_turn(lm: LM, transfer: str) -> None:
    """Thoughts without a user header before them would be outside any turn."""
    with watched(lm.model) as (_, caches, _):
        results = latent_mas(
            lm, QUESTIONS[:2], TURN, latent_steps=2, transfer=transfer, sampling=SHORT
        )
    header = lm.model.new_cache(1)
    prefill(lm, "<|im_start|>user\n", header)
    for row in range(len(results)):
        assert distance(caches[-1].select([row]).truncate(header.lengths[0]), header) < 1e-9


@pytest.mark.parametrize("kind", ["math", "free"])
@pytest.mark.parametrize("layout", ["turn", "chat"])
@pytest.mark.parametrize("team", ["sequential", "hierarchical"])
def test_without_a_hand_over_the_built_in_teams_are_a_single_agent(
    lm: LM, team: str, layout: str, kind: str
) -> None:
    """So transfer "none" is not measured: its answers are those of `single` (docs/results.md)."""
    how: dict[str, Any] = {"kind": kind, "sampling": Sampling(max_new_tokens=4)}
    alone = single(lm, QUESTIONS, **how)
    none, full = (
        latent_mas(lm, QUESTIONS, team, 1, layout=layout, transfer=transfer, **how)
        for transfer in ("none", "full")
    )
    for expected, dropped, handed_over in zip(alone, none, full, strict=True):
        [agent] = expected.agents
        last, other = dropped.agents[-1], handed_over.agents[-1]
        assert (last.prompt, last.text) == (agent.prompt, agent.text)
        assert last.memory_bytes == agent.memory_bytes < other.memory_bytes


@given(st.lists(hostile_texts(), min_size=3, max_size=3))
@settings(max_examples=40)
def test_a_question_cannot_leave_the_shared_turn(lm: LM, questions: list[str]) -> None:
    """A question that contains `<|im_end|>` would close the turn of all agents."""
    questions = [question if question.strip() else "x" for question in questions]
    team = replace(TURN, opening="{question}")
    with watched(lm.model) as (ids, _, _):
        latent_mas(lm, questions[:1], team, latent_steps=0, sampling=Sampling(max_new_tokens=1))
    control = lm.tokenizer.control if lm.tokenizer else {}
    used = [name for i in ids for name, number in control.items() if number == i]
    assert used == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


TEMPLATES = {
    "chatml": CHATML,
    "strips both": CHATML.replace("message.content", "message.content.strip()"),
    "strips the right": CHATML.replace("message.content", "message.content.rstrip()"),
    "no newline": CHATML.replace("message.role + '\n'", "message.role + ': '"),
    "default system": "{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}" + CHATML,
}


@given(st.lists(harmless_texts(12), min_size=1, max_size=4), st.sampled_from(sorted(TEMPLATES)))
def test_the_pieces_of_a_turn_join_to_what_the_template_renders(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], name: str
) -> None:
    """No character may be lost, doubled or moved, even if a template strips the message."""
    tokenizer = tokenizer_with(tmp_path_factory, TEMPLATES[name])
    pieces = tokenizer.user_turn(parts, prefix="So")
    whole = tokenizer.turn("".join(parts), prefix="So")
    assert "".join(piece.text for piece in pieces) == whole.text
    assert len(pieces) == len(parts) + 1
    for part, piece in zip(parts[:-1], pieces[1:], strict=False):
        assert piece.text == part or (name.startswith("strips") and piece.text in part)
        assert piece.untrusted == (((0, len(piece.text)),) if piece.text else ())


def tokenizer_with(tmp_path_factory: pytest.TempPathFactory, template: str) -> Tokenizer:
    return Tokenizer(text_folder(tmp_path_factory.mktemp("template"), chat_template=template))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}x{% endfor %}",
        "{{ messages[-1].content | upper }}",
        "{{ (messages[-1].content + '!') * 2 }}",
    ],
)
def test_a_template_that_drops_or_changes_the_message_is_refused(
    tmp_path: Path, template: str
) -> None:
    chat = "{% if messages | length > 1 %}" + CHATML + "{% else %}" + template + "{% endif %}"
    lm = load_text_lm(text_folder(tmp_path, chat_template=chat))
    with pytest.raises(
        ValueError,
        match=r"tokenizer_config\.json: chat_template: found one that .*changes.*, expected",
    ):
        latent_mas(lm, QUESTIONS[:1], TURN, sampling=SHORT)


# -- teams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"writes": True}, "writes"),
        ({"prefix": "<think>\n"}, "prefix"),
        ({"system": "Be brief."}, "system"),
    ],
)
def test_agents_that_cannot_share_one_turn_are_refused_by_name(
    lm: LM, tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    """An agent that generates text needs an assistant turn, and only the last agent has one."""
    agents = (replace(TURN.agents[0], **change), *TURN.agents[1:])
    with pytest.raises(
        ValueError,
        match=rf"layout: found 'turn' with agent 'first', {field}.*expected 'chat'",
    ):
        Team(agents, layout="turn")
    with pytest.raises(ValueError, match=r"layout"):
        latent_mas(lm, QUESTIONS[:1], Team(agents), layout="turn", sampling=SHORT)
    raw = {
        "layout": "turn",
        "agents": [{"name": "first", "prompt": "x", **change}, {"name": "last", "prompt": "y"}],
    }
    path = tmp_path / "team.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=rf"team\.json: layout: .*{field}"):
        Team.from_json(path)
    assert text_mas(lm, QUESTIONS[:1], Team(agents), sampling=SHORT)  # text agents have a turn each


@pytest.mark.parametrize(
    ("layout", "found"), [("both", "'both'"), (3, "3"), (None, "None"), (["turn"], r"\['turn'\]")]
)
def test_an_unknown_layout_is_refused_everywhere(
    lm: LM, tmp_path: Path, layout: Any, found: str
) -> None:
    path = tmp_path / "team.json"
    path.write_text(
        json.dumps({"layout": layout, "agents": [{"name": "a", "prompt": "{question}"}]})
    )
    with pytest.raises(ValueError, match=rf"team\.json: layout.*: found {found}, expected"):
        Team.from_json(path)
    if layout is not None:
        with pytest.raises(ValueError, match=rf"layout: found {found}, expected one of turn, chat"):
            latent_mas(lm, QUESTIONS[:1], layout=layout, sampling=SHORT)


def test_a_team_keeps_its_layout_in_json(tmp_path: Path) -> None:
    path = tmp_path / "team.json"
    raw = {
        "layout": "turn",
        "opening": "Question: {question}",
        "agents": [{"name": "a", "prompt": "Answer."}],
    }
    path.write_text(json.dumps(raw))
    assert Team.from_json(path) == Team(
        (Agent("a", "Answer."),), layout="turn", opening="Question: {question}"
    )
    assert Team.from_json(path).with_layout("chat").layout == "chat"


def test_an_opening_is_in_every_chat_turn_and_once_in_a_shared_turn(lm: LM) -> None:
    """The question is asked once, and is in the last agent's KV cache for every transfer."""
    agents = (Agent("a", "Plan.{context}"), Agent("b", "Answer.{context}"))
    team = Team(agents, opening="Question: {question}")
    for method in (latent_mas, text_mas):
        [result] = method(lm, QUESTIONS[:1], team, sampling=SHORT)
        assert [trace.prompt.count(QUESTIONS[0]) for trace in result.agents] == [1, 1]

    def texts(transfer: str, questions: list[str]) -> list[Result]:
        return latent_mas(lm, questions, team, 2, layout="turn", transfer=transfer, sampling=SHORT)

    [result] = texts("full", QUESTIONS[:1])
    assert [trace.prompt.count(QUESTIONS[0]) for trace in result.agents] == [1, 1]
    three = replace(team, agents=(agents[0], *agents))
    [result] = latent_mas(lm, QUESTIONS[:1], three, 2, layout="turn", sampling=SHORT)
    assert [trace.prompt.count(QUESTIONS[0]) for trace in result.agents] == [1, 0, 1]
    with watched(lm.model) as (_, caches, _):
        texts("shuffled", QUESTIONS[:2])
    own = lm.model.new_cache(1)
    prefill(lm, preamble_of(team, QUESTIONS[0]), own)
    assert distance(caches[-1].select([0]).truncate(own.lengths[0]), own) < 1e-9


@pytest.mark.parametrize("name", ["single", "sequential", "hierarchical"])
def test_the_default_model_keeps_the_layout_it_was_trained_on(name: str) -> None:
    raw = json.loads((TINY / "teams.json").read_text())
    assert raw[name]["layout"] == "chat"


def test_the_control_tokens_of_the_tests_are_in_the_tokenizer() -> None:
    assert set(CONTROL) <= set(tiny_tokenizer().control) | {"<think>", "</think>"}
