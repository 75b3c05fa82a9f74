"""Check `minimas check`: what it measures, and what it concludes from given measurements."""

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from minimas import LM, latent_mas
from minimas.__main__ import main
from minimas.answers import grade
from minimas.check import QUESTIONS, ArmReport, Interval, Report, check, interval, judge
from minimas.nll import losses_after
from minimas.results import AgentStart, Event
from minimas.text.generate import Sampling

from .models import tiny_model, write_folder
from .text import load_text_lm, text_folder, text_model
from .turns import last_turn

ASKED = [question for question, _ in QUESTIONS]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_text_lm(text_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def report(lm: LM) -> Report:
    return check(lm, latent_steps=2)


def test_check_measures_what_the_methods_do(lm: LM, report: Report) -> None:
    """The loss of each arm and the length of its answers equal those of `latent_mas`."""
    greedy = Sampling(temperature=0.0, max_new_tokens=24)
    texts = [solution for _, solution in QUESTIONS]
    how = {"no cache": {"transfer": "none"}, "prompts only": {"latent_steps": 0}}
    how |= {
        f"2 thoughts, {kind}": {"latent_steps": 2, "align": kind} for kind in ("ridge", "prenorm")
    }
    assert [arm.name for arm in report.arms] == list(how)
    for arm, options in zip(report.arms, how.values(), strict=True):
        turn = last_turn(lm, ASKED, kind="math", sampling=greedy, **options)
        found = losses_after(turn.run, *turn.prefill_and_think(), texts)
        assert arm.nll == pytest.approx(sum(loss.mean for loss in found) / 6, rel=1e-9)
        results = latent_mas(lm, ASKED, kind="math", sampling=greedy, **options)
        assert arm.tokens == sum(result.usage.output_tokens for result in results) / 6
    assert report.layout == "turn" and check(lm, "chat", 1).arms[1].nll != report.arms[1].nll


def test_a_solution_without_tokens_is_refused(lm: LM) -> None:
    """Its mean loss would be a division by zero."""
    turn = last_turn(lm, ASKED[:2], kind="math", sampling=Sampling(max_new_tokens=1))
    with pytest.raises(ValueError, match=r"question 2: found .* solution of 0 tokens, expected"):
        losses_after(turn.run, *turn.prefill_and_think(), ["So 4.", ""])


def test_the_worked_solutions_are_right_and_the_questions_are_distinct() -> None:
    assert len(set(ASKED)) == len(QUESTIONS) == 6  # T_95 is for six values
    for _, solution in QUESTIONS:
        steps = re.findall(r"(\d[\d.]*) ([×+/−]) (\d[\d.]*)(?: \+ (\d+))? = (\d+)", solution)
        assert steps
        for a, sign, b, c, result in steps:
            found = {"×": float(a) * float(b), "+": float(a) + float(b) + float(c or 0)}
            found |= {"/": float(a) / float(b), "−": float(a) - float(b)}
            assert found[sign] == float(result), solution
        assert grade("math", solution, re.findall(r"boxed\{(\d+)\}", solution)[0])


def test_the_interval_is_students_t_interval() -> None:
    """By hand: mean 2, squares 14, standard error sqrt(14 / 5 / 6), t = 2.571 for six values."""
    spread = (14 / 5 / 6) ** 0.5
    found = interval([0, 0, 2, 3, 3, 4])
    assert found == pytest.approx((2, 2 - 2.571 * spread, 2 + 2.571 * spread))


def made(
    layout: str,
    prompts: float,
    ridge: tuple[float, float, float],
    prenorm: tuple[float, float, float],
) -> tuple[str, int, list[ArmReport]]:
    arms = [
        ArmReport("no cache", 1.0, Interval(0.0, -0.1, 0.1), 60, 0.1),
        ArmReport("prompts only", 1.0, None, prompts, 0.1),
        ArmReport("20 thoughts, ridge", 1.0, Interval(*ridge), 58, 0.1),
        ArmReport("20 thoughts, prenorm", 1.0, Interval(*prenorm), 58, 0.1),
    ]
    return layout, 20, arms


FINE, BAD, UNSURE = (0.001, -0.01, 0.012), (0.4, 0.3, 0.5), (0.4, -0.1, 0.9)


@pytest.mark.parametrize(
    ("given", "flags", "said"),
    [
        (made("turn", 58, FINE, FINE), "--layout turn --latent-steps 20 ", "map shows no harm"),
        (made("turn", 58, UNSURE, FINE), "--layout turn --latent-steps 20 ", "map shows no harm"),
        (
            made("turn", 58, BAD, FINE),
            "--layout turn --latent-steps 20 --align prenorm ",
            "the paper's map hurts",
        ),
        (made("turn", 58, BAD, BAD), "--layout turn --latent-steps 0 ", "prenorm hurts"),
        (made("chat", 5, FINE, FINE), "--layout turn ", "their reasoning is lost"),
        (made("turn", 5, FINE, FINE), "--method single ", "their reasoning is lost"),
    ],
)
def test_the_recommendation_follows_from_the_measurement(
    given: tuple[str, int, list[ArmReport]], flags: str, said: str
) -> None:
    """Short answers, or a loss that certainly rises, count as harm. A wide interval does not.

    The command has the number of thoughts that was checked: it recommended 40 after a check of 10.
    """
    sentence, recommended = judge(*given)
    assert recommended == flags and said in sentence
    assert sentence.startswith("On 6 questions in layout ") and sentence.count(". ") == 0


def test_short_answers_with_thoughts_also_count_as_harm() -> None:
    layout, steps, arms = made("turn", 58, FINE, FINE)
    arms[2] = replace(arms[2], tokens=6)
    assert judge(layout, steps, arms)[1] == "--layout turn --latent-steps 20 --align prenorm "


def test_the_command_prints_a_table_or_one_json_object(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = text_folder(tmp_path / "my model")
    write_folder(folder, text_model())
    assert main(["check", str(folder), "--json", "--quiet", "--latent-steps", "2"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == "" and out.count("\n") == 1
    assert found["arms"] == json.loads(json.dumps(dataclasses.asdict(report)))["arms"]
    assert found["command"].startswith(f"python -m minimas ask --model '{folder}' ")
    text = "\n".join(report.lines())
    assert (
        "6 built-in questions" in text
        and "95 %" in text
        and text.endswith(f"recommended: {report.command}")
    )


def test_the_recommended_command_loads_the_model_in_the_same_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model was checked in 8 bits, and recommended in 32."""
    folder = text_folder(tmp_path)
    write_folder(folder, text_model())
    how = ["--quantize", "q8", "--dtype", "bfloat16", "--device", "cpu"]
    assert main(["check", str(folder), "--json", "--quiet", "--latent-steps", "1", *how]) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    assert command.endswith(" --quantize q8 --dtype bfloat16 --device cpu QUESTION")


@pytest.mark.parametrize(
    ("tokenizer", "context", "found"),
    [
        (False, 4096, "tokenizer.json is missing, expected one"),
        (True, 200, r"found \d+ slots.*, expected at most 200 \(the context"),
    ],
)
def test_a_model_that_cannot_be_checked_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: bool, context: int, found: str
) -> None:
    folder = text_folder(tmp_path / "model") if tokenizer else tmp_path / "model"
    model = tiny_model(vocab_size=text_model().config.vocab_size, max_position_embeddings=context)
    write_folder(folder, model)
    assert main(["check", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(found, err)


def test_a_folders_own_team_is_the_one_that_is_checked(tmp_path: Path) -> None:
    """Its prompts and its layout are used, as in `ask`."""
    team = {
        "layout": "chat",
        "agents": [{"name": "a", "prompt": "{question}"}, {"name": "b", "prompt": "{question}"}],
    }
    lm = load_text_lm(text_folder(tmp_path, {"sequential": team}))
    events: list[Event] = []
    assert check(lm, latent_steps=1, on_event=events.append).layout == "chat"
    assert {event.agent for event in events if isinstance(event, AgentStart)} == {"a"}
