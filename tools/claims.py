"""Measure a claim of the paper, and write its numbers, a picture and one sentence.

    python tools/claims.py --list                               # the names, and what each checks
    python tools/claims.py lossless --out claims                # on weights/tiny
    python tools/claims.py depth --model DIR --data FILE.jsonl --limit 40 --out claims
    python tools/claims.py all --out claims

The command writes OUT/claims-NAME.json, .svg and .png, and prints the sentence. docs/claims.md has
the claims and what was found. A claim that does not hold is a result, not a failure. The command
needs matplotlib (pip install matplotlib). Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped
by Ctrl-C.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's tools and minimas

from tools.shared.interrupt import quit_quietly

quit_quietly()

from tools.claiming.command import main  # noqa: E402
from tools.shared.streams import run_command  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command("claims", main))
