"""Check that the tokens that a lens shows for a thought equal plain formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minimas import LM, latent_mas, load, single
from minimas.lens import Lens
from minimas.results import Event, Thought

from .models import tiny_model
from .text import SHORT, load_text_lm, text_folder

ASKED = ["How many cards does Eva have?", "Why?"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """Return a random model in float64 with the tokenizer of weights/tiny."""
    return load_text_lm(text_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("team", ["sequential", "hierarchical"])
def test_each_thought_is_shown_for_its_agent_and_question(lm: LM, team: str) -> None:
    """Experts share a batch, and their rows must not be confused with those of the questions."""
    heard: list[Event] = []
    lens = Lens(lm, top=2)

    def listen(event: Event) -> None:
        heard.append(event)
        lens(event)

    results = latent_mas(lm, ASKED, team, latent_steps=3, sampling=SHORT, on_event=listen)
    for q, result in enumerate(results):
        assert [trace for trace, _ in lens.seen[q :: len(ASKED)]] == result.agents
    assert [len(thoughts) for _, thoughts in lens.seen] == [3, 3] * 3 + [0, 0]
    alone = Lens(lm, top=2)
    latent_mas(lm, ASKED[1:], team, latent_steps=3, sampling=SHORT, on_event=alone)
    for (_, both), (_, one) in zip(lens.seen[1 :: len(ASKED)], alone.seen, strict=True):
        for mine, theirs in zip(both, one, strict=True):
            assert mine.tokens[0][0] == theirs.tokens[0][0]
            assert mine.entropy == pytest.approx(theirs.entropy, abs=1e-5)
    thoughts = [event for event in heard if isinstance(event, Thought)]
    first, step = thoughts[0], lens.seen[0][1][0]
    chances = lm.model.logits(first.hidden[0]).softmax(-1)[0]
    assert [p for _, p in step.tokens] == pytest.approx(chances.topk(2).values.tolist(), abs=1e-6)
    assert step.entropy == pytest.approx(float(-(chances * chances.log()).sum()), abs=1e-5)
    assert step.norm == pytest.approx(float(first.embedding[0].norm()), rel=1e-6)
    assert step.cosine_before is None


def test_a_lens_forgets_the_thoughts_of_a_call_that_did_not_finish(lm: LM) -> None:
    """After Ctrl-C, the next call's first agent showed thoughts of the call that was stopped."""

    class StoppedError(Exception):
        pass

    lens = Lens(lm)

    def stop(event: Event) -> None:
        lens(event)
        if isinstance(event, Thought):
            raise StoppedError

    how: dict[str, Any] = {"latent_steps": 2, "sampling": SHORT}
    with pytest.raises(StoppedError):
        latent_mas(lm, ASKED[:1], on_event=stop, **how)
    latent_mas(lm, ASKED, on_event=lens, **how)  # of another batch size
    assert [len(thoughts) for _, thoughts in lens.seen] == [2, 2] * 3 + [0, 0]


def test_the_nearest_token_of_a_token_embedding_is_itself(lm: LM) -> None:
    """The map returns the embedding of a token, which shows which rows are compared."""
    chosen = 40
    assert lm.tokenizer is not None
    row = lm.model.embed(torch.tensor([[chosen]]))  # (1, 1, D)
    lens = Lens(lm)
    latent_mas(
        lm, ASKED, align=lambda hidden: 3 * row.expand_as(hidden), latent_steps=2, sampling=SHORT,
        on_event=lens,
    )  # fmt: skip
    _, thoughts = lens.seen[1]  # the first agent, on the second question
    for thought in thoughts:
        assert thought.nearest == lm.tokenizer.backend.decode([chosen], skip_special_tokens=False)
        assert thought.cosine_nearest == pytest.approx(1)
        assert thought.norm == pytest.approx(3 * float(row.norm()), rel=1e-6)
    assert thoughts[1].cosine_before == pytest.approx(1)


def test_a_lens_changes_nothing_and_shows_nothing_of_a_single_agent(lm: LM) -> None:
    how: dict[str, Any] = {"latent_steps": 3, "sampling": SHORT}
    plain = latent_mas(lm, ASKED, **how)
    assert [r.text for r in latent_mas(lm, ASKED, on_event=Lens(lm), **how)] == [
        r.text for r in plain
    ]
    lens = Lens(lm)
    single(lm, ASKED, sampling=SHORT, on_event=lens)
    assert [thoughts for _, thoughts in lens.seen] == [[], []]


def test_the_thoughts_of_the_default_model_are_numbers() -> None:
    """The plan of weights/tiny is its list of results, which `--show-thoughts` shows."""
    lm = load("weights/tiny")
    lens = Lens(lm)
    question = "Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?"
    latent_mas(lm, [question], on_event=lens)
    said = [thought.tokens[0][0].strip() for thought in lens.seen[0][1]]
    assert said[:3] == ["2", "9", "6"]


def test_a_lens_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="need a tokenizer"):
        Lens(LM(tiny_model(), tmp_path))
