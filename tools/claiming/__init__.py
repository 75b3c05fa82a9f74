"""The claims of the paper, each measured by one command: see tools/claims.py."""
