"""Files that appear whole or not at all."""

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

# Errors of a disk, a quota and a file that are full.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and rename it.

    Args:
        path: Its place; the folder is made.
        write: Given the file to write.

    Raises:
        OSError: If it cannot be written; where its disk is full too it names the file.
    """
    path = path.resolve()  # what a link points to is written, and the link kept
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of its own for each writer, as several may write the same; its name is short, as `path` fits.
    partial = path.with_name(f"{uuid.uuid4().hex[:12]}.partial")
    try:
        write(partial)
        _reach_disk(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
            # The system names a file where it is opened, not where it is written to.
            error.filename = str(path)
        raise


def _reach_disk(path: Path) -> None:
    """Wait until a file is on its disk: after a power cut a renamed one could be empty."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text that appears whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
