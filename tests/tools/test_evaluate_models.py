"""Check evaluate.py with several models in a team, and with automatic latent steps."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tools.evaluation.command import main
from tools.training.tiny_task import PROMPTS, story

TEAM = {
    "agents": [
        {"name": name, "prompt": PROMPTS[name], "model": model}
        for name, model in (("planner", "small"), ("judger", None))
    ]
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the files of four questions and of a team whose planner is another model."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(5)
    told = [story(rng, count, fresh=True) for count in (1, 2, 3, 4)]
    rows = [
        {"id": f"q-{i}", "question": one.question, "answer": str(one.totals[-1])}
        for i, one in enumerate(told)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "team.json").write_text(json.dumps(TEAM))
    return str(folder / "data.jsonl"), str(folder / "team.json")


def test_a_team_of_two_models_runs_in_all_arms(files: tuple[str, str], tmp_path: Path) -> None:
    """Two copies of weights/tiny are right, as one is, but not with another question's thoughts."""
    data, team = files
    arms = ["--method", "latent_mas,text_mas,single", "--transfer", "full,none,shuffled"]
    command = ["--data", data, "--team", team, "--models", "small=weights/tiny", "--quiet"]
    command += ["--latent-steps", "auto", "--max-new-tokens", "16", *arms, "--out", str(tmp_path)]
    assert main(command) == 0
    head, *records = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert list(head["settings"]["models"]) == ["small"]
    right: dict[str, list[Any]] = {}
    for record in records:
        right.setdefault(record["arm"], []).append(record["correct"])
    assert all(right["latent_mas transfer=full"])
    assert not any(right["latent_mas transfer=shuffled"])
    full = [record for record in records if record["arm"] == "latent_mas transfer=full"]
    assert [record["agents"][0]["thought"] for record in full] == [2, 3, 4, 5]
    for record in full:  # the judger's model prefills the planner's turn again: two slots close it
        planner, judger = record["agents"]
        assert judger["read"] > planner["read"] + planner["thought"] + 2
    assert main(["--out", str(tmp_path), "--replay", "q-1"]) == 0


def test_models_that_have_no_effect_are_refused(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, team = files
    start = ["--data", data, "--out", str(tmp_path), "--models", "small=weights/tiny"]
    for more, said in (
        ([], "--models): found ['small'], expected names that agents use"),
        (["--team", team, "--lens", "2"], "--models): found models with --lens or --audit"),
    ):
        assert main([*start, *more]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*start, "--models", "small"])
    assert "found 'small', expected NAME=FOLDER" in capsys.readouterr().err
