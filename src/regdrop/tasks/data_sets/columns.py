"""Columns of a data set: whether every split has them, and a text in every row."""

from collections.abc import Iterable, Mapping
from typing import Any

_MOST_SHOWN = 80  # characters of a value in a message
_OF_TABLES = ": in CSV and TSV an empty field, NA, null and None are null; JSON lines keep them"


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
