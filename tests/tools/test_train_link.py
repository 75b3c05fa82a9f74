"""Check that tools/train_link.py computes the gradients of the library's rollout and trains links.

Gradients are compared with differences of the losses that the fast cache gives, in float64.
"""

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from minimas import LM, Aligner, KVCache, Team, latent_mas, load
from minimas.agents import LatentRun, hand_over
from minimas.core.cache import Positions
from minimas.nll import losses_after
from minimas.results import run_to_end
from minimas.teams import TEAMS
from tools.linking import command, rollout
from tools.linking.cache import GradCache
from tools.linking.ceiling import ceiling, optimize, thoughts_of
from tools.linking.data import from_file, generator, read_data, rotated
from tools.linking.link import Link, vectors_path
from tools.linking.rollout import (
    TeamSettings,
    divergence,
    last_turn,
    nll,
    require_alike,
    solution_scores,
)  # fmt: skip
from tools.linking.train import Settings, Training, batch_of, in_batches

from ..models import TINY, apart
from ..processes import Process
from ..text import load_text_lm

ROOT = Path(__file__).resolve().parents[2]
ROWS = [  # of unequal length
    {"id": "a", "question": "Eva has 2 cards. She finds 7 more. How many?", "solution": " 2 9",
     "answer": "9", "kind": "math"},
    {"id": "b", "question": "Tom has 5 coins. How many?", "solution": " 5", "answer": "5",
     "kind": "math"},
    {"id": "c", "question": "Ann has 3 plums. She doubles the plums. How many plums?",
     "solution": " 3 6 6", "answer": "6", "kind": "math"},
]  # fmt: skip


@pytest.fixture(scope="module")
def lm() -> LM:
    """Return a random float64 model."""
    return load_text_lm(TINY)


@pytest.fixture(scope="module")
def tiny() -> LM:
    return load(TINY, device="cpu", dtype="float32")


def how(**changes: Any) -> TeamSettings:
    """Return settings for three agents with four latent steps each, before a fourth agent."""
    return TeamSettings(TEAMS["sequential"], 4)._replace(**changes)


def loss(lm: LM, aligner: Any, how: TeamSettings, rows: Sequence[Any] = ROWS) -> Tensor:
    return torch.cat(nll(lm, rows, how, aligner)).mean()


def slope(
    lm: LM, start: Aligner, direction: Tensor, how: TeamSettings, step: float = 1e-4
) -> float:
    """Return the derivative along `direction`, from four losses with the fast cache."""
    assert start.matrix is not None
    losses = {}
    with torch.no_grad():
        for n in (-2, -1, 1, 2):
            moved = Aligner(start.matrix + n * step * direction, start.norm, start.scale)
            losses[n] = loss(lm, moved, how).item()
    return (8 * (losses[1] - losses[-1]) - (losses[2] - losses[-2])) / (12 * step)


def gradient(lm: LM, start: Aligner, how: TeamSettings) -> Tensor:
    assert start.matrix is not None
    matrix = start.matrix.clone().requires_grad_()
    loss(lm, Aligner(matrix, start.norm, start.scale), how).backward()
    assert matrix.grad is not None
    return matrix.grad


def directions(start: Aligner) -> list[Tensor]:
    assert start.matrix is not None
    source = torch.Generator().manual_seed(1)
    shape = (2, *start.matrix.shape)
    drawn = list(torch.randn(shape, generator=source, dtype=torch.float64))
    one = torch.zeros_like(start.matrix)
    one[3, 5] = 1
    return [*drawn, one]


CASES = [
    how(layout=layout, transfer=transfer)
    for layout, transfer in itertools.product(("turn", "chat"), ("full", "latents", "last"))
]
CASES += [how(team=TEAMS["hierarchical"], layout=layout) for layout in ("turn", "chat")]


@pytest.mark.parametrize("how", CASES, ids=lambda how: f"{how.layout}-{how.transfer}")
def test_the_gradient_through_three_agents_equals_differences_of_the_fast_caches_losses(
    lm: LM, how: TeamSettings
) -> None:
    """A slot that is copied without its graph, or overwritten, changes the gradient but no loss.

    Rows of different lengths have different slots.
    """
    start = Aligner.from_model(lm.model, "prenorm")
    found = gradient(lm, start, how)
    for direction in directions(start):
        expected = slope(lm, start, direction, how)
        assert abs((found * direction).sum().item() - expected) <= 1e-6 * abs(expected)


