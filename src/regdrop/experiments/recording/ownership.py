"""One owner a run: locks of the operating system, which end with the process that holds them."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

# Whoever looks whether a lock is held takes it for a moment.
_MOMENT_SECONDS = 1.0
# How long to wait for a file that others hold while they write it.
PATIENCE_SECONDS = 60.0
# Begins what the file of a lock says of its owner.
_NAME = "process "


class HeldError(ValueError):
    """What is asked for is at work in another process."""


@contextmanager
def hold(path: Path, what: str, *, seconds: float = _MOMENT_SECONDS) -> Iterator[None]:
    """Hold a lock while the block runs; its file is there meanwhile, and says who holds it.

    Folders that are made for the file are removed with it where they hold nothing else.

    Args:
        path: File of the lock. All who hold it must agree on its name, and see its folder.
        what: What is held, for the error.
        seconds: How long to wait for another to let go.

    Raises:
        HeldError: If another process still holds it, with what is known of that.
    """
    lock = FileLock(path)
    deadline = time.monotonic() + seconds
    made = _acquire(lock, path, what, deadline)
    try:
        _write_name(path)
        yield
    finally:
        # While it is held: who waits for a file that is gone takes the next one.
        with suppress(OSError):
            path.unlink()
        lock.release()
        remove_empty(made)


def holder(path: Path) -> str | None:
    """Return who holds a lock, in words; None if nobody does, and then there is no file either."""
    if not path.exists():
        return None
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _name_in(path)
    except OSError:  # its folder went this moment
        return None
    with suppress(OSError):
        path.unlink()
    lock.release()
    return None


def check_folder_name(folder: Path) -> None:
    """Check that a folder has a name that other libraries can write to, too.

    Raises:
        ValueError: If not.
    """
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"a folder's name must be Unicode, got {str(folder)!r}") from None


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it, and return the new ones, the innermost first."""
    check_folder_name(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, as far as they hold nothing."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _acquire(lock: FileLock, path: Path, what: str, deadline: float) -> list[Path]:
    """Take a lock, and return the folders that were made for it."""
    while True:
        made = make_folders(path.parent)
        try:
            lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
        except Timeout:
            raise HeldError(f"{what} is at work in {_name_in(path)}") from None
        except FileNotFoundError:  # another's last act removed the folder
            if time.monotonic() > deadline:
                raise
        else:
            return made


def _write_name(path: Path) -> None:
    """Write who holds a lock into its file, where that can be done.

    On Windows nobody can read or write what is locked. Where the file system has no locks, the file
    holds what filelock knows the owner by, and is no lock any more without it.
    """
    with suppress(OSError):
        found = path.read_text(encoding="utf-8")
        if not found or found.startswith(_NAME):
            moment = time.strftime("%Y-%m-%d %H:%M:%S")
            name = f"{_NAME}{os.getpid()} on {socket.gethostname()}, since {moment}"
            path.write_text(name, encoding="utf-8")


def _name_in(path: Path) -> str:
    try:
        found = path.read_text(encoding="utf-8")
    except OSError:
        found = ""
    return found if found.startswith(_NAME) else "another process"
