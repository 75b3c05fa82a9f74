"""Generation, compared with a loop that has no KV cache and computes every token again.

The authors' batch takes a padded row's state at its last slot, which is padding (LatentMAS #26). It
also draws for all rows from one generator, so that an answer depends on its neighbours.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minimas import KVCache, Qwen3, Sampling
from minimas.core.errors import ParameterError
from minimas.core.model import prefill, take_last
from minimas.text.generate import GeneratedText, decode, generate, generator, sample, stream

from ..models import distance, tiny_model
from ..text import text_model, tiny_tokenizer

ROWS = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=9), min_size=1, max_size=4)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 1e-6]),
    top_k=st.sampled_from([0, 1, 5, 1000]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    max_new_tokens=st.integers(1, 8),
)


def last_logits(model: Qwen3, ids: Sequence[int]) -> Tensor:
    """Return the logits (V,) of the next token, without a KV cache."""
    return model.logits(model(model.embed(torch.tensor([list(ids)]))))[0, -1]


def generate_naively(
    model: Qwen3, ids: list[int], sampling: Sampling, end_ids: set[int], source: torch.Generator
) -> list[int]:
    """Generate for one row alone, computing all its tokens again for every new token."""
    generated: list[int] = []
    while len(generated) < sampling.max_new_tokens:
        logits = last_logits(model, ids + generated)
        for token in set(ids + generated):
            penalty = sampling.repetition_penalty
            logits[token] = (
                logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            )
        token = int(sample(logits[None], sampling, [source]))
        if token in end_ids:
            break
        generated.append(token)
    return generated


def decode_batch(
    model: Qwen3, rows: list[list[int]], count: int, sampling: Sampling, end_ids: set[int]
) -> list[list[int]]:
    """Return the first `count` tokens of `decode` for all rows at once."""
    cache = model.new_cache(len(rows))
    hidden = prefill(model, rows, cache)
    steps = decode(
        model, hidden, cache, sampling, end_ids, [generator(7, str(row)) for row in rows], rows
    )
    generated: list[list[int]] = [[] for _ in rows]
    for _, tokens in zip(range(count), steps, strict=False):
        for row, token in zip(generated, tokens, strict=True):
            if token is not None:
                row.append(token)
    return generated


@given(ROWS, SAMPLINGS, st.sets(st.integers(0, 40), max_size=6))
@settings(max_examples=40)
def test_decoding_equals_computing_every_token_again(
    model: Qwen3, rows: list[list[int]], sampling: Sampling, end_ids: set[int]
) -> None:
    """This holds for greedy and sampled tokens, ragged rows and end tokens.

    KV cache and batch only save time.
    """
    expected = [
        generate_naively(model, row, sampling, end_ids, generator(7, str(row))) for row in rows
    ]
    assert decode_batch(model, rows, sampling.max_new_tokens, sampling, end_ids) == expected


@given(ROWS, st.randoms())
def test_a_text_does_not_depend_on_its_neighbours_or_their_order(
    model: Qwen3, rows: list[list[int]], random: Any
) -> None:
    """With one generator per batch, an answer depended on the length of the answers before it."""
    hot, ends = Sampling(temperature=1.5), {1, 2, 3, 4, 5, 6}
    alone = [decode_batch(model, [row], 10, hot, ends)[0] for row in rows]
    order = random.sample(range(len(rows)), len(rows))
    assert decode_batch(model, [rows[i] for i in order], 10, hot, ends) == [alone[i] for i in order]


def test_draws_depend_only_on_the_seed_and_the_question() -> None:
    """Another seed or question gives other draws.

    The same ones give the same draws in any process (no PYTHONHASHSEED).
    """
    draws = {
        key: torch.rand(3, generator=generator(*key)).tolist()
        for key in [(0, "a"), (1, "a"), (0, "b"), (10, "")]
    }
    assert len({tuple(draw) for draw in draws.values()}) == 4
    assert draws[0, "a"] == torch.rand(3, generator=generator(0, "a")).tolist()
    assert generator(0, "How many?").initial_seed() == 2124453787171899
    generator(10**400, "\ud800")  # any whole number, and any text that Python can hold


# -- choosing a token ------------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-8, 8), min_size=1, max_size=12)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution that `sample` must draw from, in float64, by a longer way.

    It sorts, cuts at k, cuts at p and renormalizes the rest.
    """
    p = (logits.double() / sampling.temperature).softmax(-1)
    order = sorted(range(len(p)), key=lambda i: -float(p[i]))[: sampling.top_k or len(p)]
    total, kept, mass = sum(float(p[i]) for i in order), [], 0.0
    for i in order:
        if mass >= sampling.top_p:
            break
        kept.append(i)
        mass += float(p[i]) / total
    result = torch.zeros_like(p)
    result[kept] = p[kept]
    return result / result.sum()