def test_a_gradient_cut_off_at_the_hand_over_is_detected(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is the negative control: without the cache's part, the gradient has another size."""

    class Detached(GradCache):
        def append(self, layer: int, keys: Tensor, values: Tensor, at: Positions) -> Any:
            # Gradients of earlier positions reach later ones only in the first layer.
            return super().append(layer, keys if layer else keys.detach(), values, at)

    start = Aligner.from_model(lm.model, "prenorm")
    monkeypatch.setattr(rollout, "GradCache", Detached)
    found = gradient(lm, start, how())
    for direction in directions(start):
        expected = slope(lm, start, direction, how())
        assert abs((found * direction).sum().item() - expected) > 1e-3 * abs(expected)


def test_the_fast_cache_refuses_gradients(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It overwrites what attention has saved. Autograd must not be silently wrong."""
    monkeypatch.setattr(rollout, "GradCache", KVCache)
    with pytest.raises(RuntimeError, match="inplace operation"):
        gradient(lm, Aligner.from_model(lm.model, "prenorm"), how())


# -- the rollout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["turn", "chat"])
def test_losses_equal_those_of_the_library(lm: LM, layout: str) -> None:
    """Training on the loss of tokens off by one would learn something else.

    The losses are equal with and without gradients.
    """
    align, texts = lm.aligner("ridge"), [row["solution"] for row in ROWS]
    turn = last_turn(lm, ROWS, how(layout=layout), align)
    expected = losses_after(turn.run, *turn.prefill_and_think(), texts)
    with torch.no_grad():
        fast = nll(lm, ROWS, how(layout=layout), align)
    for found, same, one in zip(nll(lm, ROWS, how(layout=layout), align), fast, expected,
                                strict=True):  # fmt: skip
        assert found.sum().item() == pytest.approx(one.total, rel=1e-12)
        assert apart(found, same) <= 1e-12 and len(found) == one.tokens


@pytest.mark.parametrize("layout", ["turn", "chat"])
def test_questions_with_their_own_teams_can_share_a_batch(lm: LM, layout: str) -> None:
    """Every question must get its own notes, as if it were asked alone."""
    rows = [generator("split_evidence")(12, 0, i) for i in range(3)]
    setting, align = how(layout=layout, transfer="latents"), lm.aligner("ridge")
    together = nll(lm, rows, setting, align)
    for row, tokens in zip(rows, together, strict=True):
        [alone] = nll(lm, [row], setting, align)
        assert apart(tokens, alone) <= 1e-9
        team = Team.from_dict(row["team"], "row")
        run = LatentRun(lm, [row["question"]], "math", team=team, latent_steps=4, align=align,
                        transfer="latents", layout=layout)  # fmt: skip
        turn = run.last_turn(run_to_end(hand_over(run)))
        [expected] = losses_after(run, *turn.prefill_and_think(), [row["solution"]])
        assert tokens.sum().item() == pytest.approx(expected.total, rel=1e-9)
    other = nll(lm, rows, setting, align, others=True)
    assert all(apart(a, b) > 1e-3 for a, b in zip(together, other, strict=True))


def test_thoughts_of_other_questions_equal_the_librarys_shuffled_control(lm: LM) -> None:
    """The loss after another question's thoughts is that of transfer "shuffled"."""
    align = lm.aligner("ridge")
    control = nll(lm, ROWS, how(transfer="shuffled"), align)
    for found, expected in zip(nll(lm, ROWS, how(), align, others=True), control, strict=True):
        assert apart(found, expected) <= 1e-12


def test_rows_with_another_team_or_kind_are_refused_by_name(lm: LM) -> None:
    two, three = (generator(f"notes:{n}")(11, 0, 0) for n in (2, 3))
    with pytest.raises(ValueError, match=rf"{three['id']}: team: found .*expected"):
        require_alike([two, three], how())
    with pytest.raises(ValueError, match="found kinds free, math, expected one kind"):
        require_alike([*ROWS, {**ROWS[0], "kind": "free"}], how())
    agents = [{"name": "a", "prompt": "{question}", "writes": True}, {"name": "b", "prompt": ""}]
    with pytest.raises(ValueError, match="layout: found 'turn' with agent 'a', writes"):
        require_alike([{**ROWS[0], "team": {"agents": agents}}], how(layout="turn"))


def test_distillation_has_no_loss_if_the_thoughts_add_nothing(lm: LM) -> None:
    """KL to the prompts' cache is 0 for the teacher itself, and positive without the prompts."""
    align = lm.aligner("ridge")
    same = torch.cat(divergence(lm, ROWS, how(latent_steps=0), align))
    assert same.abs().max() <= 1e-12
    other = divergence(lm, ROWS, how(transfer="latents"), align)
    assert (torch.cat(other) > 1e-6).all()
    texts = [row["solution"] for row in ROWS]
    teacher_scores, found = (
        list(solution_scores(last_turn(lm, ROWS, one, align), texts))
        for one in (how(latent_steps=0), how(transfer="latents"))
    )
    for q, each in enumerate(other):
        p, q_ = teacher_scores[q].logits.softmax(-1), found[q].logits.softmax(-1)
        assert apart(each, (p * (p / q_).log()).sum(-1)) <= 1e-9


# -- links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("kind", ["ridge", "prenorm", "identity"])
def test_a_link_starts_as_its_map_and_is_saved_as_a_map(
    lm: LM, tmp_path: Path, kind: str, rank: int | None
) -> None:
    """--align must give the thoughts that training used. A low-rank link is multiplied out."""
    start, file = lm.aligner(kind), tmp_path / "link.safetensors"
    link = Link(lm.model, start, rank)
    hidden = torch.randn(3, 1, 16, dtype=torch.float64)
    link.requires_grad_(False)
    assert apart(link.feeder()(hidden), start(hidden)) <= 1e-12
    for part in link.parameters():
        part += torch.randn_like(part)
    trained = link.feeder()(hidden)
    assert apart(trained, start(hidden)) > 0.1
    link.save(file, lm.model)
    assert apart(Aligner.load(file, lm.model)(hidden), trained) <= 1e-12
    [ours], [theirs] = (latent_mas(lm, ["Eva?"], align=align, latent_steps=3)
                        for align in (str(file), link.feeder()))  # fmt: skip
    assert ours.text == theirs.text


def test_a_low_rank_has_fewer_parameters_and_a_limit(lm: LM) -> None:
    count = sum(part.numel() for part in Link(lm.model, lm.aligner("ridge"), 3).parameters())
    assert count == 2 * 3 * 16
    with pytest.raises(ValueError, match="--rank: found 17, expected 1 … 16"):
        Link(lm.model, lm.aligner("ridge"), 17)


def test_start_vectors_are_the_first_thoughts_of_every_agent(lm: LM) -> None:
    """If they were counted over all agents, only the first agent would get them."""
    link = Link(lm.model, lm.aligner("ridge"), vectors=2)
    fed = thoughts_of(lm, ROWS, how(), link.feeder()).turns
    assert len(fed) == 3 and all(turn.shape == (3, 4, 16) for turn in fed)
    for turn in fed:
        assert torch.equal(turn[:, :2], link.vectors.expand(3, 2, 16))
        assert not torch.equal(turn[0, 2], turn[1, 2])
    loss(lm, link.feeder(), how()).backward()
    for name, part in link.named_parameters():
        assert part.grad is not None and part.grad.abs().max() > 1e-9, name


def test_gist_slots_do_not_depend_on_the_question(lm: LM, tmp_path: Path) -> None:
    """They are fed for every question alike, and their file is not a map for --align."""
    link, file = Link(lm.model, None, vectors=4), tmp_path / "gist.safetensors"
    for turn in thoughts_of(lm, ROWS, how(), link.feeder()).turns:
        assert torch.equal(turn, link.vectors.expand(3, 4, 16))
    link.save(file, lm.model)
    with pytest.raises(ValueError, match="found 'minimas-vectors-1', expected minimas-aligner-1"):
        lm.aligner(str(file))


@pytest.mark.slow
def test_free_thoughts_are_optimized_separately_for_each_question(lm: LM) -> None:
    """The ceiling of one question must not depend on the others in its batch."""
    setting, align = how(transfer="latents"), lm.aligner("ridge")
    together = optimize(lm, ROWS, setting, align, 6, 3e-2)
    start = [tokens.mean().item() for tokens in nll(lm, ROWS, setting, align)]
    for q, losses in enumerate(together):
        assert losses[0] == pytest.approx(start[q], rel=1e-9)
        assert len(losses) == 7 and losses[-1] < losses[0] - 0.01
        [alone] = optimize(lm, [ROWS[q]], setting, align, 6, 3e-2)
        assert alone == pytest.approx(losses, rel=1e-6)
    pairs = list(zip(ROWS, rotated(ROWS), strict=True))
    records = ceiling(lm, pairs, setting, align, 1, 3e-2)
    assert [one["id"] for one in records] == ["a", "b", "c"]
    [other, *_] = optimize(lm, rotated(ROWS), setting, align, 1, 3e-2)
    assert records[0]["other"] == pytest.approx(other) and records[0]["own"] == together[0][:2]


# -- data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "tiny:1,2", "notes:1", "notes:3", "split_evidence_2"])
def test_generated_training_rows_are_in_no_other_split(name: str) -> None:
    data = read_data(name, 60, 20, 20, slice(None))
    texts = [[json.dumps([row["question"], row.get("team")]) for row in part] for part in data]
    train, held_out, tested = map(set, texts)
    if name != "notes:1":  # there are only 990 notes
        assert not train & (held_out | tested)
    assert texts[1] != texts[2] and len(train) > 50
    assert read_data(name, 60, 20, 20, slice(None)) == data, "they are drawn anew"
    assert read_data(name, 60, 20, 20, slice(None), seed=1).train != data.train
    assert all(row["solution"].strip() for part in data for row in part)


def test_a_note_has_the_number_that_is_its_solution() -> None:
    for i in range(20):
        row = generator("notes:3")(11, 0, i)
        colour = row["question"].split()[5]
        notes = " ".join(agent["prompt"] for agent in row["team"]["agents"])
        assert f"The {colour} box holds {row['solution']} coins" in notes
        assert len(row["solution"]) == 2 and row["answer"] == row["solution"]
        assert row["team"]["agents"][-1]["prefix"] == f"The {colour} box holds "


def write_rows(path: Path, count: int, **fields: Any) -> Path:
    rows = [{**ROWS[i % 3], "id": f"q{i}"} | fields for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_row_of_a_file_is_in_only_one_split(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "q.jsonl", 20))
    train, held_out, tested = (
        [row["id"] for row in part] for part in from_file(file, 3, 4, slice(2, 15))
    )
    assert train + tested + held_out == [f"q{i}" for i in range(2, 15)]
    assert (len(tested), len(held_out)) == (4, 3)
    with pytest.raises(ValueError, match=r"found 13 rows, expected more than 13, those of"):
        from_file(file, 13, 0, slice(2, 15))


def test_no_row_is_repeated_before_all_have_been_used() -> None:
    rows = [{"id": str(i)} for i in range(10)]
    settings = Settings(batch_size=3)
    for epoch in range(3):
        ids = [row["id"] for n in range(3) for row in batch_of(rows, 3 * epoch + n, settings)]
        assert len(set(ids)) == 9
    assert [len(part) for part in in_batches(rows, 3)] == [3, 3, 2, 2]
    assert [len(part) for part in in_batches(rows[:5], 2)] == [2, 3]
    assert [len(part) for part in in_batches(rows[:3], 1)] == [1, 1, 1]


def test_shuffled_labels_are_those_of_the_next_question() -> None:
    assert [row["solution"] for row in rotated(ROWS)] == [" 5", " 3 6 6", " 2 9"]
    assert [row["answer"] for row in rotated(ROWS)] == ["9", "5", "6"], "tests grade these"


# -- training --------------------------------------------------------------------------------------


def make_training(lm: LM, out: Path, updates: int, **settings: Any) -> Training:
    data = read_data("tiny", 12, 4, 0, slice(None))
    used = Settings(updates=updates, batch_size=3, evaluate_every=2, **settings)
    identity = {"rate": used.rate}
    setting = TeamSettings(replace(lm.teams["sequential"]), 2)
    return Training(lm, Link(lm.model, lm.aligner("ridge"), 2), data, setting, used, out, identity)


def log_of(out: Path) -> list[dict[str, Any]]:
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"}
            for line in lines]  # fmt: skip


def test_a_resumed_run_equals_an_uninterrupted_one(lm: LM, tmp_path: Path) -> None:
    """Losing Adam's moments, or taking another batch, would change every later number."""
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    expected = make_training(lm, whole, 6)
    expected.run()
    make_training(lm, parts, 4).run()
    with parts.with_suffix(".jsonl").open("a") as log:
        log.write(json.dumps({"update": 5, "loss": 1.0}) + "\n")  # after the saved state
    found = make_training(lm, parts, 6)
    found.run()
    assert log_of(parts) == log_of(whole)
    one, other = (Aligner.load(file, lm.model).matrix for file in (parts, whole))
    assert one is not None and other is not None and torch.equal(one, other)
    assert replace(found.progress, seconds=0) == replace(expected.progress, seconds=0)
    for name, part in found.parameters.items():
        assert torch.equal(part, expected.parameters[name])


def test_a_run_with_other_settings_is_not_resumed(lm: LM, tmp_path: Path) -> None:
    out = tmp_path / "link.safetensors"
    make_training(lm, out, 1).run()
    with pytest.raises(ValueError, match=r"state.safetensors: rate: found 0.003, expected 0.5"):
        make_training(lm, out, 2, rate=0.5).run()


def test_a_damaged_log_or_a_deleted_link_does_not_stop_a_resumed_run(
    lm: LM, tmp_path: Path
) -> None:
    """A crash while the log is written leaves half a line, and the run could not continue."""
    whole = tmp_path / "whole.safetensors"
    make_training(lm, whole, 4).run()
    for name, damage in (
        ("cut", lambda log: log.write_text(log.read_text()[:-20])),
        ("empty", lambda log: log.write_text("")),
        ("missing", lambda log: log.unlink()),
    ):
        out = tmp_path / f"{name}.safetensors"
        make_training(lm, out, 2).run()
        damage(out.with_suffix(".jsonl"))
        out.unlink()
        make_training(lm, out, 2).run()  # nothing to do, but the link is written again
        assert Aligner.load(out, lm.model).matrix is not None
        make_training(lm, out, 4).run()
        assert log_of(out)[0].keys() == {"settings"}
        assert log_of(out)[-1]["held_out"] == log_of(whole)[-1]["held_out"]
    log = out.with_suffix(".jsonl")
    log.write_text("{\n" + log.read_text())
    with pytest.raises(ValueError, match=r"missing.jsonl: line 1: not valid JSON .*--restart"):
        make_training(lm, out, 5).run()
    state = tmp_path / "cut.state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut.state.safetensors: found a damaged file"):
        make_training(lm, tmp_path / "cut.safetensors", 5).run()


