"""Complete calls of the methods on a GPU without values, for every team, layout and transfer."""

import functools
from typing import Any

import pytest
import torch

from minimas import LM, Agent, Sampling, Team, latent_mas, remember, single, text_mas
from minimas.agents import TRANSFERS, LatentRun
from minimas.core.model import Qwen3
from minimas.results import Thought, run_to_end

from ..models import TINY, tiny_config
from ..text import tiny_tokenizer
from .gpu import CUDA, FakeGPU

QUESTIONS = ["Eva has 2 cards. She finds 7 more. How many cards does Eva have?", "And Ben?"]
SAMPLING = Sampling(max_new_tokens=3)
STEPS = 2


@functools.cache
def rehearsed() -> tuple[FakeGPU, LM]:
    """Return a small model with the tokenizer and the teams of weights/tiny."""
    gpu = FakeGPU()
    with gpu:
        lm = LM(gpu.load(tiny_config(vocab_size=tiny_tokenizer().size)), TINY)
        lm.aligner("ridge")
    return gpu, lm


@pytest.mark.parametrize(
    ("team", "layout", "transfer"),
    [
        *(("sequential", "turn", transfer) for transfer in TRANSFERS),
        ("sequential", "chat", "full"),
        ("sequential", "chat", "latents"),
        ("hierarchical", "turn", "full"),
        ("hierarchical", "chat", "last"),
    ],
)
def test_latent_mas_stays_on_the_gpu(team: str, layout: str, transfer: str) -> None:
    gpu, lm = rehearsed()
    thoughts: list[Thought] = []

    def keep(event: Any) -> None:
        thoughts.extend([event] if isinstance(event, Thought) else [])

    with gpu:
        results = latent_mas(
            lm, QUESTIONS, team, latent_steps=STEPS, layout=layout, transfer=transfer,
            sampling=SAMPLING, on_event=keep,
        )  # fmt: skip
        assert {thought.hidden.device for thought in thoughts} == {CUDA}
        read = [wait for wait in gpu.waits if not wait.startswith("cpu to")]
        assert read == ["tolist"] * SAMPLING.max_new_tokens, "only the answer's tokens are read"
    assert [result.usage.output_tokens for result in results] == [SAMPLING.max_new_tokens] * 2


def test_agents_that_stop_by_themselves_wait_once_per_thought() -> None:
    """The end tokens were copied to the GPU in each step, and its mask was read twice."""
    gpu, lm = rehearsed()
    sampling = Sampling(max_new_tokens=3, repetition_penalty=1.1)
    with gpu:
        run = LatentRun(lm, QUESTIONS, team="sequential", latent_steps="auto", sampling=sampling)
        cache = lm.model.new_cache(2)
        ids = torch.zeros(2, 1, dtype=torch.int64, device=CUDA)
        hidden = lm.model(lm.model.embed(ids), cache)
        gpu.waits.clear()
        thoughts = run_to_end(run.think(run.align_map, hidden, cache, 3))
        assert gpu.waits == ["tolist"] * len(thoughts) == ["tolist"] * 3
        latent_mas(lm, QUESTIONS, latent_steps="auto", sampling=sampling)
        assert not [wait for wait in gpu.waits if wait.startswith("index")]


def test_text_agents_and_a_memory_stay_on_the_gpu() -> None:
    gpu, lm = rehearsed()
    assert isinstance(lm.model, Qwen3)
    writer = Agent("writer", "Note: {question}", writes=True)
    team = Team((writer, Agent("last", "Answer: {question}")), layout="chat")
    with gpu:
        memory = remember(lm, "Eva has 2 cards.", latent_steps=STEPS)
        options: dict[str, Any] = {"sampling": SAMPLING, "memory": memory, "keep_memory": True}
        for results in (
            single(lm, QUESTIONS, **options),
            text_mas(lm, QUESTIONS, **options),
            latent_mas(lm, QUESTIONS, team, latent_steps=STEPS, **options),
        ):
            for result in results:
                assert result.memory is not None and result.memory.device == CUDA
                assert result.memory.lengths[0] > memory.lengths[0]
