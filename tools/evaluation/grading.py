"""Grade texts: find the answer, check whether it is right, and return the right text.

This module does not use models.
"""

import ast
import itertools
import re
import textwrap
from collections.abc import Callable

from minimas.answers import extract, grade
from minimas.turns import with_opened_think

from . import sandbox
from .rows import Row, kind_of, option_of

MORE_SECONDS = 60.0  # for a program that was not done in time
Grader = Callable[[Row, str], bool | None]  # None: not graded, like code that must not be run


def plain_grader(row: Row, text: str, verifies: bool = False) -> bool | None:
    """Return whether the answer in a text is right by rules, or None for code, which is not run.

    With `verifies`, math-verify also compares expressions.
    """
    kind = kind_of(row)
    if kind == "code":
        return None
    return grade(kind, text, str(row["answer"]), row.get("choices"), verifies)


def grader(may_run: bool, verifies: bool = False) -> Grader:
    """Return a grader that uses rules and, if programs may be run, runs the tests of code."""

    def graded(row: Row, text: str) -> bool | None:
        if may_run and kind_of(row) == "code":
            return passes(code_program(row, text))
        return plain_grader(row, text, verifies)

    return graded


def passes(program: str) -> bool:
    """Return whether a program passes in the sandbox.

    One that is not done in time gets more time once, because other work on the machine may have
    slowed it. The reference solution of HumanEval/15 needs 8 seconds of processor time.
    """
    outcome = sandbox.run(program)
    if outcome.timed_out:
        outcome = sandbox.run(program, timeout=MORE_SECONDS)
    return outcome.passed


def judge(row: Row, text: str, prompt: str, grader: Grader) -> tuple[str | None, bool | None]:
    """Return the answer in a text that was generated after `prompt`, and whether it is right."""
    said = with_opened_think(prompt, text)
    return extract(kind_of(row), said, row.get("choices")), grader(row, said)


# -- the right text ---------------------------------------------------------------------------


def gold_text(row: Row) -> str:
    """Return the right text: the solution, or the boxed letter of the right option."""
    if kind_of(row) == "choice":
        return boxed(right_letter(row))
    return str(row.get("solution") or row["answer"])


def right_letter(row: Row) -> str:
    """Return the key of the right option, or the row's answer if it has no options."""
    return option_of(str(row["answer"]), row.get("choices") or {}) or str(row["answer"])


def option_texts(row: Row) -> dict[str, str]:
    """Return letter -> the text that chooses the option.

    It is the boxed letter, or the boxed text of the option if the options are not shown.
    """
    shown = kind_of(row) == "choice"
    options = row.get("choices") or {}
    return {letter: boxed(letter if shown else text) for letter, text in options.items()}


def boxed(text: str) -> str:
    r"""Return a text in \boxed{…}."""
    return rf"\boxed{{{text}}}"


# -- programs ---------------------------------------------------------------------------------


def code_program(row: Row, text: str) -> str:
    """Return one program: the code in the answer `text`, followed by the tests of the row.

    The answer is right if the program runs to its end. A question of HumanEval is placed before the
    answer, because it has imports and helpers that answers leave out. If the text has no program,
    the tests fail.
    """
    future_imports, code = hoisted(tested_code(row, text))
    parts = [code, "\n".join(row.get("test_imports", [])), row["tests"]]
    if "entry_point" in row and compiles(row["question"]):
        if code and not defines(code, row["entry_point"]):
            # The answer is the body of the function that the question begins.
            parts[0] = textwrap.indent(code, "    ")
        parts.insert(0, row["question"])
    program = "\n\n".join([future_imports, *parts])
    # The data set has a bug: the test of HumanEval/32 unpacks the answer, so no program passes it.
    return program.replace("_poly(*candidate(*inp), inp)", "_poly(*inp, candidate(*inp))")


def tested_code(row: Row, text: str) -> str:
    """Return the program in a text, or "" if there is none.

    A program that defines a name from the tests is preferred, even if another program follows it in
    the text, such as an example of another function.
    """
    wanted = re.findall(r"\w+", str(row.get("entry_point", row["tests"])))
    ends = [fence.start() for fence in re.finditer(r"(?m)^.*(?:```|~~~)", text)]
    whole = extract("code", text) or ""
    cut = (extract("code", text[:end]) or "" for end in ends[:-20:-1])
    return next((code for code in itertools.chain([whole], cut) if defines(code, *wanted)), whole)


def defines(code: str, *names: str) -> bool:
    """Return True if a program defines one of `names` as a function, a class or a variable."""
    return not set(re.findall(r"(?m)^(?:(?:async )?def |class )?(\w+) *[(:=]", code)).isdisjoint(
        names
    )


def hoisted(code: str) -> tuple[str, str]:
    """Return the imports from __future__, which must come first, and the program without them."""
    try:
        nodes = ast.parse(code).body
    except (SyntaxError, ValueError):
        return "", code
    imports = ""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            statement = ast.get_source_segment(code, node) or ""
            code = code.replace(statement, "pass", 1)
            imports += f"{ast.unparse(node)}\n"
    return imports, code


def compiles(program: str) -> bool:
    """Return True if a text is valid Python."""
    try:
        compile(program, "question", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True
