"""Find a model repository's files in the hub's local cache, or download them."""

from collections.abc import Callable
from pathlib import Path


def download(
    repo: str, needed: list[str], optional: list[str], find: Callable[[Path], Path]
) -> Path:
    """Return what `find` returns for the local folder of the hub's `repo`.

    `needed` and `optional` are patterns of file names. `find` must raise FileNotFoundError if a
    file is missing. A complete cached copy is used without a network connection, and an incomplete
    copy is completed. Raises FileNotFoundError naming what is needed, where it was looked for, and
    how to get it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    every = needed + optional
    reason = ""
    # The last try needs no optional files, which may be missing when offline.
    for patterns, local in ((every, True), (every, False), (needed, True)):
        try:
            return find(
                Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=local))
            )
        except (OSError, ValueError, HTTPError) as error:  # incomplete, gated, no such repository
            reason = reason if local else str(error).strip().partition("\n")[0]
    raise FileNotFoundError(
        f"{repo}: no such folder here, and no {' and '.join(needed)} in the cache "
        f"{constants.HF_HUB_CACHE}; when online: hf download {repo} (the hub: {reason}); a .gguf "
        f"file is {repo}:FOLDER/FILE.gguf or, by its type, {repo}:Q8_0"
    )
