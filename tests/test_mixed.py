"""Check teams of several models: when the model changes, the next one prefills the input again.

Two copies of one model must do what one model does with its KV cache. Another model must not.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minimas import LM, Agent, Result, Team, alignment_matrix, latent_mas, sequential, text_mas
from minimas.core.config import FAMILIES
from minimas.lens import Lens
from minimas.results import AgentEnd, AgentStart, Event

from .models import TINY, apart, reference, tiny_model
from .test_agents import CHAIN, QUESTIONS, encoded
from .text import SHORT, load_text_lm, text_folder, tiny_tokenizer
from .turns import last_turn


def assign_models(team: Team, *names: str | None) -> Team:
    """Return the team with the given model names, assigned to its agents in turn."""
    agents = [replace(agent, model=names[i % len(names)]) for i, agent in enumerate(team.agents)]
    return replace(team, agents=tuple(agents))


def other_lm(folder: Path, seed: int = 1, hidden_size: int = 24) -> LM:
    """Return a model with the same tokenizer, but other weights and sizes."""
    size = tiny_tokenizer().size + 3  # padded, like the vocabularies of large models
    return LM(tiny_model(seed=seed, vocab_size=size, hidden_size=hidden_size), folder)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_text_lm(text_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def big(lm: LM) -> LM:
    return other_lm(lm.folder)


@pytest.mark.parametrize("align", ["ridge", "prenorm"])
@pytest.mark.parametrize(("dtype", "other"), [("double", "float"), ("float", "double")])
def test_models_of_two_dtypes_work_together(lm: LM, align: str, dtype: str, other: str) -> None:
    """A float64 model with a float32 model failed inside of the map, after the first agent."""
    first = LM(tiny_model(seed=0, vocab_size=tiny_tokenizer().size), lm.folder)
    second = other_lm(lm.folder)
    getattr(first.model, dtype)()
    getattr(second.model, other)()
    mixed = assign_models(CHAIN, "b", None)
    how: dict[str, Any] = {"latent_steps": 2, "align": align, "sampling": SHORT}
    [result] = latent_mas(first, QUESTIONS[:1], mixed, models={"b": second}, **how)
    assert result.agents[0].latent_steps == 2
    matrix = second.aligner(align, first).matrix
    assert matrix is not None and matrix.dtype == second.model.dtype


# -- the theorem -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transfer", ["full", "latents", "last"])
@pytest.mark.parametrize("layout", ["turn", "chat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_copies_of_a_model_do_what_one_does(
    tmp_path: Path, family: str, layout: str, transfer: str
) -> None:
    """Explicit input equals the KV cache, also in ragged batches.

    With a model of another seed, it does not.
    """
    one = load_text_lm(text_folder(tmp_path), family)
    team = replace(sequential(), layout=layout)
    how: dict[str, Any] = {"latent_steps": 3, "transfer": transfer}
    stranger = LM(tiny_model(family, seed=5, vocab_size=tiny_tokenizer().size), tmp_path)
    for align, *names in (("ridge", None, "b"), ("prenorm", "b", None), ("ridge", "b", "b", None)):
        how["align"], found = align, []
        expected, cache = last_turn(one, QUESTIONS[:3], team, **how).prefill_and_think()
        for other in (load_text_lm(tmp_path, family), stranger):
            mixed = assign_models(team, *names)
            turn = last_turn(one, QUESTIONS[:3], mixed, models={"b": other}, **how)
            hidden, own = turn.prefill_and_think()
            assert own.lengths == cache.lengths
            found.append(apart(hidden, expected))
        assert found[0] <= 1e-9 < 1e-3 < found[1]


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("steps", [0, 2, "auto"])
def test_rows_that_stop_at_different_steps_and_open_turns_are_prefilled_again(
    lm: LM, steps: int | str, close: bool
) -> None:
    how: dict[str, Any] = {"latent_steps": steps, "close": close}
    how |= {"sampling": SHORT}
    writers = replace(CHAIN, agents=tuple(replace(agent, writes=True) for agent in CHAIN.agents))
    for team in (CHAIN, writers):
        expected, _ = last_turn(lm, QUESTIONS, team, **how).prefill_and_think()
        mixed, models = assign_models(team, None, "twin"), {"twin": load_text_lm(lm.folder)}
        hidden, _ = last_turn(lm, QUESTIONS, mixed, models=models, **how).prefill_and_think()
        assert apart(hidden, expected) <= 1e-9


def test_the_map_between_two_models_is_the_ridge_solution(lm: LM, big: LM) -> None:
    """The map leads from one LM head to embeddings of another model, of another width.

    It is the least-squares solution. Embedding rows that belong to no token are not part of it.
    """
    team = Team((Agent("a", "Plan. {question}"), Agent("b", "Answer.", model="big")))
    events: list[Event] = []
    how: dict[str, Any] = {"latent_steps": 2, "models": {"big": big}, "sampling": SHORT}
    results = latent_mas(lm, QUESTIONS[:2], team, on_event=events.append, **how)
    size = tiny_tokenizer().size
    w_out, w_in = lm.model.lm_head.weight, big.model.embed(torch.arange(size))
    matrix = alignment_matrix(w_out, w_in)
    assert matrix.shape == (16, 24)
    exact = torch.linalg.lstsq(w_out, w_in).solution
    assert apart(matrix, exact) < 1e-4
    hidden, _ = last_turn(lm, QUESTIONS[:2], team, **how).prefill_and_think()
    align = lm.aligner("ridge")
    for row, result in enumerate(results):
        x, told = lm.model.embed(encoded(result.agents[0].prompt)[0]), []
        for _ in range(2):
            state = reference(lm.model, x)[-1:]
            thought = state @ matrix
            told.append(thought * w_in.norm(dim=-1).mean() / thought.norm())
            x = torch.cat([x, align(state)])
        texts = [encoded(text)[0] for text in (result.agents[0].prompt, "<|im_end|>\n")]
        prompt, end, last = (
            big.model.embed(ids) for ids in (*texts, encoded(result.agents[1].prompt)[0])
        )
        fed = torch.cat([prompt, *told, end, last])
        assert apart(hidden[row], reference(big.model, fed)[-1:]) <= 1e-9


@pytest.mark.parametrize("transfer", ["full", "none", "shuffled"])
def test_inputs_prefilled_again_count_as_prompt_tokens_of_the_receiver(
    lm: LM, big: LM, transfer: str
) -> None:
    """Two agents hand over to another model: prompts, thoughts, and the ends of two turns."""
    team = assign_models(CHAIN, None, None, "big")
    how: dict[str, Any] = {"latent_steps": 3, "sampling": SHORT, "transfer": transfer}
    starts: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, AgentStart):
            starts.append(event.prompt_tokens)

    results = latent_mas(lm, QUESTIONS, team, models={"big": big}, on_event=listen, **how)
    alone = latent_mas(lm, QUESTIONS, CHAIN, **how)
    for mixed, one in zip(results, alone, strict=True):
        first, second, last = (agent.prompt_tokens for agent in one.agents)
        again = 0 if transfer == "none" else first + second + 2 * (3 + 2)
        assert [a.prompt_tokens for a in mixed.agents] == [first, second, last + again]
        assert (
            mixed.agents[2].memory_bytes
            == sum([0 if transfer == "none" else first + second + 10, last])
            * big.model.new_cache(1).slot_nbytes
            + (mixed.agents[2].output_tokens - (mixed.finish_reason == "length"))
            * big.model.new_cache(1).slot_nbytes
        )
    assert starts[2] == sum(result.agents[2].prompt_tokens for result in results)


def test_a_lens_decodes_each_thought_with_the_model_that_computed_it(lm: LM, big: LM) -> None:
    """The states of the other model have another width."""
    team, lens = assign_models(CHAIN, None, "big", None), Lens(lm, top=2)
    latent_mas(
        lm, QUESTIONS[:2], team, latent_steps=3, models={"big": big}, sampling=SHORT, on_event=lens
    )
    assert [len(thoughts) for _, thoughts in lens.seen] == [3, 3, 3, 3, 0, 0]


def test_a_text_team_can_mix_models(lm: LM, big: LM) -> None:
    """This is the baseline to compare with: each agent's text comes from its own model."""
    seen: list[Any] = []

    def listen(event: Event) -> None:
        if isinstance(event, AgentEnd):
            seen.append(event.memory.owner)

    def texts(results: list[Result]) -> list[list[str]]:
        return [[agent.text for agent in result.agents] for result in results]

    team = assign_models(CHAIN, None, "big")
    mixed = text_mas(lm, QUESTIONS, team, models={"big": big}, sampling=SHORT, on_event=listen)
    assert seen == [lm.model, big.model, lm.model]
    alone = text_mas(lm, QUESTIONS, CHAIN, sampling=SHORT)
    assert [row[0] for row in texts(mixed)] == [row[0] for row in texts(alone)]
    assert [row[1] for row in texts(mixed)] != [row[1] for row in texts(alone)]
    twin = text_mas(lm, QUESTIONS, team, models={"big": load_text_lm(lm.folder)}, sampling=SHORT)
    assert texts(twin) == texts(alone)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [latent_mas, text_mas])
