"""Check that on weights/tiny the answer comes from the KV cache of the other agents.

The control arms must have the accuracy that the method implies.
"""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minimas import LM, Result, Sampling, Team, latent_mas, load, single, text_mas
from tools.training.tiny_task import split_stories, split_team, story

ROOT = Path(__file__).resolve().parents[2]
GREEDY = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def lm() -> LM:
    return load(ROOT / "weights" / "tiny")


@pytest.fixture(scope="module")
def told() -> list[Any]:
    rng = random.Random("test")
    return [story(rng, rng.choice((3, 4, 5)), fresh=True) for _ in range(100)]


def right(results: list[Result], told: list[Any]) -> int:
    return sum(r.answer == str(one.totals[-1]) for r, one in zip(results, told, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "team"), [(single, None), (text_mas, "sequential"), (text_mas, "hierarchical")]
)
def test_agents_that_generate_text_solve_the_task(
    lm: LM, told: list[Any], method: Any, team: str | None
) -> None:
    """A comparison of a latent team with a broken text team would mean nothing."""
    options = {"team": team} if team else {}
    assert right(method(lm, [one.question for one in told], sampling=GREEDY, **options), told) >= 90


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({}, 88, 100),
        ({"transfer": "latents"}, 85, 100),
        ({"team": "hierarchical"}, 88, 100),
        ({"transfer": "none"}, 0, 50),
        ({"transfer": "shuffled"}, 0, 25),
        ({"latent_steps": 0}, 0, 50),
        ({"align": "identity"}, 0, 50),
        ({"align": "random"}, 0, 40),
        ({"align": "none"}, 0, 50),
    ],
    ids=str,
)
def test_latent_thoughts_carry_the_answer(
    lm: LM, told: list[Any], options: dict[str, Any], low: int, high: int
) -> None:
    """With the KV cache and W_a, the judger is right. Without either, it guesses.

    This test uses 100 new questions, the model card 1,000.
    """
    questions = [one.question for one in told]
    results = latent_mas(lm, questions, sampling=GREEDY, **options)
    assert low <= right(results, told) <= high


def test_with_another_questions_memory_the_judger_answers_that_question(
    lm: LM, told: list[Any]
) -> None:
    """The judger answers the question in the KV cache, not the one in its prompt."""
    results = latent_mas(lm, [one.question for one in told], sampling=GREEDY, transfer="shuffled")
    assert right(results, told[1:] + told[:1]) >= 85


@pytest.mark.slow
def test_experts_with_different_facts_need_their_kv_caches(lm: LM) -> None:
    """The question is about facts that are only in the prompts of the experts."""
    rng, found = random.Random("split"), {"full": 0, "none": 0}
    for _ in range(40):
        stories, asked = split_stories(rng, fresh=True)
        team = Team.from_dict(split_team([one.text for one in stories]), "split")
        for transfer in found:
            how: dict[str, Any] = {"team": team, "transfer": transfer, "kind": "math"}
            results = latent_mas(lm, [asked.ask], sampling=GREEDY, **how)
            found[transfer] += right(results, [asked])
    assert found["full"] >= 34
    assert found["none"] <= 12


@pytest.mark.slow
def test_the_training_script_runs_resumes_and_saves_its_model_card(tmp_path: Path) -> None:
    """One round is trained, and a second call finds it finished. The folder can be loaded.

    A training script that no test runs can break unnoticed.
    """
    command = [sys.executable, "tools/train_tiny.py"]
    command += "--seed 0 --rounds 1 --questions 2".split()
    command += ["--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch")]
    first, second = (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        for _ in range(2)
    )
    assert "round 1 of 1" in first.stderr, first.stderr
    assert "round 1 of 1" not in second.stderr, second.stderr
    # One round cannot reach the required accuracies.
    assert first.returncode == second.returncode == 1
    assert load(tmp_path / "out").tokenizer is not None
    assert "Shipped: seed 0" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
