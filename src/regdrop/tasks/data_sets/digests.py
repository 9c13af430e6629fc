"""What changes where the content of a data set does: digests of its files, the hub's revision."""

import hashlib
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from regdrop.tasks.data_sets.file_kinds import kind_of, stem_of
from regdrop.tasks.data_sets.folders import DIGITS_NAME, cache_folder, files_below, find_folder
from regdrop.tasks.data_sets.layout import find_layout
from regdrop.tasks.data_sets.split_names import find_part, find_split
from regdrop.whole_files import write_text

_BLOCK_BYTES = 2**20
_HUB_SECONDS = 10.0


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
    stats = [(file, file.stat()) for file in files_below(path)]
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
