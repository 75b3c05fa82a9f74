"""Train the map between frozen agents: its gradients flow through all thoughts and the KV cache.

    python tools/train_link.py --out link.safetensors                        # weights/tiny
    python tools/train_link.py -m FOLDER --data FILE.jsonl --rows 200:1200 --out link.safetensors
    python -m minimas ask -m FOLDER --align link.safetensors QUESTION

At any time, --out holds the link with the lowest held-out loss so far. The same command continues a
stopped run, and a larger --updates trains longer. A state and a log of JSON lines are written next
to --out. docs/link.md has data, controls and results. Exit status: 0 done, 1 failed, 2 wrong usage,
130 stopped by Ctrl-C; the best link so far is kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's tools and minimas

from tools.shared.interrupt import quit_quietly

quit_quietly()

from tools.linking.command import main  # noqa: E402
from tools.shared.streams import run_command  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command("train_link", main))
