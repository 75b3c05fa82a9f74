"""Parts of the command `python tools/benchmark.py`."""
