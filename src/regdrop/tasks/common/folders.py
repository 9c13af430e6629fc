"""Folders of data, and what the hub has: where they are, and the identity of their content."""

import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from regdrop.tasks.common.file_kinds import kind_of, stem_of
from regdrop.tasks.common.layout import find_layout
from regdrop.tasks.common.split_names import find_part, find_split
from regdrop.whole_files import write_text

# scikit-learn's digits among data sets.
DIGITS_NAME = "digits"
# What comes with the package, by name: folders with a file for each split.
_SHIPPED = {"alice": Path(__file__).parents[1] / "texts" / "alice"}
_BLOCK_BYTES = 2**20
# What a model and its input are made from.
_OF_CHECKPOINT = (
    "config.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "p*processor_config.json",
)
_PART_BYTES, _PARTS = 2**17, 32
_HUB_SECONDS = 10.0


def find_folder(dataset: str) -> Path | None:
    """Return the folder of a data set; None for a hub id."""
    folder = _SHIPPED.get(dataset, Path(dataset)).expanduser()
    return folder if folder.exists() else None


def data_digests(dataset: str) -> dict[str, str]:
    """Return what changes where the content of a data set does.

    Of a folder it is a digest of every file and folder in it that makes a split, or of all in it
    where `datasets` alone knows which do, computed once and kept for files of the same size and
    time; of a hub id its revision. There is none of what cannot be found.
    """
    folder = find_folder(dataset)
    if folder is None:
        revision = None if dataset == DIGITS_NAME else _hub_revision(dataset)
        return {} if revision is None else {"revision": revision}
    if not folder.is_dir():
        return {}
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    # What lies beside the data, such as notes and runs, may change.
    with suppress(ValueError, OSError):  # told when it is loaded
        if layout := find_layout(dataset, folder):
            used = {path.resolve() for own in layout.splits.values() for path in own}
            held = used.union(*(path.parents for path in used))
            entries = [path for path in entries if path.resolve() in held]
    return {path.name: _digest(path) for path in entries}


def is_of_split(name: str) -> bool:
    """Return whether a file or folder is named after a split."""
    with suppress(ValueError):
        stem = stem_of(Path(name)) if kind_of(Path(name)) else name
        return name == "data" or find_split(find_part(stem).name) is not None
    return True


def checkpoint_digest(model: str) -> str | None:
    """Return what changes where a checkpoint in a folder does; None for any other.

    Large files count by their size and by parts spread over them.
    """
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        return None
    found = hashlib.sha256()
    for pattern in _OF_CHECKPOINT:
        for file in sorted(folder.glob(pattern)):
            size = file.stat().st_size
            found.update(os.fsencode(file.name) + b"\0" + str(size).encode())
            with file.open("rb") as content:
                for start in range(0, size, max(_PART_BYTES, size // _PARTS)):
                    content.seek(start)
                    found.update(content.read(_PART_BYTES))
                content.seek(max(0, size - _PART_BYTES))
                found.update(content.read())
    return found.hexdigest()[:16]


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
