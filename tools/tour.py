"""Run every cell of docs/tour.ipynb, and write the notebook with its new outputs.

    python tools/tour.py                      # after every change to a cell
    python tools/tour.py --out FILE.ipynb     # write another file, as the test does

The command needs nbclient, ipykernel and matplotlib, which are in the extra `test`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TOUR = Path(__file__).resolve().parents[1] / "docs" / "tour.ipynb"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0. Raises CellExecutionError if a cell fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=TOUR, help="(default: docs/tour.ipynb)")
    out = parser.parse_args(argv).out
    notebook = nbformat.read(TOUR, as_version=4)
    # As in Jupyter, the working directory is the notebook's folder. Timing is not recorded, because
    # it differs in every run.
    folder = {"metadata": {"path": str(TOUR.parent)}}
    NotebookClient(notebook, resources=folder, record_timing=False, coalesce_streams=True).execute()
    notebook.metadata.language_info = {"name": "python"}  # not the version of this Python
    nbformat.write(notebook, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
