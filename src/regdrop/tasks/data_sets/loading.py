"""Data sets by folder or hub id, through `datasets.load_dataset`; errors name what is wrong."""

import errno
import glob
import hashlib
from pathlib import Path
from typing import Any

from regdrop.tasks.data_sets.digests import data_digests
from regdrop.tasks.data_sets.file_kinds import BUILDERS, SEPARATORS
from regdrop.tasks.data_sets.folders import find_folder, plain_path
from regdrop.tasks.data_sets.layout import Layout, find_layout
from regdrop.tasks.data_sets.quotes import check_quotes


def load_raw_splits(dataset: str, config_name: str | None = None) -> dict[str, Any]:
    """Load all splits of a local folder or a hub id.

    Args:
        dataset: Folder of data files, one or more a split, hub id, or "alice" for the book that
            comes with the package.
        config_name: Configuration of the hub's set; a folder has none.

    Returns:
        From the names of the splits to `datasets.Dataset`.

    Raises:
        ValueError: If it cannot be found or read, or a split is empty.
    """
    loaded = open_splits(dataset, config_name)
    for name, split in loaded.items():
        if len(split) == 0:
            raise ValueError(f"split {name!r} of data {dataset!r} is empty")
    return loaded


def open_splits(
    dataset: str, config_name: str | None = None, *, streaming: bool = False
) -> dict[str, Any]:
    """Return the splits as `load_raw_splits` does, with `streaming` to be read while used."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    folder = find_folder(dataset)
    if dataset.startswith((".", "/", "~")) and folder is None:
        raise ValueError(f"data must be a folder or a hub id; there is no folder {dataset!r}")
    try:
        layout = None if folder is None else find_layout(dataset, folder)
    except OSError as error:
        raise ValueError(f"data {dataset!r} cannot be read: {error}") from error
    try:
        if folder is not None:
            loaded = _open_folder(dataset, folder, layout, streaming=streaming)
        else:
            options: dict[str, Any] = {"streaming": True} if streaming else {}
            loaded = dict(datasets.load_dataset(dataset, config_name, **options))
    except (DatasetNotFoundError, ConnectionError, OSError) as error:
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise ValueError(
                f"data {dataset!r} cannot be kept in the cache, which HF_HOME and XDG_CACHE_HOME "
                f"move: {error}"
            ) from error
        nowhere = "" if folder else "; there is no folder of that name here"
        raise ValueError(f"data {dataset!r} cannot be found: {error}{nowhere}") from error
    except (datasets.exceptions.DatasetGenerationError, ValueError, TypeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"data {dataset!r} cannot be read: {reason}") from error
    if layout is not None and layout.kind in SEPARATORS and not streaming:
        for name, split in loaded.items():
            where = f"split {name!r} of data {dataset!r}"
            check_quotes(where, split, layout.splits[name], SEPARATORS[layout.kind])
    return loaded


def _open_folder(
    dataset: str, folder: Path, layout: Layout | None, *, streaming: bool
) -> dict[str, Any]:
    import datasets

    if streaming:
        options: dict[str, Any] = {"streaming": True}
    else:
        # The library tells changed files by their time alone.
        content = hashlib.sha256(repr(data_digests(dataset)).encode()).hexdigest()[:16]
        options = {"cache_dir": str(Path(datasets.config.HF_DATASETS_CACHE, content))}
    if layout is None:
        return dict(datasets.load_dataset(str(plain_path(folder)), **options))
    builder, reading = BUILDERS[layout.kind]
    patterns = {name: [_pattern(path) for path in own] for name, own in layout.splits.items()}
    options |= reading
    if layout.kind == "images":  # their classes are those of all splits
        return dict(datasets.load_dataset(builder, data_files=patterns, **options))
    # Each by itself: read together, all are made what the first one is, numbers and lists to text.
    return {name: _open_files(name, builder, own, options) for name, own in patterns.items()}


def _open_files(name: str, builder: str, files: list[str], options: dict[str, Any]) -> Any:
    import datasets

    try:
        return datasets.load_dataset(builder, data_files={name: files}, split=name, **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error)
        # A table of a header alone.
        what = "it is empty" if "corresponds to no data" in reason else reason
        raise ValueError(f"split {name!r}: {what}") from None


def _pattern(path: Path) -> str:
    """Return what matches a file, or all files in a folder, and no other."""
    if path.is_dir():
        return f"{plain_path(path)}/**"
    return f"{plain_path(path.parent).absolute()}/{glob.escape(path.name)}"
