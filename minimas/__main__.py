"""The command line: `python -m minimas ask QUESTION`, `chat`, `remember FILE`, `check` and `info`.

This module and `parser` do not import torch, so that --help is fast; `commands` does the work.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence


def quit_at_once(*_: object) -> None:
    """End the process. An exception might be caught inside an import of torch or numpy."""
    print("\nminimas: stopped", file=sys.stderr)
    os._exit(130)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit status: 0 done, 1 failed, 2 wrong usage (or SystemExit(2)), 130 Ctrl-C.
    """
    began = time.perf_counter()
    try:  # includes the imports: they take seconds, and Ctrl-C must end quietly then too
        from .parser import build_parser
        from .streams import prepare_streams

        prepare_streams()
        args = build_parser().parse_args(argv)
        handler = signal.getsignal(signal.SIGINT)
        if handler is signal.default_int_handler:  # a background job has another handler
            signal.signal(signal.SIGINT, quit_at_once)
        from .commands import run

        signal.signal(signal.SIGINT, handler)
        args.began = began
        return run(args)
    except KeyboardInterrupt:
        print("\nminimas: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
