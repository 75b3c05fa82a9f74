"""Check that each claim's command prints its figures, and that docs/claims.md has all 27 claims."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from minimas import KVCache, latent_mas, load
from minimas.results import AgentStart, Event
from tools.claiming import complexity, depth, geometry, lossless
from tools.claiming.alignment import untied_twin
from tools.claiming.command import CLAIMS, main
from tools.claiming.errors import PAIR, Forced, changed
from tools.claiming.expressiveness import planted, tokens_read
from tools.claiming.setting import Setting

from ..models import TINY, random_ids, tiny_model, write_folder

ROOT = TINY.parents[1]
PAGE = ROOT / "docs" / "claims.md"
FIGURES = {
    "expressiveness": {"bound", "lines"},
    "complexity": {"fits", "exponents", "prefill's share"},
    "depth": {"best", "means", "panels"},
    "alignment": {"panels", "ridge − map", "map"},
    "overlap": {"clouds", "tokens"},
    "drift": {"maps", "embedding norm"},
    "errors": {"teams"},
    "speed": {"arms", "ratios"},
    "tokens": {"arms", "fewer generated tokens"},
    "lossless": {"largest difference", "smallest difference of a control"},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the thoughts and tokens of every claim to as few as possible."""
    monkeypatch.setattr(complexity, "PROMPTS", (4, 8, 16))
    monkeypatch.setattr(complexity, "TIMED_PROMPTS", (4, 8))
    monkeypatch.setattr(complexity, "THOUGHTS", (0, 1, 2, 4))
    monkeypatch.setattr(complexity, "USUAL", (8, 4))
    monkeypatch.setattr(depth, "TINY_STEPS", (0, 2, 6))
    monkeypatch.setattr(geometry, "DRIFT_STEPS", 3)


