"""Parts of the command `python tools/train_tiny.py`."""
