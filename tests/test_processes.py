"""Check that every test ends its processes and no test waits without a limit."""

import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from .conftest import pytest_cmdline_main
from .processes import Process, within

IGNORES = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True)"
FOREVER = [sys.executable, "-c", f"{IGNORES}; time.sleep(600)"]


def test_a_process_that_ignores_ctrl_c_is_killed_when_its_test_fails() -> None:
    """`with subprocess.Popen(...)` waited for ever after the test had failed."""
    with (
        within(60),
        pytest.raises(subprocess.TimeoutExpired),
        Process(FOREVER, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=0.5)
    assert process.returncode == -signal.SIGKILL


def test_reading_from_a_process_that_hangs_ends() -> None:
    with within(60), Process(FOREVER, limit=2, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read() in ("", "\n")
    assert process.returncode == -signal.SIGKILL


def test_a_process_that_ends_keeps_its_status() -> None:
    with Process([sys.executable, "-c", "raise SystemExit(7)"]) as process:
        pass
    assert process.returncode == 7


@pytest.mark.parametrize("is_worker", [False, True])
def test_a_worker_of_pytest_xdist_starts_no_workers(is_worker: bool) -> None:
    """A worker gets the arguments of the whole run.

    It started workers of its own, which started more of them.
    """
    source = pytest.Config.ArgsSource
    config: Any = SimpleNamespace(ArgsSource=source, args_source=source.TESTPATHS)
    config.option = SimpleNamespace(numprocesses=None, usepdb=False, collectonly=False)
    if is_worker:
        config.workerinput = {}
    pytest_cmdline_main(config)
    assert config.option.numprocesses == (None if is_worker else 2)


@pytest.mark.parametrize(
    "hangs",
    [
        lambda: time.sleep(600),
        lambda: re.match("(a+)+b", "a" * 60),
        lambda: pow(3, 10**9),
    ],
    ids=["a sleep", "a pattern that backtracks", "a tower of powers"],
)
def test_a_computation_that_hangs_raises_a_timeout(hangs: object) -> None:
    with pytest.raises(TimeoutError, match="not done after"), within(0.3):
        hangs()  # type: ignore[operator]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