def measured(name: str, out: Path, *flags: str) -> dict[str, Any]:
    """Run a claim and return its numbers."""
    assert main([name, "--dtype", "float32", "--out", str(out), *flags]) == 0
    found: dict[str, Any] = json.loads((out / f"claims-{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_has_figures_a_picture_and_a_sentence(
    name: str, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(name, tmp_path / "new", "--limit", "6")
    assert FIGURES[name] <= set(found)
    assert found["what"] == name and found["checks"] == CLAIMS[name].checks
    assert found["settings"]["limit"] == 6
    assert capsys.readouterr().out == f"{found['sentence']}\n"
    assert found["sentence"].startswith(f"{name}: weights/tiny: {found['verdict']}. ")
    assert (tmp_path / "new" / f"claims-{name}.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "new" / f"claims-{name}.svg").read_text(encoding="utf-8")
    assert svg.rstrip().endswith("</svg>")


def test_the_list_of_figures_has_every_claim() -> None:
    """FIGURES must stay complete."""
    assert list(FIGURES) == list(CLAIMS)


# -- the equivalences and their controls -----------------------------------------------------------


def test_a_hand_over_equals_explicit_input_and_its_controls_do_not(tmp_path: Path) -> None:
    found = measured("lossless", tmp_path, "--limit", "2")
    assert max(found["largest difference"].values()) <= 1e-12
    assert min(found["smallest difference of a control"].values()) >= 1e-4
    assert found["verdict"] == "holds here"


def test_a_broken_hand_over_is_not_called_lossless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the cache loses a slot here, and the verdict must change."""

    def lossy(memory: KVCache) -> KVCache:
        return memory.drop(1, 2)

    monkeypatch.setattr(lossless.KVCache, "fork", lossy)
    assert measured("lossless", tmp_path, "--limit", "1")["verdict"] == "does not hold here"


def test_an_untied_twin_has_the_same_logits_but_another_map() -> None:
    """A twin that differs in any product would measure itself, not the map."""
    lm = load(TINY, device="cpu")
    twin = untied_twin(lm)
    ids = random_ids(lm.model, 2, 9)
    states = [one.model(one.model.embed(ids)) for one in (lm, twin)]
    logits = [one.model.logits(hidden) for one, hidden in zip((lm, twin), states, strict=True)]
    assert torch.equal(*logits) and not torch.equal(*states)
    maps = [one.aligner("ridge")(hidden) for one, hidden in zip((lm, twin), states, strict=True)]
    assert not torch.allclose(*maps, atol=0.1)
    assert lm.model.lm_head is not twin.model.lm_head and lm.model.model.norm.weight[0] == 1


def test_a_tied_model_gets_an_untied_twin(tmp_path: Path) -> None:
    tied = tiny_model(tie_word_embeddings=True, vocab_size=500, dtype=torch.float32)
    lm = load(write_folder(tmp_path / "tied", tied, tokenizer=TINY), device="cpu")
    twin = untied_twin(lm)
    ids = random_ids(lm.model, 1, 5)
    first, second = (one.model.logits(one.model(one.model.embed(ids))) for one in (lm, twin))
    assert torch.equal(first, second)
    assert lm.model.config.tie_word_embeddings and not twin.model.config.tie_word_embeddings


@pytest.mark.slow
def test_injecting_a_teams_own_plan_changes_no_answer(tmp_path: Path) -> None:
    """Otherwise the injection itself would flip answers. A wrong plan does, in a team of two."""
    found = measured("errors", tmp_path, "--limit", "12")
    for team in found["teams"].values():
        assert [rates["own plan changes"] for rates in team["rates"].values()] == [0, 0]
    pair = found["teams"][PAIR]["rates"]
    assert min(rates["flips"] for rates in pair.values()) > 0.3


def test_forced_thoughts_come_first() -> None:
    given = torch.arange(6.0).view(1, 2, 3)
    forced = Forced(given, lambda hidden: hidden + 1)
    zero = torch.zeros(1, 1, 3)
    fed = torch.cat([forced(zero) for _ in range(3)], 1)
    assert torch.equal(fed, torch.cat([given, zero + 1], 1))


def test_a_changed_question_differs_in_its_first_number() -> None:
    assert changed("Eva has 8 cards. She loses 3.") == "Eva has 7 cards. She loses 3."
    assert changed("Eva has 2 cards. She loses 3.") == "Eva has 3 cards. She loses 3."
    assert changed("How many?") is None


def test_a_probe_decodes_a_planted_code_but_nothing_with_wrong_targets() -> None:
    """A probe that is too weak would find little in any thoughts."""
    letters = torch.randint(64, (1500, 2), generator=torch.Generator().manual_seed(1))
    code = planted(letters, 96, seed=0)
    assert tokens_read(code, letters)["read"] > 1.9
    assert abs(tokens_read(code, letters.roll(1, 0))["read"]) < 0.1


@pytest.mark.slow
def test_the_counted_flops_equal_the_formula_with_prefill() -> None:
    """The coefficients follow from the config: 2 FLOPs per weight, 4 per slot and query number."""
    model = tiny_model(dtype=torch.float32)
    c = model.config
    grid = complexity.flops(model, (4, 8, 16), text=False)
    found = complexity.fit(grid, c, (*complexity.PAPER, *complexity.PREFILL))
    queries = c.num_attention_heads * c.head_dim
    d = c.hidden_size
    keys = 2 * c.num_key_value_heads * c.head_dim
    weights = d * (2 * queries + keys) + 3 * d * c.intermediate_size
    assert found["worst error"] < 1e-9
    assert found["coefficients"]["t"] == pytest.approx(2 * weights / d**2)
    assert found["coefficients"]["t²"] == pytest.approx(4 * queries / d)
    assert complexity.fit(grid, c, complexity.PAPER)["worst error"] > 0.1


def test_the_cost_of_more_tokens_is_extrapolated_along_the_curve() -> None:
    curve = {m: 7.0 + 5 * m + 3 * m * m for m in (0, 20, 40, 100)}
    grid = {(8, m): flops for m, flops in curve.items()}
    assert complexity.cost_of_tokens(grid, 8, 40, 100) == pytest.approx(curve[100])
    assert complexity.exponent({1: 2.0, 2: 8.0, 4: 32.0}) == pytest.approx(2)


def test_questions_are_generated_for_weights_tiny_and_built_in_for_other_models(
    tmp_path: Path,
) -> None:
    random_folder = write_folder(tmp_path / "m", tiny_model(vocab_size=500), tokenizer=TINY)
    other, tiny = Setting(str(random_folder), device="cpu"), Setting(str(TINY), device="cpu")
    assert [row["answer"] for row in other.rows(9, 9)] == ["16", "49", "12", "63", "66", "210"]
    assert len(tiny.rows(7, 1)) == 7 and tiny.rows(7, 1)[0]["question"].endswith("have?")
    assert tiny.rows(7, 1) != Setting(str(TINY), seed=1, device="cpu").rows(7, 1)


# -- claims that are tests ------------------------------------------------------------------------


def test_no_weight_changes_and_no_agent_but_the_last_needs_the_lm_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is trained and no thought is decoded: the LM head is first used by the last agent."""
    lm = load(TINY, device="cpu")
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    happened: list[str] = []
    logits = lm.model.logits

    def record_head(hidden: torch.Tensor) -> torch.Tensor:
        happened.append("head")
        return logits(hidden)

    def listen(event: Event) -> None:
        if isinstance(event, AgentStart):
            happened.append(event.agent)

    monkeypatch.setattr(lm.model, "logits", record_head)
    question = Setting(str(TINY), device="cpu").rows(1, 1)[0]["question"]
    latent_mas(lm, [question], on_event=listen)
    assert happened[:5] == ["planner", "critic", "refiner", "judger", "head"]
    assert all(torch.equal(before[name], now) for name, now in lm.model.state_dict().items())


def test_a_working_memory_is_keys_and_values_of_all_layers_for_prompts_and_thoughts() -> None:
    lm = load(TINY, device="cpu")
    question = Setting(str(TINY), device="cpu").rows(1, 1)[0]["question"]
    [result] = latent_mas(lm, [question], keep_memory=True, close=False)
    c, memory = lm.model.config, result.memory
    assert memory is not None and len(memory.keys) == len(memory.values) == 3
    usage, end = result.usage, 2  # <|im_end|> and the line feed after the answer
    assert memory.lengths == [usage.prompt_tokens + usage.latent_steps + usage.output_tokens + end]
    slot_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
    assert memory.nbytes == memory.lengths[0] * slot_bytes == memory.lengths[0] * 768


# -- the command -----------------------------------------------------------------------------------


def test_the_list_names_every_claim(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--list"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CLAIMS)
    assert all(claim.checks in line for claim, line in zip(CLAIMS.values(), lines, strict=True))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["losless", "--out", "x"], "invalid choice: 'losless'"),
        (["lossless"], "--out"),
        (["lossless", "--out", "x", "--limit", "0"], "--limit: found '0', expected a whole number"),
        (["--out", "x"], "NAME"),
    ],
)
def test_a_wrong_command_line_gives_one_line_and_status_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(args)
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("claims: error: ") and message in line


def test_a_failure_gives_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cases are a folder that is a file, a model without a tokenizer, no model, and no data."""
    (tmp_path / "file").write_text("x")
    bare = write_folder(tmp_path / "bare", tiny_model(dtype=torch.float32))
    out = ["--out", str(tmp_path / "out")]
    cases = {
        "(--out): found no folder that can be written": ["--out", str(tmp_path / "file")],
        "tokenizer.json is missing": ["--model", str(bare), *out],
        "no such folder": ["--model", str(tmp_path / "none at all"), *out],
        "found no such file": ["--data", str(tmp_path / "none.jsonl"), *out],
    }
    for message, flags in cases.items():
        assert main(["depth", *flags]) == 1
        [*_, last] = capsys.readouterr().err.splitlines()
        assert last.startswith("claims: error: ") and message in last
    assert not list((tmp_path / "out").iterdir())


# -- the page --------------------------------------------------------------------------------------


def rows_of_page() -> list[list[str]]:
    """Return the cells of the numbered rows of docs/claims.md."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if re.match(r"\| \d+ \|", line)
    ]


