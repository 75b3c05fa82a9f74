"""Check that generated programs are graded as intended. Each test names the bug it prevents."""

import sys

import pytest

from tools.evaluation import grading, sandbox
from tools.evaluation.grading import code_program
from tools.evaluation.rows import Row

SOLUTION = "```python\ndef total(a, b):\n    return a + b\n```"
HUMANEVAL: Row = {
    "id": "1",
    "question": 'def total(a: int, b: int) -> int:\n    """Add two numbers."""\n',
    "entry_point": "total",
    "tests": "assert total(1, 2) == 3",
    "answer": "",
}
MBPP: Row = {"id": "2", "question": "Add.", "tests": "assert total(1, 2) == 3", "answer": ""}


def passes(row: Row, text: str) -> bool:
    """Return True if the tests of the row pass. The texts here are harmless."""
    program = compile(code_program(row, text), "program", "exec", dont_inherit=True)
    try:
        exec(program, {"__name__": "program"})
    except (AssertionError, NameError, SystemExit, ImportError):
        return False
    return True


@pytest.mark.parametrize("row", [HUMANEVAL, MBPP], ids=["humaneval", "mbpp"])
@pytest.mark.parametrize(
    "block",
    [
        "def halves(a):\n    return a / 2",
        "class Timer:\n    pass",
        "def square(x):\n    return x * x\n\nassert square(2) == 5",
        "def test_total():\n    assert total(1, 1) == 3\n\ntest_total()",
        "def example():\n    raise SystemExit\n\nexample()",
        "from solution import total\n\nclass TotalTests(unittest.TestCase):\n    pass",
        "assert total(1, 1) == 3",
    ],
)
def test_the_block_that_the_tests_use_is_graded(row: Row, block: str) -> None:
    """A later example that defined another function replaced the solution."""
    assert passes(row, f"{SOLUTION}\nAlso:\n```python\n{block}\n```")


def test_the_last_of_two_solutions_counts() -> None:
    """Otherwise a corrected mistake would count as wrong, and a spoiled solution as right."""
    wrong = SOLUTION.replace("+", "-")
    assert passes(MBPP, f"{wrong}\nNo:\n{SOLUTION}")
    assert not passes(MBPP, f"{SOLUTION}\nNo:\n{wrong}")
    assert not passes(MBPP, "I do not know.")


@pytest.mark.parametrize(
    "statement",
    [
        "from __future__ import annotations",
        "from __future__ import (\n    annotations,\n    division,\n)",
        "from __future__ import (  # (as in PEP 563)\n    annotations,  # :)\n)",
        "from __future__ import annotations, \\\n    division",
        "from __future__ import annotations; import operator",
        '"""Adds."""\nfrom __future__ import annotations\nfrom __future__ import division',
    ],
)
@pytest.mark.parametrize("row", [HUMANEVAL, MBPP], ids=["humaneval", "mbpp"])
def test_future_imports_come_first_in_every_form(row: Row, statement: str) -> None:
    """They must come before the question.

    They were found only on one line and without a comment.
    """
    assert passes(row, f"```python\n{statement}\ndef total(a, b):\n    return a + b\n```")


def test_a_function_body_alone_continues_the_question() -> None:
    """HumanEval asks for the rest of a function that the question starts."""
    assert passes(HUMANEVAL, "```python\n    return a + b\n```")
    assert passes(HUMANEVAL, "return a + b")
    assert not passes(HUMANEVAL, "```python\n    return a - b\n```")


@pytest.mark.parametrize("reason", ["slow", "never done", "wrong"])
def test_only_a_program_that_was_not_done_in_time_runs_again(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine, the reference solution of HumanEval/15 was graded as wrong."""
    limits: list[float] = []

    def run(program: str, timeout: float = 20.0) -> sandbox.Outcome:
        limits.append(timeout)
        passed = reason == "slow" and timeout > 20
        return sandbox.Outcome(passed, reason, timeout, not passed and reason != "wrong")

    monkeypatch.setattr(sandbox, "run", run)
    assert grading.passes("x = 1") == (reason == "slow")
    assert limits == ([20.0] if reason == "wrong" else [20.0, grading.MORE_SECONDS])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")
def test_the_sandbox_says_that_a_program_was_not_done_in_time() -> None:
    assert sandbox.run("while True: pass", timeout=1).timed_out
    assert not sandbox.run("raise ValueError").timed_out
