"""Handle standard streams that are closed, full, not UTF-8, or no longer read by anyone."""

import io
import os
import sys
from typing import TextIO


def prepare_streams() -> None:
    """Replace closed streams by the null device, and prevent encoding errors in the others."""
    for name in ("stdin", "stdout", "stderr"):
        reads = name == "stdin"
        stream = getattr(sys, name)
        if stream is None:  # closed, for example by `>&-`
            setattr(sys, name, open(os.devnull, "r" if reads else "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                encoding="utf-8-sig" if reads else None,  # UTF-8, as in every input file
                errors="surrogateescape" if reads else "backslashreplace",
            )


def silence(stream: TextIO) -> None:
    """Discard the buffered text of a stream that cannot be written, and all later text.

    Otherwise the stream would fail again when Python flushes it at exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
