"""Run methods and their control arms over a task, lose nothing, and report the results.

    python tools/evaluate.py --data questions.jsonl --latent-steps 0,6 --out runs/tiny
    python tools/evaluate.py --task gsm8k --limit 40 --metric nll --audit --out runs/audit
    torchrun --nproc-per-node 2 tools/evaluate.py … --out runs/tiny    # ranks take whole batches
    torchrun --nproc-per-node 4 tools/evaluate.py --parallel 2 …       # two ranks hold one model
    python tools/evaluate.py --out runs/tiny --replay q-17             # the same answer again?
    python tools/evaluate.py --out runs/tiny --regrade                 # grade all texts anew

A list, with commas, makes a grid (of --prefix: the flag several times). `DIR/results*.jsonl` has a
head with every setting and one line for each question, arm and seed; the same command continues
where it stopped. `DIR/summary.json` and `.md` are made from it at the end. Status: 0 done, 1 failed
(or a replay that differs), 2 usage, 130 stopped by Ctrl-C; what is done is kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's tools and minimas

from tools.evaluation.command import main
from tools.shared.streams import run_command

if __name__ == "__main__":
    sys.exit(run_command("evaluate", main))
