"""Run an untrusted Python program in a sandbox (see tools/evaluation/sandbox.py).

    python tools/sandbox.py FILE [--timeout SECONDS] [--memory MB]

Exit status: 0 if the program reached its last statement, 1 if it did not, 2 for wrong usage or a
file that cannot be read.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's tools

from tools.evaluation.sandbox import run
from tools.shared.arguments import Parser, print_error


def main() -> int:
    """Run the command line. Returns the exit status."""
    top = Parser("sandbox", description=(__doc__ or "").partition("\n")[0])
    add = top.add_argument
    add("file", metavar="FILE")
    add("--timeout", type=float, default=20.0, metavar="S", help="seconds (default: 20)")
    add(
        "--memory",
        type=int,
        default=1024,
        metavar="MB",
        help="megabytes per process (default: 1024)",
    )
    args = top.parse_args()
    if not 0 < args.timeout < math.inf or args.memory < 1:
        found = f"found --timeout {args.timeout} --memory {args.memory}"
        top.error(f"{found}, expected numbers above 0")
    try:
        program = Path(args.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        print_error("sandbox", ValueError(f"{args.file}: {error}"))
        return 2
    outcome = run(program, args.timeout, args.memory)
    print(f"{outcome.reason} ({outcome.seconds:.2f} s)", file=sys.stderr)
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    sys.exit(main())
