"""Files that are written whole or not at all. Does not know: what a file holds."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a partial file, which replaces `path` when the block ends without an error.

    After an error the partial file is removed and `path` is as it was before. Raises OSError naming
    `path` if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        problem = f"{path}: not written, and as it was before ({error.strerror})"
        raise OSError(error.errno, problem) from error
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text file, which is then complete or as it was before. Raises OSError."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogatepass")
