"""Find a model repository's files in the hub's local cache, or download them.

Does not know what is in them.
"""

from pathlib import Path


def download(repo: str, needed: list[str], optional: list[str]) -> Path:
    """Return the local folder of the hub's `repo` with its files of these patterns.

    A cached copy that has what is `needed` is used without a network connection. Raises
    FileNotFoundError naming what is needed, where it was looked for, and how to get it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HTTPError,
        LocalEntryNotFoundError,
    )

    patterns = needed + optional
    try:
        cached = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=True))
        if all(any(cached.glob(pattern)) for pattern in needed):
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (OSError, ValueError, HTTPError) as error:  # offline, gated, or no such repository
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{repo}: no such folder here, and no {' and '.join(needed)} in the cache "
            f"{constants.HF_HUB_CACHE}; when online: hf download {repo} (the hub: {reason})"
        ) from error
