"""Data sets by folder or hub id, through `datasets.load_dataset`; errors name what is wrong."""

import errno
import glob
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from regdrop.tasks.common.file_kinds import BUILDERS, SEPARATORS
from regdrop.tasks.common.folders import data_digests, find_folder, plain_path
from regdrop.tasks.common.layout import Layout, find_layout
from regdrop.tasks.common.quotes import check_quotes

# The part of a training split held out where a set has no split of its own to select on, and the
# seed by which it is drawn: the same for every seed of a training.
HELD_OUT = 0.1
SPLIT_SEED = 0
_MOST_SHOWN = 80  # characters of a value in a message
_OF_TABLES = ": in CSV and TSV an empty field, NA, null and None are null; JSON lines keep them"


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


def require_columns(dataset: str, splits: Mapping[str, Any], columns: Iterable[str]) -> None:
    """Check that every split has some columns.

    Raises:
        ValueError: If one is missing, by its name.
    """
    for name, split in splits.items():
        missing = sorted(set(columns) - set(split.column_names))
        if missing:
            raise ValueError(
                f"split {name!r} of data {dataset!r} must have the columns "
                f"{sorted(columns)}; it lacks {missing} and has {split.column_names}"
            )


def check_texts(dataset: str, splits: Mapping[str, Any], columns: Iterable[str]) -> None:
    """Check that some columns of splits, as they were loaded, hold a text in every row.

    Raises:
        ValueError: If one holds anything else, by split, column and row.
    """
    from datasets import Value

    for name, split in splits.items():
        for column in columns:
            where = f"column {column!r} of split {name!r} of data {dataset!r}"
            feature = split.features[column]
            # A column of several kinds has a feature of its own, though its dtype is text.
            if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
                numbered = enumerate(split[column])
                row, shown = next(
                    ((i, x) for i, x in numbered if not isinstance(x, str)), (0, split[0][column])
                )
                # A file of columns in place of rows has a whole one there.
                raise ValueError(f"{where} must hold text, got {shorten(shown)} in row {row}")
            values = split.data.column(column)
            if values.null_count:
                row = values.is_null().index(True).as_py()
                is_table = split.info.builder_name == "csv"
                raise ValueError(
                    f"{where} must hold text, got null in row {row}{_OF_TABLES if is_table else ''}"
                )


def shorten(value: Any) -> str:
    """Return the representation of a value as a message shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def require_training(dataset: str, splits: Mapping[str, Any]) -> Any:
    """Return the training split.

    Raises:
        ValueError: If there is none.
    """
    if "train" not in splits:
        raise ValueError(f"data {dataset!r} must have a split 'train', got {sorted(splits)}")
    return splits["train"]


def split_training(splits: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    """Return splits whose training split is the part that is used, with one to select on.

    Where there is no validation split it is a tenth of the training split. Without a training split
    they are as they were.

    Args:
        splits: Splits by what they are used for.
        size: Rows of the training split that are used, drawn by a fixed seed; None for all.

    Raises:
        ValueError: If the training split has fewer, or is too small to be split.
    """
    result = dict(splits)
    if "train" not in result:
        return result
    if "validation" not in result:
        result["train"], result["validation"] = _hold_out(result["train"])
    result["train"] = _take_part(result["train"], size)
    return result


def _hold_out(train: Any) -> tuple[Any, Any]:
    """Return nine tenths of a training split and the tenth on which to select.

    Raises:
        ValueError: If it is too small to be split.
    """
    if len(train) < 10:
        raise ValueError(
            f"split 'train' must have at least 10 rows to hold out some, got {len(train)}"
        )
    parts = train.train_test_split(test_size=HELD_OUT, seed=SPLIT_SEED)
    return parts["train"], parts["test"]


def _take_part(train: Any, size: int | None) -> Any:
    """Return so many rows of a training split, drawn by a fixed seed; all for None.

    Raises:
        ValueError: If there are fewer.
    """
    if size is None:
        return train
    if not 1 <= size <= len(train):
        raise ValueError(
            f"train_examples must be between 1 and the {len(train)} of the training split, "
            f"got {size}; --set train_examples=null takes all of it"
        )
    return train.shuffle(seed=SPLIT_SEED).select(range(size))
