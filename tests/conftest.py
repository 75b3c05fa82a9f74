"""Settings for all tests: one hypothesis profile, one thread, and two processes.

Tiny models spend more time on starting threads than on computing.
"""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from minimas import Qwen3

from .models import tiny_model

settings.register_profile(
    "minimas", deadline=None, derandomize=True, max_examples=30, print_blob=False
)
settings.load_profile("minimas")
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A background job of a shell ignores Ctrl-C, and processes that tests start inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the number
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run all tests in two processes if pytest-xdist is installed.

    If files are given, one process is used, because it starts sooner. A given `-n` is kept. Each
    process gets neighbouring tests ("worksteal"), so that module fixtures are rarely set up twice.
    """
    option, everything = config.option, config.ArgsSource.TESTPATHS
    if not hasattr(option, "numprocesses") or hasattr(config, "workerinput"):
        return  # there is no pytest-xdist, or this is one of its processes already
    if option.numprocesses is None and config.args_source is everything:
        option.numprocesses = 0 if option.usepdb or option.collectonly else 2
        option.dist = "worksteal" if option.numprocesses else "no"


@pytest.fixture(scope="session")
def model() -> Iterator[Qwen3]:
    """Return the untied Qwen3 in float64 that most tests use. Tests must not change it."""
    shared = tiny_model()
    before = shared.fingerprint()
    yield shared
    assert shared.fingerprint() == before, "a test changed the shared model"
