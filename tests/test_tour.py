"""Check that the tour (docs/tour.ipynb) is complete and its committed outputs are up to date."""

import base64
import importlib.util
import json
import os
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from .processes import LIMIT, Process

ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "docs" / "tour.ipynb"
PACKAGES = ("nbclient", "nbformat", "ipykernel", "matplotlib")  # of the extra `test`
FLOAT = re.compile(r"\d+\.\d+(?:e[+-]\d+)?")  # all other numbers are compared as text
NOISE = Decimal("1e-9")  # of float64; below it, only the order of additions shows


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def outputs(path: Path) -> list[tuple[str, str, str, list[str]]]:
    """Return each output in order: its cell, its type, its text, and the formats of its data."""
    found = []
    for cell in cells(path):
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            kind = output.get("name", output["output_type"])
            text = "".join(output.get("text", data.get("text/plain", "")))
            found.append((cell["id"], kind, text, sorted(data)))
    return found


def same(found: str, expected: str) -> bool:
    """Return True if two texts are equal, except for their floats.

    Floats may differ by one unit in the last printed place, or both be below 1e-9.
    """
    if FLOAT.sub("#", found) != FLOAT.sub("#", expected):
        return False
    for pair in zip(FLOAT.findall(found), FLOAT.findall(expected), strict=True):
        left, right = map(Decimal, pair)
        unit = max(Decimal((0, (1,), number.as_tuple().exponent)) for number in (left, right))
        if abs(left - right) > unit and max(left, right) > NOISE:
            return False
    return True


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        ("12 of 20, 0.940", "12 of 20, 0.941", True),
        ("12 of 20, 0.940", "13 of 20, 0.940", False),
        ("12 of 20, 0.940", "12 of 20, 0.942", False),
        ("' 9'", "' 6'", False),
        ("1.7e+01", "1.8e+01", True),
        ("1.7e+01", "1.7e+00", False),
        ("7.5e-16", "2.0e-13", True),
        ("7.5e-16", "6.3e-02", False),
        ("0.940", "0.940 0.941", False),
    ],
)
def test_the_comparison_notices_another_number_or_word(
    found: str, expected: str, equal: bool
) -> None:
    """Without this control, the comparison of the next tests could accept anything."""
    assert same(found, expected) == equal


def test_the_tour_is_complete() -> None:
    """No cell was left out, no warning is shown, and every step has a result."""
    assert TOUR.stat().st_size <= 300_000
    code = [cell for cell in cells(TOUR) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {kind for _, kind, _, _ in outputs(TOUR)} == {"execute_result", "display_data", "stdout"}
    titles = [line for cell in cells(TOUR) for line in cell["source"] if line.startswith("## ")]
    assert [title.split(".")[0] for title in titles[:9]] == [f"## {n}" for n in range(1, 10)]
    assert len(code) == 10 and all(cell["outputs"] for cell in code)  # the first loads the model
    for cell in code:
        pictures = [output["data"] for output in cell["outputs"] if "data" in output]
        shown = [data["image/png"] for data in pictures if "image/png" in data]
        assert len(shown) <= 1
        assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in shown)


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason=f"needs {', '.join(PACKAGES)}",
)
def test_the_tour_prints_the_committed_outputs(tmp_path: Path) -> None:
    """An outdated tour would be wrong.

    It runs as a user's does: without PYTHONPATH, in the notebook's folder. It has its own process,
    so that warnings of the notebook packages are not those of minimas.
    """
    out = tmp_path / "tour.ipynb"
    dropped = ("PYTHONPATH", "MPLBACKEND")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        env[name] = str(tmp_path)  # not the user's own
    command = [sys.executable, "tools/tour.py", "--out", str(out)]
    with Process(command, cwd=ROOT, env=env, limit=5 * LIMIT) as process:
        assert process.wait() == 0
    found, expected = outputs(out), outputs(TOUR)
    assert [(cell, kind, data) for cell, kind, _, data in found] == [
        (cell, kind, data) for cell, kind, _, data in expected
    ]
    for (cell, _, new, _), (_, _, old, _) in zip(found, expected, strict=True):
        assert same(new, old), f"cell {cell}: found\n{new}\nexpected\n{old}"