def test_models_that_do_not_fit_the_team_are_refused_by_name(
    lm: LM, big: LM, tmp_path: Path, method: Any
) -> None:
    """An unused or missing name, or another tokenizer, is an error before any work."""
    team = assign_models(CHAIN, None, "big")
    tokens = (TINY / "tokenizer.json").read_text()
    folder = text_folder(tmp_path)
    (folder / "tokenizer.json").write_text(tokens.replace("<think>", "<thunk>"))
    foreign = other_lm(folder)
    parallel = replace(team, parallel=True)
    memory = lm.model.new_cache(1)
    lm.model(lm.model.embed(torch.tensor([[5]])), memory)
    for chosen, options, said in (
        (CHAIN, {"models": {"big": big}}, r"models: found \['big'\], expected \[\]"),
        (team, {}, r"models: found \[\], expected \['big'\]"),
        (team, {"models": {"large": big}}, r"models: found \['large'\], expected \['big'\]"),
        (team, {"models": {"big": foreign}}, "models: found 'big' with another tokenizer"),
        (team, {"models": {"big": big.model}}, "found Qwen3"),
        (parallel, {"models": {"big": big}}, "models: .*parallel"),
        (team, {"models": {"big": big}, "memory": memory}, "models: .*memory"),
    ):
        with pytest.raises(ValueError, match=said):
            method(lm, QUESTIONS[:1], chosen, sampling=SHORT, **options)


