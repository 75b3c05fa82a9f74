"""Parts of the command `python tools/train_link.py`: a trained map between frozen agents."""
