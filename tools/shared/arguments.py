"""Helpers for command lines: one-line errors, checked values, comma-separated lists.

`list_of`, `one_of` and `whole` return converters for the parameter `type` of `add_argument`, and
`yes_no` is such a converter. Each command defines its flags in its own module.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from minimas.parser import whole_number

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
    """Return a converter for a comma-separated list of values, each converted by `convert`.

    A value that is repeated counts once.
    """
    return lambda text: list(dict.fromkeys(convert(part) for part in text.split(",")))


def one_of(names: Sequence[str], suffix: str = "") -> Callable[[str], str]:
    """Return a converter that accepts one of `names`, or a file name that ends with `suffix`.

    Without a `suffix`, no file name is accepted.
    """
    expected = ", ".join([*names, f"FILE{suffix}"] if suffix else names)

    def name(text: str) -> str:
        if text not in names and not (suffix and text.endswith(suffix)):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")
        return text

    return name


def whole(low: int) -> Callable[[str], int]:
    """Return a converter for a whole number that is at least `low`."""
    return partial(whole_number, low)


def yes_no(text: str) -> bool:
    """Convert "yes" to True and "no" to False."""
    return one_of(("yes", "no"))(text) == "yes"
