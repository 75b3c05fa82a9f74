"""Helpers for command lines: one-line errors, checked values, comma-separated lists.

The functions return converters for `type=` of `add_argument`. The flags of a command are defined in
its own module.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

# Errors that a command reports in one line. Any other error is a bug and gets a traceback.
FAILURES = (OSError, ValueError, ImportError, MemoryError, RuntimeError)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, after the command's name (`prog`)."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        self.exit(2, f"{self.prog.split()[0]}: error: {message}\n")


def print_error(command: str, error: BaseException) -> None:
    """Print an error on stderr in one line, after the command's name."""
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"{command}: error: {text}", file=sys.stderr)


def list_of(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a converter of a comma-separated list of one or more values."""
    return lambda text: [convert(part) for part in text.split(",")]


def one_of(names: Sequence[str], suffix: str = "") -> Callable[[str], str]:
    """Return a converter that accepts one of `names`, or a file name that ends with `suffix`."""
    expected = ", ".join([*names, f"FILE{suffix}"] if suffix else names)

    def name(text: str) -> str:
        if text not in names and not (suffix and text.endswith(suffix)):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")
        return text

    return name


def whole(low: int) -> Callable[[str], int]:
    """Return a converter of a whole number that is at least `low`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            problem = f"found {text!r:.40}, expected a whole number, {low} or more"
            raise argparse.ArgumentTypeError(problem)
        return int(text)

    return number


def yes_no(text: str) -> bool:
    """Convert "yes" to True and "no" to False."""
    return one_of(("yes", "no"))(text) == "yes"
