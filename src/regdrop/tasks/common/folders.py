"""Folders of data, and what the hub has: where they are, and the identity of their content."""

import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from regdrop.whole_files import write_text

# scikit-learn's digits among data sets.
DIGITS_NAME = "digits"
# What comes with the package, by name: folders with a file for each split.
_SHIPPED = {"alice": Path(__file__).parents[1] / "texts" / "alice"}
_BLOCK_BYTES = 2**20
_HUB_SECONDS = 10.0


def find_folder(dataset: str) -> Path | None:
    """Return the folder of a data set; None for a hub id."""
    folder = _SHIPPED.get(dataset, Path(dataset)).expanduser()
    return folder if folder.exists() else None


def data_digests(dataset: str) -> dict[str, str]:
    """Return what changes where the content of a data set does.

    Of a folder it is a digest of every file and folder in it, computed once and kept for files of
    the same size and time; of a hub id its revision. There is none of what cannot be found.
    """
    folder = find_folder(dataset)
    if folder is None:
        revision = None if dataset == DIGITS_NAME else _hub_revision(dataset)
        return {} if revision is None else {"revision": revision}
    if not folder.is_dir():
        return {}
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return {path.name: _digest(path) for path in entries}


def plain_path(folder: Path) -> Path:
    """Return a path of a folder that is no pattern to `datasets`, such as one with brackets is.

    Where its own is one, it is a folder of links in the cache.
    """
    source = folder.resolve()
    if not glob.has_magic(str(source)):
        return folder
    mirror = cache_folder("folders") / hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    wanted = {mirror / file.relative_to(source): file for file in _files(source)}
    mirror.mkdir(parents=True, exist_ok=True)
    for old in mirror.rglob("*"):
        if old.is_symlink() and old not in wanted:
            old.unlink(missing_ok=True)
    for link, file in wanted.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            link.symlink_to(file)
    return mirror


@cache
def _hub_revision(dataset: str) -> str | None:
    """Return the revision of the hub's data set; without a connection, that of the cache."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        return None
    # A hub that cannot be asked fails in as many ways as there are networks.
    with suppress(Exception):
        return HfApi().dataset_info(dataset, timeout=_HUB_SECONDS).sha
    with suppress(ValueError):  # no name that the hub could have
        readme = try_to_load_from_cache(dataset, "README.md", repo_type="dataset")
        if isinstance(readme, str):
            return Path(readme).parent.name
    return None


def _digest(path: Path) -> str:
    """Return the digest of a file, or of all in a folder with their names."""
    stats = [(file, file.stat()) for file in _files(path)]
    # The time of the last change may be set to any other; that of this setting may not.
    state = [(str(file), x.st_size, x.st_mtime_ns, x.st_ctime_ns) for file, x in stats]
    key = hashlib.sha256(repr((str(path.resolve()), state)).encode("utf-8", "surrogateescape"))
    kept = cache_folder("digests") / key.hexdigest()
    with suppress(OSError):
        return kept.read_text(encoding="ascii")
    found = hashlib.sha256()
    for file, _ in stats:
        if file != path:
            found.update(os.fsencode(file.relative_to(path)) + b"\0")
        with file.open("rb") as content:
            while block := content.read(_BLOCK_BYTES):
                found.update(block)
    digest = found.hexdigest()[:16]
    with suppress(OSError):
        write_text(kept, digest)
    return digest


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    else:
        yield from sorted(file for file in path.rglob("*") if file.is_file())


def cache_folder(kind: str) -> Path:
    """Return the folder of what is kept of one kind between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "regdrop" / kind
