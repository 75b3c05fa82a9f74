"""Generation, compared with a loop that has no KV cache and computes every token again.

The authors' batch takes a padded row's state at its last slot, which is a pad (LatentMAS #26), and
draws for all rows from one generator, so that an answer depends on its neighbours.
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
    """Scores (V,) of the next token, with no memory at all."""
    return model.logits(model(model.embed(torch.tensor([list(ids)]))))[0, -1]


def naive(
    model: Qwen3, ids: list[int], sampling: Sampling, end_ids: set[int], source: torch.Generator
) -> list[int]:
    """One row alone, with all its tokens computed again for every new token."""
    written: list[int] = []
    while len(written) < sampling.max_new_tokens:
        logits = last_logits(model, ids + written)
        for token in set(ids + written):
            penalty = sampling.repetition_penalty
            logits[token] = (
                logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            )
        token = int(sample(logits[None], sampling, [source]))
        if token in end_ids:
            break
        written.append(token)
    return written


def together(
    model: Qwen3, rows: list[list[int]], count: int, sampling: Sampling, end_ids: set[int]
) -> list[list[int]]:
    """The first `count` tokens of `decode` for all rows at once."""
    cache = model.new_cache(len(rows))
    hidden = prefill(model, rows, cache)
    steps = decode(
        model, hidden, cache, sampling, end_ids, [generator(7, str(row)) for row in rows], rows
    )
    written: list[list[int]] = [[] for _ in rows]
    for _, tokens in zip(range(count), steps, strict=False):
        for row, token in zip(written, tokens, strict=True):
            if token is not None:
                row.append(token)
    return written


@given(ROWS, SAMPLINGS, st.sets(st.integers(0, 40), max_size=6))
@settings(max_examples=40)
def test_decoding_equals_computing_every_token_again(
    model: Qwen3, rows: list[list[int]], sampling: Sampling, end_ids: set[int]
) -> None:
    """Greedy or sampled, ragged or not, with end tokens or without: KV cache and batch are only
    faster.
    """
    expected = [naive(model, row, sampling, end_ids, generator(7, str(row))) for row in rows]
    assert together(model, rows, sampling.max_new_tokens, sampling, end_ids) == expected


@given(ROWS, st.randoms())
def test_a_text_depends_on_no_neighbour_and_no_order(
    model: Qwen3, rows: list[list[int]], random: Any
) -> None:
    """One generator for a batch made question 3's answer depend on how long question 1's was."""
    hot, ends = Sampling(temperature=1.5), {1, 2, 3, 4, 5, 6}
    alone = [together(model, [row], 10, hot, ends)[0] for row in rows]
    order = random.sample(range(len(rows)), len(rows))
    assert together(model, [rows[i] for i in order], 10, hot, ends) == [alone[i] for i in order]


def test_a_seed_and_a_question_make_the_draws() -> None:
    """Another seed or question draws otherwise; the same ones draw the same in any process (no
    PYTHONHASHSEED).
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
    """What `sample` must draw from, in float64, written the long way: sort, cut at k, cut at p,
    share out the rest.
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


def drawn(logits: Tensor, sampling: Sampling, count: int) -> list[int]:
    sources = [generator(i, "draw") for i in range(count)]
    return sample(logits.expand(count, -1), sampling, sources).tolist()


@given(LOGITS, st.floats(0.1, 5), st.integers(0, 12), st.floats(0.01, 1))
@settings(max_examples=100)
def test_only_what_top_k_and_top_p_keep_is_drawn(
    scores: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    """Top-p cuts after top-k and keeps the token that crosses it; cutting before it left nothing to
    draw at all.
    """
    logits, sampling = torch.tensor(scores), Sampling(temperature, top_p, top_k)
    expected = probabilities(logits, sampling)
    distinct = logits.double().sort().values.diff()
    assume(len(scores) == 1 or float(distinct.min()) > 1e-6)  # ties may be cut either way
    mass = expected.sort(descending=True).values.cumsum(-1)
    assume(float((mass - top_p).abs().min()) > 1e-9 or top_p == 1)
    assert set(drawn(logits, sampling, 50)) <= set(expected.nonzero()[:, 0].tolist())


@given(LOGITS, st.floats(0.1, 5), st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]))
@settings(max_examples=50)
def test_only_what_min_p_keeps_is_drawn(
    scores: list[float], temperature: float, min_p: float
) -> None:
    """`min_p` of generation_config.json had no effect, and nobody said so."""
    transformers = pytest.importorskip("transformers")
    logits, sampling = torch.tensor(scores), Sampling(temperature, min_p=min_p)
    kept = transformers.MinPLogitsWarper(min_p)(None, logits[None].double() / temperature)[0]
    share = (logits.double() / temperature - (logits.double() / temperature).max()).exp()
    assume(float((share - min_p).abs().min()) > 1e-9 or min_p == 1)
    allowed = set(kept.isfinite().nonzero()[:, 0].tolist())
    assert set(drawn(logits, sampling, 50)) <= allowed


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(2.0, top_k=4), Sampling(0.7, top_p=0.8), Sampling(1, 0.9, 5)],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """A chi-square bound on 6,000 draws: a wrong temperature or a missing renormalization shows."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5, -3.0])
    expected = probabilities(logits, sampling)
    counts = torch.bincount(torch.tensor(drawn(logits, sampling, 6000)), minlength=len(logits))
    kept = expected > 0
    assert int(counts[~kept].sum()) == 0
    hoped = 6000 * expected[kept]
    chi_square = float(((counts[kept] - hoped) ** 2 / hoped).sum())
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
    """Divided by 1e-320 every score is infinite, and infinity minus infinity is no number."""
    logits = torch.tensor(scores)
    best = logits.double().sort(descending=True).values
    assume(len(scores) == 1 or float(best[0] - best[1]) > 0.1)
    assert set(drawn(logits, Sampling(temperature, top_p, top_k), 5)) == {int(logits.argmax())}


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
@given(LOGITS, st.integers(0, 12), st.floats(0.01, 1))
def test_the_ends_of_the_unit_interval_are_tokens_too(
    draw: float, scores: list[float], top_k: int, top_p: float
) -> None:
    """A draw of 0 may not pick a token of probability 0, nor one next to 1 run off the end."""
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
def test_the_repetition_penalty_is_hugging_faces(rows: list[list[int]], penalty: float) -> None:
    """Dividing a negative score by the penalty would make a repeated token more likely."""
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
def test_a_setting_that_is_no_number_is_refused_by_its_name(name: str, value: Any) -> None:
    """One line names the flag: found what, expected what."""
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
def test_a_setting_out_of_range_is_refused_by_its_name(name: str, value: float) -> None:
    with pytest.raises(ParameterError, match=rf"^{name}: found {value!r}, expected "):
        Sampling(**{name: value})


