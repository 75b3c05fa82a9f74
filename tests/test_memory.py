"""Check that every method starts after a given memory and does not prefill it again.

The reference is always the same text, fed as tokens. Each equality has a negative control.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from minimas import (
    LM,
    KVCache,
    Result,
    Sampling,
    Team,
    latent_mas,
    load,
    remember,
    single,
    text_mas,
    think,
)
from minimas.core.config import FAMILIES
from minimas.core.model import prefill
from minimas.turns import Run

from .models import distance, tiny_model
from .text import SHORT, load_text_lm, text_folder
from .turns import last_turn

NOTE = "Eva has 2 cards. <|im_end|> She finds 7 more."
ASKED = ["How many cards does Eva have?", "Why?", "She loses 3. How many does Eva have now?"]
METHODS = {"single": single, "text_mas": text_mas, "latent_mas": latent_mas}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """Return a random model in float64 with the tokenizer of weights/tiny."""
    return load_text_lm(text_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("steps", ["auto", None, 1.5, True, -1])
def test_a_wrong_number_of_thoughts_is_named_before_the_prefill(lm: LM, steps: Any) -> None:
    """It was a TypeError, and a number below 0 was noticed only after the whole text."""
    with pytest.raises(ValueError, match=r"^latent_steps: found .*, expected 0 or more$"):
        remember(lm, NOTE, latent_steps=steps)


def feed_first(monkeypatch: pytest.MonkeyPatch, ids: Sequence[int]) -> None:
    """Make runs prefill `ids` before every prompt that starts from an empty KV cache."""
    plain = Run.prefill

    def fed(run: Run, rows: list[list[int]], cache: KVCache) -> tuple[Tensor, KVCache]:
        if not any(cache.lengths):
            rows = [[*ids, *row] for row in rows]
        return plain(run, rows, cache)

    monkeypatch.setattr(Run, "prefill", fed)


def tokens(lm: LM, text: str) -> list[int]:
    """Return the ids of a user message in ChatML. Control tokens in it are encoded as text."""
    assert lm.tokenizer is not None
    opened, end = lm.tokenizer.message(text, "user")
    return lm.tokenizer.encode_turn(opened) + lm.tokenizer.encode_turn(end)


@pytest.mark.parametrize("layout", ["turn", "chat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_equals_its_text_fed_before_the_first_prompt(
    tmp_path: Path, family: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong positions after a memory change every state (theorem 3.3), also in ragged rows."""
    lm = load_text_lm(text_folder(tmp_path), family)
    options: dict[str, Any] = {"layout": layout, "latent_steps": 3}
    used = last_turn(lm, ASKED, memory=remember(lm, NOTE), **options)
    with monkeypatch.context() as patch:
        feed_first(patch, tokens(lm, NOTE))
        fed = last_turn(lm, ASKED, **options)
    assert distance(used.cache, fed.cache) < 1e-9
    assert float((used.prefill_and_think()[0] - fed.prefill_and_think()[0]).abs().max()) < 1e-9
    other = last_turn(lm, ASKED, memory=remember(lm, NOTE.replace("7", "8")), **options)
    assert (
        distance(other.cache, last_turn(lm, ASKED, memory=remember(lm, NOTE), **options).cache)
        > 1e-4
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_memory_is_neither_changed_nor_prefilled_again(lm: LM, method: str) -> None:
    """Counts are those of this call only, and a second call must not see slots of the first."""
    memory, how = remember(lm, NOTE), {"sampling": SHORT}
    before = memory.fork()
    first = METHODS[method](lm, ASKED, memory=memory, **how)
    assert distance(memory, before) == 0
    assert [r.text for r in METHODS[method](lm, ASKED, memory=memory, **how)] == [
        result.text for result in first
    ]
    plain = METHODS[method](lm, ASKED[:1], **how)
    assert first[0].agents[0].prompt_tokens == plain[0].agents[0].prompt_tokens
    assert [r.text for r in METHODS[method](lm, ASKED, **how)] != [r.text for r in first]


@pytest.mark.parametrize("method", METHODS)
def test_every_question_gets_its_own_row_of_the_memory(lm: LM, method: str) -> None:
    """One memory per question equals one call per question. Swapped rows do not."""
    notes = [remember(lm, note) for note in (NOTE, "Short.", "Tom has 3 apples. He eats 1.")]
    joined = stacked(notes)
    texts = [r.text for r in METHODS[method](lm, ASKED, memory=joined, sampling=SHORT)]
    alone = [
        METHODS[method](lm, [question], memory=note, sampling=SHORT)[0].text
        for question, note in zip(ASKED, notes, strict=True)
    ]
    assert texts == alone
    swapped = METHODS[method](lm, ASKED, memory=joined.select([1, 2, 0]), sampling=SHORT)
    assert [r.text for r in swapped] != alone


def stacked(caches: Sequence[KVCache]) -> KVCache:
    """Return one ragged cache from caches of one row."""
    rows = len(caches)
    wide = [cache.select([0] * rows) for cache in caches]
    masked = [
        c.truncate([n * (i == j) for j, n in enumerate(c.lengths)]) for i, c in enumerate(wide)
    ]
    return KVCache.concat(masked)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limit", [1, 5])
def test_a_kept_memory_equals_the_conversation_fed_as_tokens(
    lm: LM, method: str, limit: int
) -> None:
    """It includes the last generated token and the end of the turn, also at the token limit."""
    how: dict[str, Any] = {"sampling": Sampling(max_new_tokens=limit), "keep_memory": True}
    if method == "latent_mas":
        how |= {"latent_steps": 0, "layout": "turn"}
    results = METHODS[method](lm, ASKED, **how)
    assert lm.tokenizer is not None
    for result in results:
        assert result.memory is not None and len(result.memory.lengths) == 1
        shown = result.agents if method == "latent_mas" else result.agents[-1:]
        said = "".join(agent.prompt for agent in shown) + result.text + lm.tokenizer.turn_end
        fed = lm.model.new_cache(1)
        prefill(lm.model, [lm.tokenizer.encode(said)], fed)
        if fed.lengths == result.memory.lengths:  # otherwise, encoding the text gives other ids
            assert distance(result.memory, fed) < 1e-9
        assert result.memory.lengths[0] >= sum(agent.prompt_tokens for agent in shown)
    again = METHODS[method](lm, ASKED[:1], memory=results[0].memory, **how)
    assert again[0].memory is not None
    assert again[0].memory.lengths[0] > results[0].memory.lengths[0]
    assert METHODS[method](lm, ASKED[:1], sampling=SHORT)[0].memory is None


def test_thoughts_of_a_memory_follow_its_text_and_come_before_the_end_of_its_turn(lm: LM) -> None:
    """Thoughts after the end of the turn would start from another state."""
    assert lm.tokenizer is not None
    opened, end = lm.tokenizer.message(NOTE, "user")
    fed = lm.model.new_cache(1)
    hidden = prefill(lm.model, [lm.tokenizer.encode_turn(opened)], fed)
    think(lm.model, lm.aligner("prenorm"), hidden, fed, 4)
    prefill(lm.model, [lm.tokenizer.encode_turn(end)], fed)
    assert distance(remember(lm, NOTE, 4, "prenorm"), fed) < 1e-9
    assert distance(remember(lm, NOTE, 4, "none"), fed) > 1e-4


def test_joined_notes_give_the_answers_of_a_team_of_experts() -> None:
    """Three joined notes equal what a parallel team hands over, with weights/tiny."""
    lm = load("weights/tiny")
    team = Team.from_json("weights/tiny/split.json")
    *experts, last = team.agents
    notes = [remember(lm, agent.prompt, lm.default_steps, role="agent") for agent in experts]
    memory = KVCache.concat(notes)
    questions = [f"How many coins does {name} have?" for name in ("Eva", "Tom", "Ben")]
    expected = latent_mas(lm, questions, team)
    found = latent_mas(lm, questions, Team((last,)), memory=memory)
    assert [result.answer for result in found] == [result.answer for result in expected]
    assert [result.answer for result in expected] == ["Eva 12", "Tom 9", "Ben 11"]


def test_joined_memories_do_not_see_each_other(lm: LM) -> None:
    """`KVCache.concat` is the hand-over of parallel agents (theorem 3.3 with a block mask)."""
    first, second = remember(lm, NOTE), remember(lm, "Tom eats 1.")
    joined = KVCache.concat([first, second])
    assert distance(joined.truncate(first.lengths), first) < 1e-9
    assert distance(joined.keep_last(second.lengths), second) < 1e-9
    [result] = single(lm, ASKED[:1], memory=joined, sampling=SHORT)
    assert result.agents[0].memory_bytes > joined.nbytes


def test_a_saved_memory_gives_the_same_logits(lm: LM, tmp_path: Path) -> None:
    """A file that is loaded but not used would pass every test of equal texts."""
    memory = remember(lm, NOTE, latent_steps=2)
    memory.save(tmp_path / "note.safetensors")
    loaded = KVCache.load(tmp_path / "note.safetensors", lm.model)
    expected, _ = last_turn(lm, ASKED, memory=memory, latent_steps=1).prefill_and_think()
    found, _ = last_turn(lm, ASKED, memory=loaded, latent_steps=1).prefill_and_think()
    without, _ = last_turn(lm, ASKED, latent_steps=1).prefill_and_think()
    assert float((found - expected).abs().max()) < 1e-9
    assert float((found - without).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"text": " "}, "text"),
        ({"text": 3}, "text"),
        ({"text": "\ud800"}, "text"),
        ({"text": "a " * 5000}, "text"),
        ({"text": "a", "latent_steps": -1}, "latent_steps"),
        ({"text": "a", "role": "judge"}, "role"),
        ({"text": "a", "latent_steps": 1, "align": "rigde"}, "align"),
    ],
)
def test_a_wrong_memory_is_refused_by_parameter(
    lm: LM, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{named}: found"):
        remember(lm, **options)


@pytest.mark.parametrize("rows", [2, 4])
def test_a_memory_with_another_number_of_rows_is_refused(lm: LM, rows: int) -> None:
    memory = remember(lm, NOTE).select([0] * rows)
    with pytest.raises(ValueError, match=r"memory: found .*expected a KVCache with 1 row or 3"):
        latent_mas(lm, ASKED, memory=memory)


def test_another_models_memory_is_refused_by_name(lm: LM) -> None:
    other = tiny_model(seed=1, vocab_size=lm.model.config.vocab_size)
    memory = other.new_cache(1)
    prefill(other, [[1, 2]], memory)
    with pytest.raises(ValueError, match="model 'qwen3-1'"):
        single(lm, ASKED, memory=memory)


def test_a_memory_that_leaves_no_room_in_the_context_is_refused_before_any_work(lm: LM) -> None:
    memory = remember(lm, "a " * 1500, role="plain")
    wide = KVCache.concat([memory, memory])
    with pytest.raises(ValueError, match="slots of working memory"):
        latent_mas(lm, ASKED, memory=wide, sampling=Sampling(max_new_tokens=4000))


def test_the_default_model_answers_from_a_kept_memory() -> None:
    """With weights/tiny, a text is remembered once and used for two questions."""
    lm = load("weights/tiny")
    question = "Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?"
    [result] = latent_mas(lm, [question], keep_memory=True)
    assert isinstance(result, Result) and result.memory is not None
    [again] = single(lm, [question], memory=result.memory)
    assert again.agents[0].memory_bytes > result.memory.nbytes
