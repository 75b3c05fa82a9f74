"""Check that pictures show the numbers of the runs, and that unrelated runs are refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minimas import Aligner
from tools import plot
from tools.evaluation import drawing, figures
from tools.evaluation.command import main
from tools.evaluation.figures import runs
from tools.evaluation.stats import bootstrap, wilson

from ..models import TINY
from ..processes import LIMIT
from ..text import load_text_lm
from .test_evaluate import write_data

Record = dict[str, Any]


def record(
    id_: str, nll: float | None = None, right: bool | None = None, **settings: Any
) -> Record:
    metric = "nll" if nll is not None else "accuracy"
    made = {
        "method": "latent_mas",
        "latent_steps": 4,
        "align": "ridge",
        "transfer": "full",
        "samples": 1,
        "seed": 0,
    }
    made |= {
        "id": id_,
        "metric": metric,
        "arm": "any",
        "nll": nll,
        "correct": right,
        "model": "m",
        "text": "x",
    }
    usage = {
        "read": 1,
        "thought": 2,
        "written": 3,
        "seconds": 4.0,
        "memory_bytes": 5,
        "finish_reason": "stop",
    }
    return made | usage | settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an audit of weights/tiny. Tests must not change it."""
    folder = tmp_path_factory.mktemp("plot")
    command = [
        "--data",
        str(write_data(folder / "rows.jsonl", 4)),
        "--out",
        str(folder / "run"),
        "--audit",
        "--quiet",
    ]
    arms = "full,prompts only,none,one step,pause,single"
    assert main([*command, "--arms", arms, "--max-new-tokens", "3"]) == 0
    return folder / "run"


# -- numbers ---------------------------------------------------------------------------------------


def test_losses_are_paired_with_prompts_only() -> None:
    """Unpaired, differences of 10 between questions would hide those of 0.1 between arms."""
    some = [record(f"q{i}", nll=10.0 * i + 0.1 * (i + 1), latent_steps=4) for i in range(3)]
    some += [record(f"q{i}", nll=10.0 * i, latent_steps=0, align=None) for i in (2, 0, 1)]
    lines = figures.steps(some)["panels"]["nll"]
    zero, four = lines["ridge"]
    assert (zero["steps"], zero["y"], zero["low"], zero["high"], zero["p"]) == (0, 0, 0, 0, 1)
    assert (four["steps"], four["n"]) == (4, 3)
    assert (four["y"], four["low"], four["high"]) == pytest.approx(bootstrap([0.1, 0.2, 0.3]))
    assert list(lines) == ["ridge"]


def test_a_control_arm_is_not_a_point_on_the_line_of_its_map() -> None:
    """The shuffled arm uses the map ridge, but is not a point on the line of ridge."""
    some = [
        record("q", nll=1.0, latent_steps=0),
        record("q", nll=2.0),
        record("q", nll=5.0, transfer="shuffled"),
    ]
    lines = figures.steps(some)["panels"]["nll"]
    assert [point["y"] for point in lines["ridge"]] == [0, 1]
    assert [point["y"] for point in lines["another question's memory"]] == [4]


def test_the_arm_without_memory_is_not_the_baseline() -> None:
    """The arm "no memory" also has 0 steps, and was used as prompts only if it came first.

    The flags were `--transfer none,full --latent-steps 0,2`.
    """
    some = [
        record("q", nll=7.0, latent_steps=0, transfer="none"),
        record("q", nll=1.0, latent_steps=0),
    ]
    lines = figures.steps([*some, record("q", nll=2.0)])["panels"]["nll"]
    assert {name: [point["y"] for point in points] for name, points in lines.items()} == {
        "no memory": [6], "ridge": [0, 1],
    }  # fmt: skip