def test_a_typo_in_a_setting_is_no_setting() -> None:
    with pytest.raises(TypeError):
        Sampling(temprature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, Sampling()),
        (
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
            Sampling(),
        ),  # without do_sample they do nothing
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
            Sampling(0.6, 0.95, 20),
        ),
        ({"do_sample": True, "top_p": None, "temperature": 0.6}, Sampling(0.6, top_k=50)),
        (
            {"do_sample": True, "top_p": 0.9},
            Sampling(1.0, 0.9, 50),
        ),  # Hugging Face samples at 1 then, not greedily, and from 50 tokens
        ({"repetition_penalty": 1.1, "eos_token_id": 2}, Sampling(repetition_penalty=1.1)),
        ({"max_new_tokens": 32}, Sampling(max_new_tokens=32)),
        ({"do_sample": True, "min_p": 0.1}, Sampling(1.0, top_k=50, min_p=0.1)),
        ({"min_p": 0.1}, Sampling()),
    ],
)
def test_the_models_own_settings_are_read_as_hugging_face_reads_them(
    raw: dict[str, Any], expected: Sampling
) -> None:
    assert Sampling.from_dict(raw) == expected


def test_a_wrong_setting_of_a_model_is_refused_by_file_and_field() -> None:
    with pytest.raises(ValueError, match=r"^here\.json: .*top_p.* found 'most', expected"):
        Sampling.from_dict({"do_sample": True, "top_p": "most"}, "here.json")


# -- prefill ---------------------------------------------------------------------------------------


@given(ROWS)
def test_a_rows_state_is_that_of_its_last_token(model: Qwen3, rows: list[list[int]]) -> None:
    """`hidden[:, -1:]` of a ragged batch is the state of a pad: thoughts started from padding
    (LatentMAS #26).
    """
    hidden = prefill(model, rows, model.new_cache(len(rows)))
    for row, state in zip(rows, hidden, strict=True):
        assert float((model(model.embed(torch.tensor([row])))[0, -1] - state[0]).abs().max()) < 1e-9


def test_the_last_slot_is_not_the_last_token(model: Qwen3) -> None:
    """The negative control: what the authors take differs by far more than any tolerance."""
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
    memories, states = [], []
    for size in (chunk, 10**6):
        memories.append(model.new_cache(B))
        prefill(model, first[:B], memories[-1], size)
        states.append(prefill(model, then[:B], memories[-1], size))
    assert float((states[0] - states[1]).abs().max()) < 1e-9
    assert distance(*memories) < 1e-9
    lengths = [len(a) + len(b) for a, b in zip(first, then, strict=False)]
    assert list(map(int, memories[0].lengths)) == lengths


