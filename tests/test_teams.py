"""Check that a team that cannot work is refused before the model runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from minimas import Team, latent_mas, text_mas

from .text import load_text_lm, text_folder

SEES = {"name": "a", "prompt": "Answer {question}"}


def agent(prompt: str) -> dict[str, Any]:
    return {"name": "a", "prompt": prompt}


@pytest.mark.parametrize(
    "raw",
    [
        {"agents": [agent("Answer {Question}")]},
        {"agents": [agent("Plan { question }"), agent("Answer.")]},
        {"agents": [agent("{context}"), agent("{form}")], "opening": "Question: {QUESTION}"},
        {"agents": [agent("question")], "opening": "", "layout": "turn"},
        {"agents": [agent("Answer it."), agent("")], "parallel": True},
    ],
)
def test_a_team_in_which_nobody_sees_the_question_is_refused(tmp_path: Path, raw: Any) -> None:
    """With a typo in `{question}`, all agents worked without the question."""
    path = tmp_path / "team.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(
        ValueError, match=rf"^{path}: team: found .*, expected {{question}} in"
    ) as caught:
        Team.from_json(path)
    assert "\n" not in str(caught.value)
    lm = load_text_lm(text_folder(tmp_path / "model", {"sequential": raw}))
    for method in (latent_mas, text_mas):
        with pytest.raises(ValueError, match=r"teams\.json: sequential: team: found .*{question}"):
            method(lm, ["Q?"])


@pytest.mark.parametrize(
    "raw",
    [
        {"agents": [SEES]},
        {"agents": [SEES, agent("Check it.")]},
        {"agents": [agent("Plan."), SEES]},
        {"agents": [agent("Plan."), agent("{form}")], "opening": "{question}"},
    ],
)
def test_the_question_may_be_in_the_opening_or_in_any_prompt(tmp_path: Path, raw: Any) -> None:
    path = tmp_path / "team.json"
    path.write_text(json.dumps(raw))
    assert len(Team.from_json(path).agents) == len(raw["agents"])


@pytest.mark.parametrize("choices", [["abc"], [["A", "B"]], "abc", [{}], [3]])
def test_choices_that_are_not_a_dict_are_refused_by_name(tmp_path: Path, choices: Any) -> None:
    """A list of texts ended in a traceback."""
    lm = load_text_lm(text_folder(tmp_path))
    with pytest.raises(ValueError, match=r"^choices: found .*, expected a dict letter -> text"):
        text_mas(lm, ["Q?"], kind="choice", choices=choices)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": 3}, r"agents\[0\]: prompt: found 3, expected text"),
        ({"latent_steps": "5"}, r"agents\[0\]: latent_steps: found '5', expected a whole number"),
        (
            {"latent_steps": -2},
            r"agents\[0\]: latent_steps: found -2, expected a whole number, 0 or more$",
        ),
        ({"writes": 1}, r"agents\[0\]: writes: found 1, expected true or false"),
        ({"promt": ""}, r"agents\[0\]: found .*expected an object of name, prompt.*'promt'"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = tmp_path / "team.json"
    path.write_text(json.dumps({"agents": [SEES | fields]}))
    with pytest.raises(ValueError, match=rf"^{path}: {message}"):
        Team.from_json(path)
