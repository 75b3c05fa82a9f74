"""Checkpoint formats other than a Hugging Face folder."""