def test_a_run_is_not_resumed_with_another_team_or_start_in_the_same_file(
    tmp_path: Path, tiny: LM, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names of the files are the same, so losses of two teams were compared."""
    team, start = tmp_path / "own.json", tmp_path / "map.safetensors"
    agents = [{"name": "a", "prompt": "{question}"}, {"name": "b", "prompt": "{question}"}]
    for change in ("team", "start"):
        team.write_text(json.dumps({"agents": agents}))
        tiny.aligner("ridge").save(start)
        flags = ["--team", team, "--start", start]
        out = tmp_path / f"{change}.safetensors"
        run(out, *flags)
        run(out, *flags, "--updates", 3)
        if change == "team":
            team.write_text(json.dumps({"agents": [agents[0] | {"latent_steps": 2}, agents[1]]}))
        else:
            tiny.aligner("identity").save(start)
        capsys.readouterr()
        run(out, *flags, "--updates", 4, status=1)
        changed = {"team": "team (--team, --agents)", "start": "map in the file of --start"}[change]
        assert f"found a run with another {changed}, expected the same" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_other_rows_and_says_which_flags_choose_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a file, --test takes rows away from training. The error named only a checksum."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "link.safetensors"
    flags = ["--data", data, "--held-out", 1]
    run(out, *flags)
    run(out, *flags, "--test", 1, status=1)
    assert "another set of rows (--data, --rows, --held-out, --test)" in capsys.readouterr().err


def test_the_state_of_a_run_can_be_read_by_others(lm: LM, tmp_path: Path) -> None:
    """Safetensors makes files of mode 0600, so a colleague could not continue the run."""
    out = tmp_path / "link.safetensors"
    make_training(lm, out, 1).run()
    plain = tmp_path / "plain"
    plain.touch()
    assert out.with_suffix(".state.safetensors").stat().st_mode == plain.stat().st_mode


def test_lost_vectors_are_written_again_and_a_test_is_logged_once(tmp_path: Path) -> None:
    """A continued run looked only for the map, and each repeated call added the same test."""
    out = tmp_path / "link.safetensors"
    flags = ["--start-vectors", 1, "--test", 2]
    run(out, *flags)
    vectors_path(out).unlink()
    run(out, *flags)
    assert vectors_path(out).exists()
    assert sum("test" in record for record in log_of(out)) == 1


def test_another_file_in_place_of_the_state_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A map under the state's name was a traceback."""
    out = tmp_path / "link.safetensors"
    run(out)
    out.with_suffix(".state.safetensors").write_bytes(out.read_bytes())
    capsys.readouterr()
    run(out, "--updates", 3, status=1)
    assert "link.state.safetensors: found another file, expected the state" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("size", [1, 2])
def test_the_other_solution_is_another_one_in_batches_of_any_size(
    tmp_path: Path, size: int
) -> None:
    """In a batch of one question, "another" solution was its own. Size 1 was a traceback."""
    out = tmp_path / "ceiling.safetensors"
    run(out, "--ceiling", 1, "--test", 3, "--batch-size", size)
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 3
    assert all(record["own"][0] != record["other"][0] for record in records)


def test_a_file_that_is_read_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The log of --out train.safetensors replaced the questions in train.jsonl."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    before = data.read_text()
    run(tmp_path / "train.safetensors", "--data", data, status=2)
    assert "argument --data: found" in capsys.readouterr().err
    assert data.read_text() == before


def test_an_agents_own_number_of_thoughts_is_used(lm: LM) -> None:
    """The link was trained with as many thoughts for all agents, unlike `latent_mas`."""
    planner, *others = TEAMS["sequential"].agents
    team = replace(TEAMS["sequential"], agents=(replace(planner, latent_steps=3), *others))
    handed = last_turn(lm, ROWS, TeamSettings(team, None), lm.aligner("ridge"))
    counts = [trace.latent_steps for turn in handed.turns for trace in turn.traces[:1]]
    assert counts == [3, lm.default_steps, lm.default_steps]
    assert command.most_steps(lm, team, None) == lm.default_steps
    assert command.most_steps(lm, team, 2) == 2


def test_the_file_has_the_link_with_the_lowest_held_out_loss(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two evaluations without a lower loss end the run, and a later link is not saved."""
    out, kept = tmp_path / "link.safetensors", dict[int, bytes]()
    training = make_training(lm, out, 100, patience=2, rate=0.5)
    losses = iter([3.0, 2.0, 1.0, 1.5, 1.2, 0.1])
    evaluate = Training.evaluate

    def evaluated(self: Training, loss: float | None = None) -> None:
        monkeypatch.setattr(self, "losses", lambda rows: torch.full((1,), value))
        value = next(losses)
        evaluate(self, loss)
        monkeypatch.delattr(self, "losses")
        kept[self.progress.update] = out.read_bytes()

    monkeypatch.setattr(Training, "evaluate", evaluated)
    progress = training.run()
    assert (progress.update, progress.best, progress.best_loss) == (8, 4, 1.0)
    assert kept[0] != kept[2] != kept[4] == kept[6] == kept[8]
    best = Aligner.load(out, lm.model).matrix
    assert best is not None and torch.equal(best, training.link.aligner().matrix)


# -- the command -----------------------------------------------------------------------------------


def run(out: Path, *flags: object, status: int = 0) -> None:
    """Run the command on weights/tiny with a few short updates."""
    short = ["--held-out", 2, "--batch-size", 2, "--latent-steps", 1, "--agents", 1]
    argv = ["--out", out, "--updates", 2, "--evaluate-every", 1, *short, *flags]
    try:
        found = command.main([str(flag) for flag in argv])
    except SystemExit as error:
        found = error.code
    assert found == status


@pytest.mark.slow
def test_a_trained_link_can_be_used_as_a_map_for_align(
    tmp_path: Path, tiny: LM, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any start, rank or number of vectors is possible. A run prints its progress and tests."""
    for name, *flags in (
        ("full", "--test", 3),
        ("low", "--rank", 2, "--start", "prenorm", "--objective", "distill", "--transfer",
         "latents"),
        ("vectors", "--start-vectors", 1, "--latent-steps", 2, "--start", "identity"),
        ("spoilt", "--updates", 0, "--noise", 1),
    ):  # fmt: skip
        out = tmp_path / f"{name}.safetensors"
        run(out, *flags)
        [result] = latent_mas(tiny, ["How many?"], align=str(out), latent_steps=1)
        assert result.text
        assert Aligner.load(out, tiny.model).matrix is not None
    found, progress = capsys.readouterr()
    tested = json.loads(found)["test"]
    assert tested["n"] == 3 and 0 <= tested["right"] <= 3 and tested["other"] > 0
    last = log_of(tmp_path / "full.safetensors")[-1]
    assert last["test"] == tested
    each = last["questions"]
    assert len({one["id"] for one in each}) == 3, "no pairs for a comparison with another link"
    assert sum(one["right"] for one in each) == tested["right"]
    for name in ("loss", "other"):
        losses = [one[name] for one in each]
        assert len(losses) == 3 and fmean(losses) == pytest.approx(tested[name])
    run(tmp_path / "full.safetensors", "--test", 3, "--batch-size", 1, "--restart")
    alone = log_of(tmp_path / "full.safetensors")[-1]  # no other question is in the batch
    assert "other" not in alone["test"] and all("other" not in one for one in alone["questions"])
    assert "16,384 parameters" in progress and "update 2 of 2: loss" in progress
    assert vectors_path(tmp_path / "vectors.safetensors").exists()
    run(tmp_path / "again.safetensors", "--start", tmp_path / "full.safetensors")
    run(tmp_path / "gist.safetensors", "--gist")
    run(tmp_path / "labels.safetensors", "--shuffle-labels")
    other, same = (log_of(tmp_path / f"{name}.safetensors") for name in ("labels", "full"))
    assert other[1] != same[1], "labels are the right ones"


def test_the_ceiling_gives_a_record_per_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ceiling.safetensors"
    run(out, "--ceiling", 2, "--test", 3)
    records = log_of(out)
    assert len(records) == 3 and all(len(one["own"]) == len(one["other"]) == 3 for one in records)
    assert "3 questions: loss" in capsys.readouterr().out and not out.exists()
    run(out)
    trained = log_of(out)
    run(out, "--ceiling", 2, "--test", 3, status=1)
    assert log_of(out) == trained, "the log of the training is gone"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if "error" in line]
    assert not out and line.startswith("train_link: error: ") and "Traceback" not in err
    return line


def test_a_row_without_a_solution_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "q.jsonl", 9)
    rows = file.read_text().splitlines()
    row = json.loads(rows[4])
    for missing in (None, " "):
        row["solution"] = missing
        file.write_text("\n".join([*rows[:4], json.dumps(row), *rows[5:]]))
        run(tmp_path / "link.safetensors", "--data", file, status=1)
        assert "q.jsonl: q4: solution: found nothing, expected" in one_line(capsys)
    assert not (tmp_path / "link.safetensors").exists()


