"""The command line: `python -m minimas ask QUESTION`, `check MODEL` and `info MODEL`.

This module and `parser` do not import torch, so that --help is fast; `commands` does the work.
"""

import sys
import time
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit status: 0 done, 1 failed, 2 wrong usage (or SystemExit(2)), 130 Ctrl-C.
    """
    began = time.perf_counter()
    try:  # also around the imports: they take seconds, in which Ctrl-C must end quietly too
        from .parser import build_parser
        from .streams import prepare_streams

        prepare_streams()
        args = build_parser().parse_args(argv)
        from .commands import run

        args.began = began
        return run(args)
    except KeyboardInterrupt:
        print("\nminimas: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