def test_the_page_has_27_claims_each_with_a_verdict() -> None:
    rows = rows_of_page()
    assert [int(row[0]) for row in rows] == list(range(1, 28))
    verdicts = ("holds here", "holds in part", "does not hold here", "not testable here")
    for row in rows:
        assert len(row) == 5, row
        assert row[4].startswith(verdicts), row


def test_every_command_test_and_page_named_on_the_page_exists() -> None:
    """A row that names nothing to run is a claim without a check."""
    named = set[str]()
    for number, _, how, *_ in rows_of_page():
        commands = re.findall(r"`claims\.py ([\w-]+)", how)
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", how)
        pages = re.findall(r"\]\(([\w./-]+)\)", how)
        assert commands or tests or pages, f"row {number} names nothing that can be looked at"
        assert set(commands) <= CLAIMS.keys(), number
        for path, name in tests:
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), (number, name)
        for page in pages:
            assert (PAGE.parent / page).exists(), (number, page)
        named |= set(commands)
    assert named == set(CLAIMS), "every command has its row"


def test_every_claim_has_its_picture_and_numbers_on_the_page() -> None:
    """The files are in the repository: at most 300 KB together, and none of removed claims."""
    text, files = PAGE.read_text(encoding="utf-8"), list((ROOT / "docs/pictures").glob("claims-*"))
    expected = {f"claims-{name}{ending}" for name in CLAIMS for ending in (".json", ".png")}
    assert {path.name for path in files} == expected
    assert sum(path.stat().st_size for path in files) <= 300_000
    assert all(f"(pictures/claims-{name}.png)" in text for name in CLAIMS)
