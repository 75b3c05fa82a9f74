"""Keep a command running if stdout or stderr is closed, full, not UTF-8, or no longer read.

A command writes its results to files, so an error of a stream must not stop it. This module does
not depend on what is printed.
"""

import io
import sys
from collections.abc import Callable
from typing import Any

from minimas.streams import prepare_streams, silence

from .arguments import print_error
from .interrupt import raise_again, report_stop


class Output:
    """A text stream that discards all text after a write error.

    Errors of the type `ignored` are dropped. Any other error is raised once.
    """

    def __init__(self, stream: Any, ignored: type[OSError]) -> None:
        self._stream, self._ignored = stream, ignored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text. Returns its length."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., Any], *values: str) -> None:
        try:
            action(*values)
        except OSError as error:
            silence(self._stream)
            if not isinstance(error, self._ignored):
                raise


def prepare() -> None:
    """Prepare stdout and stderr as the library's command line does, and ignore harmless errors.

    It is not an error if the reader of stdout closes it, as `head` does. All errors of stderr are
    ignored, because progress messages are less important than the run.
    """
    prepare_streams()
    for name, ignored in (("stdout", BrokenPipeError), ("stderr", OSError)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, Output(stream, ignored))


def print_progress(text: str) -> None:
    """Print a line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def run_command(name: str, main: Callable[[], int]) -> int:
    """Run the `main` of a command with prepared streams.

    Returns its status, 1 if stdout failed, or 130 if Ctrl-C stopped it.
    """
    prepare()
    raise_again()
    try:
        status = main()
    except KeyboardInterrupt:
        return report_stop(name)
    try:
        sys.stdout.flush()
    except OSError as error:
        print_error(name, error)
        return 1
    return status