@pytest.mark.parametrize("align", ["identity", "none", "random", lambda hidden: hidden])
def test_a_map_that_cannot_lead_to_the_other_model_is_refused(lm: LM, big: LM, align: Any) -> None:
    with pytest.raises(ValueError, match=r"^align: found .*expected ridge or prenorm"):
        latent_mas(
            lm, QUESTIONS[:1], assign_models(CHAIN, None, "big"), align=align, models={"big": big}
        )


def test_the_shorter_context_of_two_models_is_respected_before_any_work(lm: LM) -> None:
    """The last agent's model prefills the long prompt of the first agent again."""
    size = tiny_tokenizer().size
    short = LM(tiny_model(vocab_size=size, max_position_embeddings=40), lm.folder)
    team = Team((Agent("a", "word " * 20 + "{question}"), Agent("b", "{question}", model="short")))
    events: list[Event] = []
    with pytest.raises(ValueError, match=r"expected at most 40 \(the context"):
        latent_mas(lm, ["a"], team, latent_steps=1, models={"short": short}, on_event=events.append)
    assert events == []


def test_wrong_end_tokens_of_the_second_model_are_found_before_any_work(
    lm: LM, tmp_path: Path
) -> None:
    """They were found when its agent decoded, after the work of all other agents."""
    second = other_lm(text_folder(tmp_path / "second"))
    (second.folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    events: list[Event] = []
    for method in (latent_mas, text_mas):
        with pytest.raises(ValueError, match="eos_token_id: found 'x'"):
            method(
                lm, ["a"], assign_models(CHAIN, None, None, "b"), models={"b": second},
                on_event=events.append,
            )  # fmt: skip
    assert events == []


def test_a_team_file_can_name_models(tmp_path: Path) -> None:
    raw = {"agents": [{"name": "a", "prompt": "{question}", "model": "small"}]}
    assert Team.from_dict(raw, "team").agents[0].model == "small"
    raw["agents"][0]["model"] = 5  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"team: agents\[0\]: model: found 5, expected text"):
        Team.from_dict(raw, "team")
