"""Folders of data: where they are, in a form that `datasets` reads, and what is kept of them."""

import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# scikit-learn's digits among data sets.
DIGITS_NAME = "digits"
# What comes with the package, by name: folders with a file for each split.
_SHIPPED = {"alice": Path(__file__).parents[1] / "texts" / "alice"}


def find_folder(dataset: str) -> Path | None:
    """Return the folder of a data set; None for a hub id."""
    folder = _SHIPPED.get(dataset, Path(dataset)).expanduser()
    return folder if folder.exists() else None


def plain_path(folder: Path) -> Path:
    """Return a path of a folder that is no pattern to `datasets`, such as one with brackets is.

    Where its own is one, it is a folder of links in the cache.
    """
    source = folder.resolve()
    if not glob.has_magic(str(source)):
        return folder
    mirror = cache_folder("folders") / hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    wanted = {mirror / file.relative_to(source): file for file in files_below(source)}
    mirror.mkdir(parents=True, exist_ok=True)
    for old in mirror.rglob("*"):
        if old.is_symlink() and old not in wanted:
            old.unlink(missing_ok=True)
    for link, file in wanted.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            link.symlink_to(file)
    return mirror


def files_below(path: Path) -> Iterator[Path]:
    """Yield a file, or all files in a folder and those below, in order."""
    if path.is_file():
        yield path
    else:
        yield from sorted(file for file in path.rglob("*") if file.is_file())


def cache_folder(kind: str) -> Path:
    """Return the folder of what is kept of one kind between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "regdrop" / kind