def test_a_row_without_tokens_is_refused(model: Qwen3) -> None:
    with pytest.raises(ValueError, match="found a row without tokens, expected at least one"):
        prefill(model, [[1], []], model.new_cache(2))


@pytest.mark.parametrize("where", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_a_state_that_is_no_number_is_noticed(where: str) -> None:
    """NaN weights decode to token 0 for ever, which looks like an answer."""
    model = tiny_model()
    model.get_parameter(where).data[0, 0] = math.nan
    model.name = "damaged"
    with pytest.raises(ValueError, match=r"^damaged: found a state that is not finite"):
        together(model, [[1, 2]], 1, Sampling(), set())


# -- generating ------------------------------------------------------------------------------------

PROMPTS = [
    tiny_tokenizer().encode(text)
    for text in ("How many cards?", "a", "Eva finds 7 more. She loses 3.")
]


def events_of(
    sampling: Sampling, end_ids: set[int], remember: bool = False, seed: int = 0
) -> tuple[list[tuple[int, str, GeneratedText | None]], KVCache]:
    """What `stream` yields for the three prompts, and the KV cache afterwards."""
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
    """The finished texts of the three prompts, and the KV cache afterwards."""
    events, cache = events_of(sampling, end_ids, remember, seed)
    done = {row: text for row, _, text in events if text is not None}
    return [done[row] for row in range(len(PROMPTS))], cache


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 200), st.booleans())
def test_the_cache_holds_all_generated_tokens_and_no_end_token(
    limit: int, seed: int, ends: int, remember: bool
) -> None:
    """The next agent must see the last word, which is fed only when one more is asked for, and no
    foreign end token.

    A batch whose cache nobody uses afterwards gets smaller as its rows end; the texts must not
    notice.
    """
    model, hot, end_ids = (
        text_model(),
        Sampling(temperature=2.0, max_new_tokens=limit),
        set(range(ends)),
    )
    written, cache = texts_of(hot, end_ids, remember, seed)
    assert texts_of(hot, end_ids, not remember, seed)[0] == written
    for row, (ids, out) in enumerate(zip(PROMPTS, written, strict=True)):
        held = int(cache.lengths[row])
        full = len(ids) + len(out.ids)
        assert held == full if remember else len(ids) <= held <= full
        explicit = model.new_cache(1)
        prefill(model, [(ids + out.ids)[:held]], explicit)
        assert distance(cache.select([row]).truncate(held), explicit) < 1e-9


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 200))
def test_a_text_ends_at_an_end_token_or_at_the_limit(limit: int, seed: int, ends: int) -> None:
    """`finish_reason` tells which, and an end token is never part of the text; any of several ends
    it.
    """
    hot, end_ids = Sampling(temperature=2.0, max_new_tokens=limit), set(range(ends))
    written, _ = texts_of(hot, end_ids, seed=seed)
    endless, _ = texts_of(hot, set(), seed=seed)
    for out, whole in zip(written, endless, strict=True):
        place = next((i for i, token in enumerate(whole.ids) if token in end_ids), None)
        assert out.ids == whole.ids[:place]
        assert out.finish_reason == ("length" if place is None else "stop")
        assert out.text == tiny_tokenizer().decode(out.ids)


@given(st.integers(1, 12), st.integers(0, 5), st.integers(0, 100))
def test_the_streamed_pieces_are_the_text(limit: int, seed: int, ends: int) -> None:
    """The last piece comes with the result; bytes of an unfinished character come then or never."""
    hot, end_ids = Sampling(temperature=2.0, max_new_tokens=limit), set(range(5, ends))
    events, _ = events_of(hot, end_ids, seed=seed)
    pieces, results = [""] * len(PROMPTS), {}
    for row, piece, written in events:
        assert row not in results, "nothing comes after the result"
        pieces[row] += piece
        if written is not None:
            results[row] = written
    model = text_model()
    cache = model.new_cache(len(PROMPTS))
    hidden = prefill(model, PROMPTS, cache)
    sources = [generator(seed, str(ids)) for ids in PROMPTS]
    texts = generate(model, tiny_tokenizer(), hidden, cache, hot, end_ids, sources, PROMPTS)
    assert results == dict(enumerate(texts))
    assert pieces == [results[row].text for row in range(len(PROMPTS))]


def test_an_end_token_at_once_is_an_empty_text() -> None:
    every_id = set(range(text_model().config.vocab_size))
    written, cache = texts_of(Sampling(max_new_tokens=5), every_id)
    assert written == [GeneratedText("", [], "stop")] * 3
    assert list(map(int, cache.lengths)) == [len(ids) for ids in PROMPTS]
