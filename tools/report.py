"""Make one HTML file of a run of tools/evaluate.py, or of the output of `minimas ask --json`.

    python tools/report.py runs/tiny --out report.html
    python -m minimas ask --file FILE.jsonl --json --show-thoughts > ask.json
    python tools/report.py ask.json --out report.html

Open the file in a browser; it needs no other file and no network. It shows the settings, the
numbers of each arm, the verdict of an audit, and for each question the agents with their prompts,
thoughts and token counts. Thoughts and attention are shown if the run was made with --lens
(thoughts also if the answers were made with --show-thoughts). An unfinished run is shown up to its
last record. Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's tools and minimas

from tools.shared.interrupt import quit_quietly

quit_quietly()

from tools.reporting.command import main  # noqa: E402
from tools.shared.streams import run_command  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command("report", main))
