"""End a command quietly if Ctrl-C arrives while its modules are imported.

The imports take seconds, and an exception might be caught inside an import of torch or numpy. This
module imports only the standard library. A command calls `quit_quietly` before all other imports,
and `run_command` in streams.py calls `raise_again`.
"""

import os
import signal
import sys
from pathlib import Path

STOPPED = 130  # exit status after Ctrl-C


def quit_quietly() -> None:
    """End the process with one line at Ctrl-C, until `raise_again`. A background job ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)


def raise_again() -> None:
    """Raise KeyboardInterrupt at Ctrl-C again, as Python does."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def report_stop(name: str) -> int:
    """Print that a command was stopped, and return its exit status."""
    print(f"\n{name}: stopped", file=sys.stderr, flush=True)
    return STOPPED


def _quit(*_: object) -> None:
    os._exit(report_stop(Path(sys.argv[0]).stem))