def draw_tokens(logits: Tensor, sampling: Sampling, count: int) -> list[int]:
    sources = [generator(i, "draw") for i in range(count)]
    return sample(logits.expand(count, -1), sampling, sources).tolist()


@given(LOGITS, st.floats(0.1, 5), st.integers(0, 12), st.floats(0.01, 1))
@settings(max_examples=100)
def test_only_tokens_kept_by_top_k_and_top_p_are_drawn(
    scores: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    """Top-p cuts after top-k and keeps the token that crosses it.

    Cutting before that token left nothing to draw.
    """
    logits, sampling = torch.tensor(scores), Sampling(temperature, top_p, top_k)
    expected = probabilities(logits, sampling)
    distinct = logits.double().sort().values.diff()
    assume(len(scores) == 1 or float(distinct.min()) > 1e-6)  # ties may be cut either way
    mass = expected.sort(descending=True).values.cumsum(-1)
    assume(float((mass - top_p).abs().min()) > 1e-9 or top_p == 1)
    assert set(draw_tokens(logits, sampling, 50)) <= set(expected.nonzero()[:, 0].tolist())


@given(LOGITS, st.floats(0.1, 5), st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]))
@settings(max_examples=50)
def test_only_tokens_kept_by_min_p_are_drawn(
    scores: list[float], temperature: float, min_p: float
) -> None:
    """`min_p` of generation_config.json silently had no effect."""
    transformers = pytest.importorskip("transformers")
    logits, sampling = torch.tensor(scores), Sampling(temperature, min_p=min_p)
    kept = transformers.MinPLogitsWarper(min_p)(None, logits[None].double() / temperature)[0]
    share = (logits.double() / temperature - (logits.double() / temperature).max()).exp()
    assume(float((share - min_p).abs().min()) > 1e-9 or min_p == 1)
    allowed = set(kept.isfinite().nonzero()[:, 0].tolist())
    assert set(draw_tokens(logits, sampling, 50)) <= allowed


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(2.0, top_k=4), Sampling(0.7, top_p=0.8), Sampling(1, 0.9, 5)],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """A chi-square bound on 6,000 draws shows a wrong temperature or a missing renormalization."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5, -3.0])
    expected = probabilities(logits, sampling)
    counts = torch.bincount(
        torch.tensor(draw_tokens(logits, sampling, 6000)), minlength=len(logits)
    )
    kept = expected > 0
    assert int(counts[~kept].sum()) == 0
    expected_counts = 6000 * expected[kept]
    chi_square = float(((counts[kept] - expected_counts) ** 2 / expected_counts).sum())
    assert chi_square < 30  # 99.99 % of fair draws with up to six degrees of freedom
    wrong = (
        probabilities(
            logits, dataclasses.replace(sampling, temperature=1.4 * sampling.temperature)
        )[kept]
        * 6000
    )
    assert float(((counts[kept] - wrong) ** 2 / wrong).sum()) > 30  # the negative control


@given(LOGITS, st.floats(0, 1e-3), st.integers(0, 5), st.floats(1e-6, 1))
@example([1.0, 2.0, 0.0], 1e-320, 0, 1.0)
@example([1.0, 2.0, 0.0], 1e-308, 2, 0.5)
def test_a_temperature_near_zero_is_greedy(
    scores: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    """Divided by 1e-320, every logit is infinite, and infinity minus infinity is NaN."""
    logits = torch.tensor(scores)
    best = logits.double().sort(descending=True).values
    assume(len(scores) == 1 or float(best[0] - best[1]) > 0.1)
    assert set(draw_tokens(logits, Sampling(temperature, top_p, top_k), 5)) == {
        int(logits.argmax())
    }


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
@given(LOGITS, st.integers(0, 12), st.floats(0.01, 1))
def test_random_numbers_at_the_ends_of_the_unit_interval_give_valid_tokens(
    draw: float, scores: list[float], top_k: int, top_p: float
) -> None:
    """A draw of 0 must not pick a token of probability 0.

    One close to 1 must not run off the end.
    """
    logits, sampling = torch.tensor([scores]), Sampling(1.0, top_p, top_k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "rand", lambda *size, **kwargs: torch.tensor(draw, dtype=torch.float64)
        )
        token = int(sample(logits, sampling, [generator(0, "")]))
    assert 0 <= token < len(scores)
    if draw == 0.0:
        assert float(logits[0, token]) == float(logits.max())


@given(ROWS, st.sampled_from([1.0001, 1.3, 5.0, 0.7]))
def test_the_repetition_penalty_is_that_of_hugging_face(
    rows: list[list[int]], penalty: float
) -> None:
    """Dividing a negative logit by the penalty would make a repeated token more likely."""
    transformers = pytest.importorskip("transformers")
    model = text_model()
    cache = model.new_cache(len(rows))
    hidden = prefill(model, rows, cache)
    sampling, sources = Sampling(repetition_penalty=penalty), [generator(0, "")] * len(rows)
    tokens = next(decode(model, hidden, cache, sampling, (), sources, rows))
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    for row, hidden_row, token in zip(rows, hidden, tokens, strict=True):
        scores = processor(torch.tensor([row]), model.logits(hidden_row[None])[:, -1])
        assert token == int(scores.argmax())


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, "hot", None, True, [1], pytest.param(10**400, id="huge")]
)
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Sampling)])
def test_a_setting_that_is_not_a_number_is_refused(name: str, value: Any) -> None:
    """One line names the flag, what was found and what was expected."""
    with pytest.raises(ParameterError, match=rf"^{name}: found .*, expected "):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (-1, -0.01)],
        *[("top_p", v) for v in (0, -1, 1.01)],
        *[("top_k", v) for v in (-1, 1.5)],
        *[("repetition_penalty", v) for v in (0, -1)],
        *[("max_new_tokens", v) for v in (0, -1, 1.5)],
        *[("min_p", v) for v in (-0.1, 1.01)],
    ],
)
def test_a_setting_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ParameterError, match=rf"^{name}: found {value!r}, expected "):
        Sampling(**{name: value})


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(TypeError):
        Sampling(temprature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, Sampling()),
        (
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
            Sampling(),
        ),  # without do_sample they have no effect
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
            Sampling(0.6, 0.95, 20),
        ),
        ({"do_sample": True, "top_p": None, "temperature": 0.6}, Sampling(0.6, top_k=50)),
        (
            {"do_sample": True, "top_p": 0.9},
            Sampling(1.0, 0.9, 50),
        ),  # then Hugging Face is not greedy, but samples from 50 tokens at temperature 1
        ({"repetition_penalty": 1.1, "eos_token_id": 2}, Sampling(repetition_penalty=1.1)),
        ({"max_new_tokens": 32}, Sampling(max_new_tokens=32)),
        ({"do_sample": True, "min_p": 0.1}, Sampling(1.0, top_k=50, min_p=0.1)),
        ({"min_p": 0.1}, Sampling()),
    ],
)
def test_generation_config_is_interpreted_as_in_hugging_face(
    raw: dict[str, Any], expected: Sampling
) -> None:
    assert Sampling.from_dict(raw) == expected


def test_an_invalid_generation_config_is_refused_with_its_file_and_field() -> None:
    with pytest.raises(ValueError, match=r"^here\.json: .*top_p.* found 'most', expected"):
        Sampling.from_dict({"do_sample": True, "top_p": "most"}, "here.json")


# -- prefill ---------------------------------------------------------------------------------------


@given(ROWS)
def test_prefill_returns_the_state_of_the_last_token_of_each_row(
    model: Qwen3, rows: list[list[int]]
) -> None:
    """In a ragged batch, `hidden[:, -1:]` is the state of padding.

    Thoughts then start from padding (LatentMAS #26).
    """
    hidden = prefill(model, rows, model.new_cache(len(rows)))
    for row, state in zip(rows, hidden, strict=True):
        assert float((model(model.embed(torch.tensor([row])))[0, -1] - state[0]).abs().max()) < 1e-9


def test_the_last_slot_differs_from_the_last_token(model: Qwen3) -> None:
    """The negative control: the authors' state differs by far more than any tolerance."""
    ids = torch.tensor([[5, 6, 0, 0], [1, 2, 3, 4]])
    hidden = model(model.embed(ids), model.new_cache(2), torch.tensor([2, 4]))
    assert float((take_last(hidden, torch.tensor([2, 4]))[0] - hidden[0, -1:]).abs().max()) > 0.1


@pytest.mark.parametrize("lengths", [[0, 2], [1, 5], [-1, 1]])
def test_a_length_outside_the_chunk_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^lengths: found .*, expected 1 … 4"):
        take_last(torch.zeros(2, 4, 3), torch.tensor(lengths))


@given(ROWS, ROWS, st.integers(1, 10))
def test_prefill_in_chunks_equals_prefill(
    model: Qwen3, first: list[list[int]], then: list[list[int]], chunk: int
) -> None:
    """A row that ends in an early chunk keeps its state and its length through the later ones."""
    B = min(len(first), len(then))
    caches, states = [], []
    for size in (chunk, 10**6):
        caches.append(model.new_cache(B))
        prefill(model, first[:B], caches[-1], size)
        states.append(prefill(model, then[:B], caches[-1], size))
    assert float((states[0] - states[1]).abs().max()) < 1e-9
    assert distance(*caches) < 1e-9
    lengths = [len(a) + len(b) for a, b in zip(first, then, strict=False)]
    assert list(map(int, caches[0].lengths)) == lengths


def test_a_row_without_tokens_is_refused(model: Qwen3) -> None:
    with pytest.raises(ValueError, match="found a row without tokens, expected at least one"):
        prefill(model, [[1], []], model.new_cache(2))


@pytest.mark.parametrize("where", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_a_state_that_is_not_finite_is_refused(where: str) -> None:
    """NaN weights decode to token 0 forever, which looks like an answer."""
    model = tiny_model()
    model.get_parameter(where).data[0, 0] = math.nan
    model.name = "damaged"
    with pytest.raises(ValueError, match=r"^damaged: found a state that is not finite"):
        decode_batch(model, [[1, 2]], 1, Sampling(), set())


# -- generating ------------------------------------------------------------------------------------

PROMPTS = [
    tiny_tokenizer().encode(text)
    for text in ("How many cards?", "a", "Eva finds 7 more. She loses 3.")
]


def events_of(
    sampling: Sampling, end_ids: set[int], remember: bool = False, seed: int = 0
) -> tuple[list[tuple[int, str, GeneratedText | None]], KVCache]:
    """Return what `stream` yields for the three prompts, and the KV cache afterwards."""
    model = text_model()
    cache = model.new_cache(len(PROMPTS))
    hidden = prefill(model, PROMPTS, cache)
    sources = [generator(seed, str(ids)) for ids in PROMPTS]
    events = stream(
        model, tiny_tokenizer(), hidden, cache, sampling, end_ids, sources, PROMPTS, remember
    )
    return list(events), cache


def texts_of(
    sampling: Sampling, end_ids: set[int], remember: bool = False, seed: int = 0
) -> tuple[list[GeneratedText], KVCache]:
    """Return the finished texts of the three prompts, and the KV cache afterwards."""
    events, cache = events_of(sampling, end_ids, remember, seed)
    done = {row: text for row, _, text in events if text is not None}
    return [done[row] for row in range(len(PROMPTS))], cache


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 200), st.booleans())
def test_the_cache_holds_all_generated_tokens_and_no_end_token(
    limit: int, seed: int, ends: int, remember: bool
) -> None:
    """The next agent must see the last token, although it is fed only if another one follows.

    It must not see an end token of another row. If the cache is not used afterwards, the batch
    shrinks as rows end. The texts must not depend on that.
    """
    model, hot, end_ids = (
        text_model(),
        Sampling(temperature=2.0, max_new_tokens=limit),
        set(range(ends)),
    )
    texts, cache = texts_of(hot, end_ids, remember, seed)
    assert texts_of(hot, end_ids, not remember, seed)[0] == texts
    for row, (ids, out) in enumerate(zip(PROMPTS, texts, strict=True)):
        held = int(cache.lengths[row])
        full = len(ids) + len(out.ids)
        assert held == full if remember else len(ids) <= held <= full
        explicit = model.new_cache(1)
        prefill(model, [(ids + out.ids)[:held]], explicit)
        assert distance(cache.select([row]).truncate(held), explicit) < 1e-9


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 200))
def test_a_text_ends_at_an_end_token_or_at_the_limit(limit: int, seed: int, ends: int) -> None:
    """`finish_reason` says which. Any of several end tokens ends a text and is never part of it."""
    hot, end_ids = Sampling(temperature=2.0, max_new_tokens=limit), set(range(ends))
    texts, _ = texts_of(hot, end_ids, seed=seed)
    endless, _ = texts_of(hot, set(), seed=seed)
    for out, whole in zip(texts, endless, strict=True):
        place = next((i for i, token in enumerate(whole.ids) if token in end_ids), None)
        assert out.ids == whole.ids[:place]
        assert out.finish_reason == ("length" if place is None else "stop")
        assert out.text == tiny_tokenizer().decode(out.ids)


