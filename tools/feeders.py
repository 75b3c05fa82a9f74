"""Fit a map from hidden states to embeddings on plain text, and write it as a file for --align.

    python tools/feeders.py --model FOLDER --kind fitted --out fitted.safetensors

The kinds are described in tools/evaluation/feeders.py. Exit status: 0 done, 1 failed, 2 wrong
usage.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's tools and minimas

from tools.evaluation.feeders import main

if __name__ == "__main__":
    sys.exit(main())
