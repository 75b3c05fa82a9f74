"""Evaluate methods and their control arms on a task, and report the results.

    python tools/evaluate.py --data questions.jsonl --latent-steps 0,6 --out runs/tiny
    python tools/evaluate.py --task gsm8k --limit 40 --metric nll --audit --out runs/audit
    torchrun --nproc-per-node 2 tools/evaluate.py … --out runs/tiny    # each rank: whole batches
    torchrun --nproc-per-node 4 tools/evaluate.py --parallel 2 …       # two ranks hold one model
    python tools/evaluate.py --out runs/tiny --replay q-17             # is the answer the same?
    python tools/evaluate.py --out runs/tiny --regrade                 # grade all texts again

An arm is one setting of a method. A comma-separated list of values makes a grid of arms (for
--prefix, repeat the flag). The file `DIR/results.jsonl` begins with a head that holds all settings.
One line follows for each question, arm and seed. The same command continues a run where it stopped.
At the end the results are summarized in `DIR/summary.json` and `DIR/summary.md`. Exit status: 0
done, 1 failed or a replay that differs, 2 wrong usage, 130 stopped by Ctrl-C; finished results are
kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's tools and minimas

from tools.shared.interrupt import quit_quietly

quit_quietly()

from tools.evaluation.command import main  # noqa: E402
from tools.shared.streams import run_command  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command("evaluate", main))
