"""Standard streams that may be closed, full, left by their reader, or not UTF-8.

Does not know: what is printed.
"""

import io
import os
import sys
from typing import TextIO


def prepare_streams() -> None:
    """Replace closed streams by the null device, and let no text fail for its encoding."""
    for name, mode, encoding, errors in (
        ("stdin", "r", "utf-8-sig", "surrogateescape"),  # UTF-8, as every file
        ("stdout", "w", None, "backslashreplace"),
        ("stderr", "w", None, "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by `>&-`
            stream = open(os.devnull, mode)  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors=errors)
        setattr(sys, name, stream)


def silence(stream: TextIO) -> None:
    """Discard what a stream that cannot be written still holds, and all that follows.

    Otherwise it would fail once more when Python flushes it at the exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
