"""Ctrl-C ends a tool with one line and status 130, also while it imports torch."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..processes import Process, within

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("benchmark", "claims", "evaluate", "plot", "report", "train_link")
# Stands for torch. Its import takes long, and catches the exception of Ctrl-C.
SLOW_IMPORT = """
import time
print("importing", flush=True)
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_that_is_still_importing_stops_with_one_line(name: str, tmp_path: Path) -> None:
    """Some ended in a traceback or an abort, and some went on, because the import caught it."""
    (tmp_path / "torch.py").write_text(SLOW_IMPORT)
    pipe = subprocess.PIPE
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py")]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    with within(), Process(command, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert (process.returncode, said) == (130, f"\n{name}: stopped\n")
