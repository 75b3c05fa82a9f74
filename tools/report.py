"""One HTML file for a run of tools/evaluate.py, or for answers of `minimas ask --json`.

    python tools/report.py runs/tiny --out report.html
    python -m minimas ask --file FILE.jsonl --json --show-thoughts > ask.json
    python tools/report.py ask.json --out report.html

The file needs no other file and no network: open it in a browser. It shows the settings, each arm's
numbers, an audit's verdict, and for each question the agents with their prompts, thoughts and bill.
Thoughts and attention are there if the run was made with --lens, the answers with --show-thoughts.
A run that is not finished is shown as far as it is. Status: 0 done, 1 failed, 2 usage.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's tools and minimas

from tools.reporting.command import main
from tools.shared.streams import run_command

if __name__ == "__main__":
    sys.exit(run_command("report", main))