@given(st.integers(1, 12), st.integers(0, 5), st.integers(0, 100))
def test_streamed_pieces_add_up_to_the_text(limit: int, seed: int, ends: int) -> None:
    """The last piece comes with the result. Bytes of an unfinished character come then or never."""
    hot, end_ids = Sampling(temperature=2.0, max_new_tokens=limit), set(range(5, ends))
    events, _ = events_of(hot, end_ids, seed=seed)
    pieces, results = [""] * len(PROMPTS), {}
    for row, piece, result in events:
        assert row not in results, "nothing comes after the result"
        pieces[row] += piece
        if result is not None:
            results[row] = result
    model = text_model()
    cache = model.new_cache(len(PROMPTS))
    hidden = prefill(model, PROMPTS, cache)
    sources = [generator(seed, str(ids)) for ids in PROMPTS]
    texts = generate(model, tiny_tokenizer(), hidden, cache, hot, end_ids, sources, PROMPTS)
    assert results == dict(enumerate(texts))
    assert pieces == [results[row].text for row in range(len(PROMPTS))]


def test_an_end_token_as_the_first_token_gives_an_empty_text() -> None:
    every_id = set(range(text_model().config.vocab_size))
    texts, cache = texts_of(Sampling(max_new_tokens=5), every_id)
    assert texts == [GeneratedText("", [], "stop")] * 3
    assert list(map(int, cache.lengths)) == [len(ids) for ids in PROMPTS]
