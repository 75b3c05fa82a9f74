"""Standard streams of a command that are closed, full, not UTF-8, or left by their reader.

What a command computes is in files, so that no stream may end it early. Does not know: what is
printed.
"""

import io
import sys
from collections.abc import Callable
from typing import Any

from minimas.streams import prepare_streams, silence

from .arguments import print_error


class Output:
    """A text stream that goes on as the null device after an error of writing.

    An error of one of the types `ignored` is no failure; any other is raised, once.
    """

    def __init__(self, stream: Any, ignored: type[OSError]) -> None:
        self._stream, self._ignored = stream, ignored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text; return its length."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., Any], *values: str) -> None:
        try:
            action(*values)
        except OSError as error:
            silence(self._stream)
            if not isinstance(error, self._ignored):
                raise


def prepare() -> None:
    """Make stdout and stderr streams that fail only where the output of stdout is lost.

    In addition to what the library's command line does, a reader of stdout that leaves, such as
    `head`, has read enough, and an error of stderr is ignored: progress is not worth a run.
    """
    prepare_streams()
    for name, ignored in (("stdout", BrokenPipeError), ("stderr", OSError)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, Output(stream, ignored))


def run_command(name: str, main: Callable[[], int]) -> int:
    """Run a command's `main` with prepared streams; return its status, 1 if stdout failed."""
    prepare()
    status = main()
    try:
        sys.stdout.flush()
    except OSError as error:
        print_error(name, error)
        return 1
    return status
