"""Parts of the command `python tools/claims.py`, which measures the claims of the paper."""
