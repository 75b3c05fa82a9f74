"""Standard streams that may be closed, full, left by their reader, or not UTF-8.

Does not know: what is printed.
"""

import io
import os
import sys
from typing import TextIO


def prepare_streams() -> None:
    """Replace closed streams by the null device, and let no text fail for its encoding.

    Standard input is UTF-8, as every file. Of bytes that are not, halves of characters are left.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")


def silence(stream: TextIO) -> None:
    """Discard what a stream that cannot be written still holds, and all that follows.

    Otherwise it would fail once more when Python flushes it at the exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """Print a line on stderr. If that fails, lost progress must not cost the answer on stdout."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)
