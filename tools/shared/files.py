"""Write files completely or not at all.

This module does not depend on what a file holds.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces `path` if the block ends without an error.

    After an error, the temporary file is removed and `path` is unchanged. Raises OSError naming
    `path` if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        partial.replace(path)
    except OSError as error:
        problem = f"{path}: cannot be written and is unchanged ({error.strerror})"
        raise OSError(error.errno, problem) from error
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text file. After an error (OSError), an existing file is unchanged."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogatepass")
