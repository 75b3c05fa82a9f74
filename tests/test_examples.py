"""Check that the examples run as a user runs them, and give the same answers as the library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minimas import latent_mas, load

from .models import TINY
from .processes import LIMIT

ROOT = Path(__file__).resolve().parents[1]
QUESTION = (
    "Eva has 2 cards. She finds 7 more. She loses 3. She doubles the cards. "
    "How many cards does Eva have?"
)
OTHER = "Tom has 5 pens. He buys 4 more. He gives away 2. How many pens does Tom have?"


@pytest.mark.parametrize("arguments", [[], [OTHER]], ids=["default", "argument"])
def test_the_latentmas_example_gives_the_librarys_answer(
    arguments: list[str], tmp_path: Path
) -> None:
    """Prompts in another layout, or a missing hand-over, would change the answer.

    It found the model only from the root of the repository.
    """
    command = [sys.executable, "-W", "error", ROOT / "examples" / "latentmas.py", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr
    [expected] = latent_mas(load(TINY), arguments or [QUESTION])
    *steps, answer = done.stdout.splitlines()
    assert answer == expected.answer
    for agent in expected.agents:
        start = steps.index(agent.name)
        assert f"prefilled {agent.prompt_tokens} tokens" in steps[start + 1]
        assert agent.latent_steps == 0 or f"thought {agent.latent_steps} times" in steps[start + 2]


def test_the_latentmas_example_fits_on_a_page() -> None:
    lines = (ROOT / "examples" / "latentmas.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("ask_a_document", ["Eva 12 (21 prompt tokens)", "Tom 9 (21", "Ben 11 (21"]),
        ("own_team", ["7 (latent steps: planner 6, judger 0)", "7 (latent steps: math 6"]),
        ("see_thoughts", ["1  ' 2' 94%", "2  ' 9' 91%", "3  ' 6' 90%"]),
        ("stream", ["planner ...... (43 slots)", "judger  6 (165 slots)"]),
        ("memory_files", ["saved 43 slots", "Eva 6, with "]),
    ],
)
def test_an_example_prints_what_it_promises(name: str, shown: list[str]) -> None:
    """It runs offline, without arguments or warnings, and is shorter than a page."""
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    missing = [text for text in shown if text not in done.stdout]
    assert not missing, done.stdout