def test_a_start_of_another_model_or_size_is_named(
    tmp_path: Path, tiny: LM, lm: LM, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "link.safetensors", tmp_path / "start.safetensors"
    lm.aligner("ridge").save(file)
    run(out, "--start", file, status=1)
    assert "start.safetensors: model: found aligner of" in one_line(capsys)
    Aligner(torch.eye(5), model=tiny.model).save(file)
    run(out, "--start", file, status=1)
    assert "start.safetensors: matrix: found torch.float32 of shape (5, 5)" in one_line(capsys)
    run(out, "--start", tmp_path / "none.safetensors", status=1)
    assert "none.safetensors: no such file" in one_line(capsys)


@pytest.mark.parametrize(
    ("flags", "status", "expected"),
    [
        (["--data", "rhymes"], 1, "--data: found 'rhymes', expected FILE.jsonl, tiny"),
        (["--data", "notes:0"], 1, "--data: found 'notes:0'"),
        (["--data", "tiny:9"], 1, "--data: found 'tiny:9'"),
        (["--data", "none.jsonl"], 1, "none.jsonl: found no such file"),
        (["--model", "elsewhere"], 2, "--data: found nothing, expected FILE.jsonl"),
        (["--rank", "129"], 1, "--rank: found 129, expected 1 … 128"),
        (["--noise", "nan"], 2, "--noise: found nan, expected a number, 0 or more"),
        (["--noise", "-1"], 2, "--noise: found -1, expected a number, 0 or more"),
        (["--ceiling", "2", "--test", "2", "--rank", "2"], 2, "--ceiling: there is no link"),
        (["--latent-steps", "0"], 1, "--latent-steps: found 0, expected 1 or more"),
        (["--start-vectors", "2"], 1, "--start-vectors: found 2, expected at most 1"),
        (["--gist", "--rank", "2"], 2, "--gist: there is no map"),
        (["--transfer", "none"], 2, "--transfer: found 'none', expected full, latents or last"),
        (["--rate", "nan"], 2, "--rate: found nan, expected a number above 0"),
        (["--rows", "7"], 2, "--rows: found '7', expected START:STOP"),
        (["--rows", "0:7"], 1, "--rows: found with --data tiny, expected a file: FILE.jsonl"),
        (["--start", "random"], 2, "--start: found 'random', expected ridge"),
        (["--ceiling", "2"], 2, "--test: expected 2 or more questions with --ceiling"),
        (["--shuffle-labels", "--held-out", "1"], 2, "--held-out: expected 2 or more"),
        (["--team", "crowd"], 1, "--team: found 'crowd', expected a Team or one of"),
        (["--out", "link.pt"], 2, "--out: found 'link.pt', expected FILE.safetensors"),
        (["--out", "nowhere/link.safetensors"], 1, "nowhere: no such folder (--out)"),
        (["--start", "x.safetensors", "--out", "x.safetensors"], 2,
         "--start: found 'x.safetensors', a file that --out x.safetensors writes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_gives_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], status: int, expected: str
) -> None:
    run(tmp_path / "link.safetensors", *flags, status=status)
    assert expected in one_line(capsys)
    assert not (tmp_path / "link.safetensors").exists()


def test_a_file_that_is_not_from_a_run_is_not_overwritten(
    tmp_path: Path, tiny: LM, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "link.safetensors"
    tiny.aligner("prenorm").save(out)
    before = out.read_bytes()
    run(out, status=1)
    assert "link.safetensors: found a file without its state" in one_line(capsys)
    assert out.read_bytes() == before
    run(out, "--restart")
    assert out.read_bytes() != before


def test_a_training_that_diverges_keeps_the_last_good_link(
    tmp_path: Path, tiny: LM, capsys: pytest.CaptureFixture[str]
) -> None:
    """The states are not finite after a huge update, or no float32 can hold the rate."""
    out = tmp_path / "link.safetensors"
    for rate, problem in (("3e37", "align: found a state that is not finite"), ("1e38", "value")):
        run(out, "--rate", rate, "--updates", 5, "--restart", status=1)
        line = one_line(capsys)
        assert f": {problem}" in line and "update " in line
        assert line.endswith("link.safetensors has the best link so far")
    kept, start = Aligner.load(out, tiny.model).matrix, tiny.aligner("ridge").matrix
    assert kept is not None and start is not None and torch.equal(kept, start)


@pytest.mark.parametrize("damaged", ["loss", "gradient", "link"])
def test_nan_anywhere_in_an_update_stops_training(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    out = tmp_path / "link.safetensors"
    training = make_training(lm, out, 4)
    step, losses = training.adam.step, training.losses

    def spoil(*_: Any) -> None:
        step()
        training.link.up.data[0, 0] = torch.nan

    def wrong(rows: Sequence[Any]) -> Tensor:
        found = losses(rows)
        if damaged == "gradient":
            found.register_hook(lambda gradient: gradient * torch.nan)
        return found * torch.nan if damaged == "loss" else found

    training.evaluate()
    if damaged == "link":
        monkeypatch.setattr(training.adam, "step", spoil)
    else:
        monkeypatch.setattr(training, "losses", wrong)
    with pytest.raises(ValueError, match=r"update 1: found .*(nan|NaN).*has the best link so far"):
        training.run()
    matrix = Aligner.load(out, lm.model).matrix
    assert matrix is not None and matrix.isfinite().all()


@pytest.mark.slow
def test_ctrl_c_keeps_the_best_link(tmp_path: Path, tiny: LM) -> None:
    out = tmp_path / "link.safetensors"
    argv = [sys.executable, ROOT / "tools/train_link.py", "--out", out, "--updates", "100000"]
    short = ["--held-out", "2", "--evaluate-every", "1", "--batch-size", "2"]
    with Process([*map(str, argv), *short], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("update 2 "):
                process.send_signal(signal.SIGINT)
                break
        last = process.stderr.read().splitlines()[-1]
    assert process.returncode == 130
    assert last == f"train_link: stopped; {out} has the best link so far"
    assert Aligner.load(out, tiny.model).matrix is not None


# -- the planted fault -----------------------------------------------------------------------------


@pytest.mark.slow
def test_training_repairs_a_map_damaged_by_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At most half of new questions are right before, and nine of ten after.

    With other questions' solutions, the same updates leave them wrong.
    """
    shape = ["--test", "60", "--held-out", "16", "--batch-size", "8"]
    spoilt = str(tmp_path / "spoilt.safetensors")

    def right(name: str, *flags: str) -> int:
        out = str(tmp_path / f"{name}.safetensors")
        assert command.main(["--out", out, *shape, *flags]) == 0
        return int(json.loads(capsys.readouterr().out)["test"]["right"])

    assert right("spoilt", "--noise", "0.8", "--updates", "0") <= 30
    trained = ["--start", spoilt, "--updates", "20"]
    assert right("repaired", *trained) >= 54
    assert right("labels", *trained, "--shuffle-labels") <= 20