def test_arms_that_differ_in_a_rarer_setting_are_separate_lines() -> None:
    some = [record("q", nll=1.0, latent_steps=0, close=True), record("q", nll=2.0, close=True)]
    lines = figures.steps([*some, record("q", nll=4.0, close=False)])["panels"]["nll"]
    assert [point["y"] for point in lines["ridge, turns open"]][-1] == 3
    assert [point["y"] for point in lines["ridge"]][-1] == 1
    assert (
        len(figures.costs([record("q", right=True, prefix=p) for p in (None, "Plan:")])["arms"])
        == 2
    )


def test_each_team_has_its_own_baseline_and_lines() -> None:
    """With two teams, no arm was found with prompts only, although both teams had one."""
    some = [
        record("q", nll=base + count, latent_steps=count, team=team)
        for base, team in ((1.0, "sequential"), (5.0, "hierarchical"))
        for count in (0, 6)
    ]
    lines = figures.steps(some)["panels"]["nll"]
    assert {name: [(p["steps"], p["y"]) for p in line] for name, line in lines.items()} == {
        "ridge, sequential": [(0, 0), (6, 6)],
        "ridge, hierarchical": [(0, 0), (6, 6)],
    }


def test_prompts_only_is_drawn_also_with_only_one_number_of_thoughts() -> None:
    """For `--latent-steps 0,6`, the picture had no point at 0."""
    some = [record(f"q{i}", right=i < 1, latent_steps=0) for i in range(3)]
    some += [record(f"q{i}", right=True, latent_steps=6) for i in range(3)]
    lines = figures.steps(some)["panels"]["accuracy"]
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    drawing.draw_lines(axes, lines, drawing.colours(lines))
    [line] = axes.lines
    assert list(line.get_xdata()) == [0, 6]


def test_more_seeds_do_not_count_as_more_questions() -> None:
    some = [record("q", right=i < 3, seed=i) for i in range(4)] + [
        record("p", right=False, seed=i) for i in range(4)
    ]
    [point] = figures.steps(some)["panels"]["accuracy"]["ridge"]
    assert (point["n"], point["y"]) == (2, 0.375)


@pytest.mark.slow
def test_pictures_do_not_depend_on_the_order_of_a_set(finished: Path) -> None:
    code = "import json, pathlib; from tools.evaluation import figures; " + (
        f"print(json.dumps(figures.steps(figures.runs([pathlib.Path({str(finished)!r})]))))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=TINY.parents[1],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True, timeout=LIMIT,
        ).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(said) == 1


def test_a_forest_plot_needs_an_audit() -> None:
    with pytest.raises(ValueError, match="found the arm 'any', expected a run with --audit"):
        figures.forest([record("q", nll=1.0)])


def test_a_loss_without_prompts_only_is_refused() -> None:
    with pytest.raises(ValueError, match="for --metric nll one of them must be 0"):
        figures.steps([record("q", nll=1.0)])


def test_accuracy_has_the_wilson_interval() -> None:
    some = [record(f"q{i}", right=i < 3) for i in range(4)]
    [point] = figures.steps(some)["panels"]["accuracy"]["ridge"]
    assert (point["y"], point["low"], point["high"]) == (0.75, *wilson(3, 4))


def test_arms_are_distinguished_by_their_settings_not_by_their_names() -> None:
    """Two runs can name different arms "latent_mas".

    One point for both would show neither of them.
    """
    some = [
        record("a", right=True),
        record("a", right=False, latent_steps=8),
        record("a", right=True, method="single"),
    ]
    some += [
        record("a", right=True, method="single", samples=4),
        record("a", right=True, latent_steps=0),
    ]
    some += [
        record("a", right=False, transfer="none"),
        record("a", right=False, align="pause", transfer="latents"),
    ]
    names = [arm["name"] for arm in figures.costs(some)["arms"]]
    assert names == [
        "latent_mas, 4 × ridge", "latent_mas, 8 × ridge", "single",
        "single, vote of 4", "latent_mas, prompts only",
        "latent_mas, no memory", "latent_mas, 4 × pause, thoughts only",
    ]  # fmt: skip


