"""Standard streams that may be closed, full, left by their reader, or not UTF-8.

Does not know: what is printed.
"""

import io
import os
import sys
from typing import TextIO


def prepare_streams() -> None:
    """Replace closed streams by the null device, and let no text fail for its encoding."""
    for name, encoding, errors in (
        ("stdin", "utf-8-sig", "surrogateescape"),  # UTF-8, as every file
        ("stdout", None, "backslashreplace"),
        ("stderr", None, "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors=errors)


def silence(stream: TextIO) -> None:
    """Discard what a stream that cannot be written still holds, and all that follows.

    Otherwise it would fail once more when Python flushes it at the exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
