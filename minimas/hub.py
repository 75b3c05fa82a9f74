"""The hub: a repository's files in the local cache, downloaded if need be. Does not know what is in them."""

from collections.abc import Callable
from pathlib import Path


def download(repo: str, patterns: list[str], complete: Callable[[Path], bool], needed: str) -> Path:
    """The local folder of the hub's `repo` with its files of these `patterns`.

    A cached copy that is `complete` is used without a word to the network. Raises FileNotFoundError naming what is
    `needed`, where it was looked for, and how to get it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=True))
        if complete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (
        Exception
    ) as error:  # offline, gated (hf auth login), misspelt: what a hub raises has no common base
        missing = f"{repo}: no such folder here, {needed} not in the cache {constants.HF_HUB_CACHE}"
        why = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{missing}; when online: hf download {repo} (the hub: {why})"
        ) from error