def test_the_papers_table_is_shown_with_our_results() -> None:
    table = {"acc": {"4B": [50, 60, 70]}, "tokens": {"4B": [1, 2, 3]}, "seconds": {"4B": [4, 5, 6]}}
    paper = {"sequential": {"X": table}}
    theirs = figures.costs([record("a", right=True)], paper, "X")["paper"]
    assert theirs[1] == {"name": "text_mas", "model": "4B", "y": 0.6, "written": 2, "seconds": 5}
    with pytest.raises(ValueError, match="found no 'Y'"):
        figures.costs([record("a", right=True)], paper, "Y")


def test_runs_of_other_questions_are_refused(finished: Path, tmp_path: Path) -> None:
    """If runs were paired by ids alone, q-1 of two data sets would be one question."""
    other = tmp_path / "other"
    other.mkdir()
    text = (finished / "results.jsonl").read_text(encoding="utf-8")
    (other / "results.jsonl").write_text(
        re.sub(r'"data": "\w{16}"', '"data": "0"', text, count=1), encoding="utf-8"
    )
    with pytest.raises(
        ValueError, match=r"other/results\.jsonl: data: found 0, expected \w{16} as in"
    ):
        runs([finished, other])


def test_an_incomplete_line_is_left_out(finished: Path, tmp_path: Path) -> None:
    """A run that has not finished can be drawn."""
    (tmp_path / "results.jsonl").write_bytes((finished / "results.jsonl").read_bytes()[:-20])
    assert len(runs([tmp_path])) == len(runs([finished])) - 1


def test_the_thoughts_of_each_map_are_measured_at_every_step() -> None:
    """With pause, all thoughts are the embedding of one token.

    They are all at one place with one norm, and each cosine is 1. The thoughts of the kind token
    are also embeddings.
    """
    lm = load_text_lm(TINY)
    found = figures.thoughts(lm, ["Eva has 2 cards.", "Tom has 3."], ["ridge", "pause", "token"], 5)
    pause, ridge, token = (found["maps"][name] for name in ("pause", "ridge", "token"))
    w_in = lm.model.model.embed_tokens.weight.float()
    dot = w_in[lm.tokenizer.encode(".")[0]] if lm.tokenizer else w_in[0]
    assert pause["norm"] == pytest.approx([float(dot.norm())] * 5, rel=1e-4)
    assert pause["successive cosine"] == pytest.approx([1] * 4)
    assert len({tuple(place) for question in pause["places"] for place in question}) == 1
    assert token["cosine to the nearest token"] == pytest.approx([1] * 5)
    assert min(ridge["cosine to the nearest token"]) < 0.99
    aligner = lm.aligner("ridge")
    assert isinstance(aligner, Aligner)
    assert aligner.norm is not None
    assert ridge["norm"] == pytest.approx([float(aligner.norm)] * 5, rel=1e-4)
    assert [len(question) for question in ridge["places"]] == [5, 5]


def test_arms_of_two_layouts_are_distinguished() -> None:
    """Both layouts were one line, or one of them was named "turns open"."""
    layouts = [record("a", nll=1.0, layout=layout, close=None) for layout in ("turn", "chat")]
    varied = figures.varied_settings(layouts)
    assert [figures.label(one, varied) for one in layouts] == [
        "latent_mas, 4 × ridge, layout turn",
        "latent_mas, 4 × ridge, layout chat",
    ]


def test_drift_is_a_mean_over_agents_and_questions() -> None:
    """Attention is summed over the agents that have latent steps, and averaged over heads."""

    def agent(cosine: float, shares: list[float]) -> Record:
        thoughts = [{"cosine_before": None}, {"cosine_before": cosine}]
        return {"thoughts": thoughts, "attention": {"thoughts": [shares, [0.0, 0.0]]}}

    last: Record = {"name": "judger"}  # has no thoughts
    found = [
        record("a", nll=1.0) | {"agents": [agent(0.5, [0.1, 0.3]), agent(0.7, [0.2, 0.2]), last]},
        record("b", nll=1.0) | {"agents": [agent(0.9, [0.4, 0.4]), agent(0.9, [0.0, 0.0]), last]},
    ]
    figure = figures.drift(found)
    [arm] = figure["arms"].values()
    assert arm["cosines"] == pytest.approx([0.75])
    assert arm["attention"] == pytest.approx([0.4, 0.0])
    assert figure["questions"] == 2
    with pytest.raises(ValueError, match="--lens"):
        figures.drift([record("a", nll=1.0) | {"agents": [last]}])


