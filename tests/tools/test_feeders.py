"""Check that feeders equal their equations in float64 and do not depend on the batch."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minimas import LM, Aligner, Qwen3, Sampling, latent_mas, load, think
from minimas.text.generate import generator
from tools.evaluation import feeders
from tools.evaluation.arms import Arm
from tools.evaluation.bench import Bench, CallOptions
from tools.evaluation.feeders import (
    TOKENS,
    Feeders,
    Mixture,
    feeder,
    fit,
    match_means,
    observe,
    parse,
    plain_text,
)  # fmt: skip
from tools.evaluation.grading import plain_grader
from tools.evaluation.last_turn import latent_turn

from ..models import TINY, apart, random_ids, reference, remember, tiny_model
from ..text import load_text_lm, text_model, tiny_tokenizer

KINDS = (
    "gain:0.5",
    "mean",
    "fitted",
    "soft",
    "soft:2:3",
    "gumbel",
    "gumbel:0.5",
    "token",
    "pause",
    "pause: Tom",
)
TEXT = "Eva has 2 cards. She finds 7 more. Tom has 3 coins. He loses 1. He gets 7 more. " * 20
QUESTIONS = [
    "Eva has 2 cards. How many?",
    "Tom?",
    "Ann has 8 books. She finds 1 more. She loses 3.",
]


@pytest.fixture(scope="module")
def lm() -> LM:
    return load_text_lm(TINY)


@pytest.fixture(scope="module")
def made(lm: LM) -> Feeders:
    return Feeders(lm, TEXT)


def states(model: Qwen3, rows: int = 3) -> Tensor:
    return model(model.embed(random_ids(model, rows, 4)))[:, -1:]


def table(model: Qwen3) -> tuple[Tensor, Tensor]:
    return model.model.embed_tokens.weight, model.lm_head.weight


# -- the equations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_the_gain_is_divided_out_to_any_power_and_keeps_its_sign(power: float) -> None:
    """A negative gain has no power of ½.

    With the absolute value alone, power 1 would not be prenorm.
    """
    model = tiny_model()
    gain = model.model.norm.weight
    gain[::3] *= -1
    h = states(model)
    expected = h.clone()
    for i, g in enumerate(gain.tolist()):
        expected[..., i] /= g**power if power.is_integer() else math.copysign(abs(g) ** power, g)
    expected = Aligner.from_model(model, "ridge")(expected)
    assert apart(feeder(model, f"gain:{power:g}")(h), expected) <= 1e-12
    for whole, name in ((0.0, "ridge"), (1.0, "prenorm")):
        same = apart(Aligner.from_model(model, name)(h), expected) <= 1e-12
        assert same == (power == whole)


def test_mean_changes_only_the_mean_and_the_spread(model: Qwen3) -> None:
    """Mapped states of the text have the mean and the mean square distance of the embeddings."""
    ids = random_ids(model, 1, 400)[0].tolist()
    h, _ = observe(model, ids)
    mapped, w_in = match_means(model, ids)(h), table(model)[0]
    assert apart(mapped.mean(0), w_in.mean(0)) <= 1e-9
    spreads = [(x - x.mean(0)).square().sum(-1).mean() for x in (mapped, w_in)]
    torch.testing.assert_close(*spreads)
    factor = (mapped[1] - mapped[0]).norm() / (h[1] - h[0]).norm()
    assert apart(mapped[5] - mapped[3], (h[5] - h[3]) * factor) <= 1e-9


def test_fitted_is_the_ridge_solution_from_each_state_to_the_next_token(model: Qwen3) -> None:
    """An offset of one would map a state to the token that was just fed.

    The result equals least squares on stacked rows.
    """
    ids = random_ids(model, 1, 100)[0].tolist()
    width = 99  # one window
    h = reference(model, model.embed(torch.tensor(ids[:width])))[1:]
    e = model.embed(torch.tensor(ids[2:]))
    ridge = 1e-3 * h.square().sum() / 16
    stacked = torch.cat([h, ridge.sqrt() * torch.eye(16, dtype=torch.float64)])
    w = torch.linalg.lstsq(
        stacked, torch.cat([e, torch.zeros(16, 16, dtype=torch.float64)])
    ).solution
    expected = h @ w / (h @ w).norm(dim=-1, keepdim=True) * table(model)[0].norm(dim=-1).mean()
    found = fit(model, ids)
    assert apart(found(h), expected) <= 1e-9
    late = torch.linalg.lstsq(h, model.embed(torch.tensor(ids[1:width]))).solution
    assert found.matrix is not None
    assert apart(found.matrix, late) > 0.1


def test_fitted_predicts_better_than_the_papers_map_only_if_the_text_is_predictable() -> None:
    """The negative control is a text of random tokens, where it must not predict better."""
    lm = load_text_lm(TINY)
    said = tiny_tokenizer().encode(TEXT)
    drawn = random_ids(lm.model, 1, len(said))[0].tolist()

    def closeness(ids: list[int], align: Aligner) -> float:
        h, following = observe(lm.model, ids)
        return float(torch.cosine_similarity(align(h), lm.model.embed(following), dim=-1).mean())

    ridge = Aligner.from_model(lm.model)
    assert closeness(said, fit(lm.model, said)) > closeness(said, ridge) + 0.3
    other = random_ids(lm.model, 1, len(said), seed=1)[0].tolist()
    assert abs(closeness(other, fit(lm.model, drawn)) - closeness(other, ridge)) < 0.1


@pytest.mark.parametrize(
    ("temperature", "most"), [(1.0, 0), (0.3, 0), (1.0, 3), (2.0, 1), (1.0, 99)]
)
def test_soft_is_the_expected_embedding(model: Qwen3, temperature: float, most: int) -> None:
    """Probabilities of the K likeliest tokens are normalized, or thoughts would be too short."""
    h, (w_in, w_out) = states(model), table(model)
    found = Mixture(model, temperature, most, rows=None, noisy=False)(h)
    for row in range(3):
        scores = (w_out @ h[row, 0]) / temperature
        kept = scores.topk(min(most or 41, 41)).indices
        shares = torch.zeros(41, dtype=torch.float64)
        shares[kept] = scores[kept].exp() / scores[kept].exp().sum()
        assert apart(found[row, 0], shares @ w_in) <= 1e-12


def test_gumbel_draws_each_token_as_often_as_its_probability() -> None:
    """At a temperature near 0, the mixture is one token drawn from the softmax.

    Noise with another distribution would be biased.
    """
    model = tiny_model()
    h = states(model, 1)
    draw = Mixture(model, 1e-4, 0, rows=None, noisy=True).with_generators(
        [torch.Generator().manual_seed(0)] * 4000
    )
    drawn = draw(h.expand(4000, 1, 16))[:, 0]
    tokens = torch.cdist(drawn, table(model)[0]).argmin(-1)
    expected = (table(model)[1] @ h[0, 0]).softmax(-1)
    counts = torch.bincount(tokens, minlength=41) / 4000
    assert float((counts - expected).abs().max()) < 0.03


def test_token_and_pause_return_embeddings(model: Qwen3) -> None:
    """Both return the embedding of a token. With pause, it does not depend on the state."""
    h = states(model)
    chosen = (h @ table(model)[1].T).argmax(-1)
    assert torch.equal(feeder(model, "token")(h), table(model)[0][chosen])
    lm = load_text_lm(TINY)
    made = Feeders(lm)
    tom = lm.model.embed(torch.tensor(tiny_tokenizer().encode(" Tom")[:1]))
    assert torch.equal(made("pause: Tom")(states(lm.model)), tom.expand(3, 1, -1))
    assert not torch.equal(made("pause")(states(lm.model)), tom.expand(3, 1, -1))


def test_no_feeder_uses_padding_rows_of_the_embeddings(model: Qwen3) -> None:
    """Qwen3's table has 267 rows of padding after the last token.

    A mixture with these rows would contain noise.
    """
    padded = tiny_model(vocab_size=tiny_tokenizer().size + 9)
    before = {
        kind: feeder(padded, kind, tiny_tokenizer(), TEXT)(states(padded))
        for kind in KINDS
        if kind[0] != "g"
    }
    h = states(padded)
    padded.model.embed_tokens.weight[-9:] = 1e3
    padded.lm_head.weight[-9:] *= 1e3
    for kind, embedding in before.items():
        assert torch.equal(feeder(padded, kind, tiny_tokenizer(), TEXT)(h), embedding), kind


# -- in a team -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_thought_does_not_depend_on_the_batch(lm: LM, made: Feeders, kind: str) -> None:
    """Gumbel noise drawn for a whole batch would make thoughts depend on other questions."""
    heard: list[list[list[float]]] = []
    inner = made(kind)

    class Tap:
        def with_generators(self, generators: list[torch.Generator]) -> "Tap":
            self.align = (
                inner.with_generators(generators) if hasattr(inner, "with_generators") else inner
            )
            return self

        def __call__(self, hidden: Tensor) -> Tensor:
            embedding: Tensor = self.align(hidden)
            heard[-1] += embedding[:, 0].tolist()
            return embedding

    def thoughts(questions: list[str], seed: int = 0) -> Tensor:
        heard.append([])
        sampling = Sampling(max_new_tokens=1)
        latent_turn(lm, questions, latent_steps=3, align=Tap(), sampling=sampling, seed=seed)
        return torch.tensor(heard[-1], dtype=torch.float64).view(
            -1, len(questions), 16
        )  # (agents · steps, B, D)

    together = thoughts(QUESTIONS)
    for q, question in enumerate(QUESTIONS):
        assert apart(together[:, q : q + 1], thoughts([question])) <= 1e-9
    other = apart(together, thoughts(QUESTIONS, seed=1)) > 1e-3
    assert other == kind.startswith("gumbel")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_thought_has_the_dtype_of_the_model(kind: str, dtype: torch.dtype) -> None:
    """A float32 thought would promote every layer of a bf16 model."""
    model = text_model(dtype=dtype)
    hidden, cache = remember(model, random_ids(model, 2, 3))
    thoughts, last = think(
        model, feeder(model, kind, tiny_tokenizer(), TEXT), hidden[:, -1:], cache, 2
    )
    assert thoughts.dtype == last.dtype == dtype
    assert bool(torch.isfinite(thoughts).all())


def test_gumbel_noise_comes_from_the_generator_of_the_question() -> None:
    """The noise is seeded by (seed, question), like all random numbers here."""
    model = tiny_model()
    gumbel = Mixture(model, 1.0, 0, rows=None, noisy=True)
    h = states(model, 1)
    first, again, other = (
        gumbel.with_generators([generator(seed, "Tom?")])(h) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert apart(first, other) > 1e-3


# -- kinds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ",gain,gain:,gain:x,gain:-1,gain:nan,gain:1:2,mean:1,soft:0,soft:x,soft:1:x,soft:1:2:3,soft:-1,"
    "soft:,gumbel:0,gumbel:1:2,token:1,pause:,ridge:1,Soft,None".split(","),
)
def test_an_unknown_kind_is_refused_with_a_list_of_kinds(kind: str, made: Feeders) -> None:
    """The error names the flag.

    If an unused value were accepted, an arm would not do what its name says.
    """
    with pytest.raises(
        ValueError,
        match=r"align: found .*, expected one of ridge, .*gain:P, mean, fitted",
    ):
        made(kind)


def test_defaults_are_filled_in() -> None:
    assert parse("soft") == ("soft", ("1", "0"))
    assert parse("soft:.5:10") == ("soft", (".5", "10"))
    assert parse("pause:a:b") == ("pause", ("a:b",))


def test_an_error_names_what_a_kind_needs(lm: LM) -> None:
    """Without a tokenizer, there is no text to fit a map to, and no token for pause."""
    for kind in ("mean", "fitted", "pause"):
        with pytest.raises(ValueError, match=r"align: found .* needs a model with tokenizer.json"):
            feeder(lm.model, kind)
    with pytest.raises(ValueError, match=r"--fit-text\): found 2 tokens"):
        feeder(lm.model, "mean", tiny_tokenizer(), "Tom has")


def test_the_built_in_text_is_long_enough() -> None:
    """A token of Qwen3 covers 4.5 characters of the text on average."""
    assert len(plain_text()) > 6 * TOKENS


def test_a_changed_built_in_text_is_refused_by_name(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another text, `fitted` is another map. Other line endings, as from Git, are accepted."""
    text, other = plain_text(), tmp_path / "plain_text.txt"
    monkeypatch.setattr(feeders, "PLAIN_TEXT", other)
    other.write_text(text, encoding="utf-8", newline="\r\n")
    assert plain_text() == text
    other.write_text(text + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{other}: found sha256 .*, expected {feeders.SHA256}"):
        Feeders(lm)("fitted")


def test_a_map_is_fitted_only_once(made: Feeders) -> None:
    """Ten thousand tokens take half a minute on a CPU."""
    assert made("fitted") is made("fitted")


def test_kinds_of_the_library_are_delegated_to_it(lm: LM, made: Feeders, tmp_path: Path) -> None:
    """The five kinds of Aligner and saved files must give the aligners of the library."""
    lm.aligner("random").save(tmp_path / "a.safetensors")
    for kind in ("ridge", "none", str(tmp_path / "a.safetensors")):
        assert made(kind) is lm.aligner(kind)


def test_every_arm_uses_its_own_feeder(lm: LM, made: Feeders) -> None:
    """If all arms used the same map, they would be found not to differ."""
    rows = [{"id": "a", "question": "Eva has 2 cards.", "answer": "2"}]
    bench = Bench(lm, rows, 1, Sampling(), plain_grader, made)
    memories = []
    for kind in ("ridge", "fitted", "pause"):
        memories.append(bench.last_turn([0], Arm("x", latent_steps=2, align=kind)).memory.keys[1])
        by_hand = bench.last_turn(
            [0], Arm("x", latent_steps=2), CallOptions(align=made(kind))
        ).memory.keys[1]
        assert torch.equal(memories[-1], by_hand)
    assert apart(memories[0], memories[1]) > 1e-3 < apart(memories[1], memories[2])


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fitted", "mean"])
def test_a_fitted_map_can_be_saved_for_the_library(kind: str, tmp_path: Path) -> None:
    """The map that `align` loads from the file equals that of the harness exactly."""
    text, out = tmp_path / "text.txt", tmp_path / "map.safetensors"
    text.write_text(TEXT)
    assert feeders.main(["--kind", kind, "--text", str(text), "--out", str(out)]) == 0
    lm = load(TINY)
    found, expected = lm.aligner(str(out)), Feeders(lm, TEXT)(kind)
    assert isinstance(expected, Aligner)
    for name in ("matrix", "scale", "shift"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is b is None) or torch.equal(a, b)
    assert found.norm == expected.norm
    some = latent_mas(lm, QUESTIONS, align=str(out), sampling=Sampling(max_new_tokens=3))
    same = latent_mas(lm, QUESTIONS, align=expected, sampling=Sampling(max_new_tokens=3))
    assert [result.text for result in some] == [result.text for result in same]


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["--kind", "soft", "--out", "x.safetensors"], 2, "--kind"),
        (["--kind", "mean", "--out", "x.bin"], 2, "--out: found 'x.bin', expected FILE"),
        (["--kind", "mean", "--out", "x.safetensors", "--text", "none.txt"], 1, r"none\.txt"),
        (["--kind", "mean", "--out", "x.safetensors", "-m", "none"], 1, "none: no such folder"),
        (["--kind", "mean", "--out", "nowhere/x.safetensors"], 1, "nowhere/x.safetensors: cannot"),
    ],
)
def test_a_wrong_command_gives_an_error_that_says_what_is_wrong(
    argv: list[str], status: int, said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The model and the text exist, so nothing else is wrong."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    try:
        found = feeders.main(["--text", "text.txt", *argv])
    except SystemExit as stop:
        found = stop.code if isinstance(stop.code, int) else 1
    assert found == status
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
