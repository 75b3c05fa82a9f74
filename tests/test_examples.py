"""The examples run as a reader runs them, and their answers are those of the library."""

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
def test_the_latentmas_example_gives_the_librarys_answer(arguments: list[str]) -> None:
    """An example that lays out prompts otherwise, or drops a hand-over, gives another answer."""
    command = [sys.executable, "-W", "error", "examples/latentmas.py", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT, check=False
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