def test_a_plane_keeps_the_two_main_directions() -> None:
    points = torch.tensor(
        [
            [3.0, 0, 0, 1],
            [-3, 0, 0, 1],
            [0, 2, 0, 1],
            [0, -2, 0, 1],
            [0, 0, 0.1, 1],
            [0, 0, -0.1, 1],
        ]
    )
    found = torch.tensor(figures.plane(points)(points)).abs()
    assert torch.allclose(
        found, torch.tensor([[3.0, 0], [3, 0], [0, 2], [0, 2], [0, 0], [0, 0]]), atol=1e-4
    )


# -- pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["steps", "costs", "audit"])
def test_each_picture_is_saved_with_its_numbers(what: str, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / what
    assert plot.main([what, str(finished), "--out", str(out)]) == 0
    svg, numbers = (
        (tmp_path / "new" / f"{what}.svg").read_text(encoding="utf-8"),
        out.with_suffix(".json").read_text(),
    )
    assert svg.rstrip().endswith("</svg>")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(numbers)["what"] in plot.DRAWN
    again = tmp_path / "again"
    assert plot.main(["again", str(out.with_suffix(".json")), "--out", str(again)]) == 0
    assert again.with_suffix(".svg").read_text(encoding="utf-8") == svg, (
        "the same numbers, another picture"
    )
    assert again.with_suffix(".json").read_text() == numbers


def test_drift_can_be_drawn(tmp_path: Path) -> None:
    arms = {"ridge": {"cosines": [0.5, 0.9], "attention": [0.4, 0.1, 0.0]}}
    numbers = tmp_path / "made.json"
    numbers.write_text(json.dumps({"what": "drift", "questions": 2, "arms": arms}))
    assert plot.main(["again", str(numbers), "--out", str(tmp_path / "drift")]) == 0
    assert "attention" in (tmp_path / "drift.svg").read_text(encoding="utf-8")


def test_thoughts_can_be_drawn(tmp_path: Path, finished: Path) -> None:
    data = finished.parent / "rows.jsonl"
    command = [
        "thoughts",
        "--model",
        str(TINY),
        "--data",
        str(data),
        "--align",
        "ridge,pause",
        "--steps",
        "3",
    ]
    assert plot.main([*command, "--limit", "2", "--out", str(tmp_path / "walk")]) == 0
    assert (tmp_path / "walk.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["steps", "nowhere"], "nowhere: found no results*.jsonl"),
        (
            ["again", str(TINY / "config.json")],
            "what: found no name of a picture, expected one of steps",
        ),
        (["again", "nowhere.json"], "nowhere.json"),
        (["again", str(Path(__file__))], "test_plot.py: not valid JSON"),
        (["thoughts", "--data", "nowhere.jsonl"], "nowhere.jsonl: found no such file"),
    ],
)
def test_a_wrong_input_gives_one_line(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plot.main([*args, "--out", str(tmp_path / "x")]) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_foreign_numbers_drawn_again_give_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of another version of this tool was a traceback."""
    for number, content in enumerate([{}, {"panels": []}, {"panels": {"nll": {"arms": 3}}}]):
        foreign = tmp_path / f"{number}.json"
        foreign.write_text(json.dumps({"what": "forest", **content}))
        assert plot.main(["again", str(foreign), "--out", str(tmp_path / "x")]) == 1
        assert f"{number}.json: found other numbers than" in capsys.readouterr().err


def test_without_matplotlib_the_numbers_are_saved_and_the_install_command_is_named(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main(["audit", str(finished), "--out", str(tmp_path / "x")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert (tmp_path / "x.json").exists()
