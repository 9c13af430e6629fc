"""Rows of CSV and TSV that were read as one text, since a quote before them is not closed."""

import bz2
import csv
import gzip
import io
import lzma
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from regdrop.tasks.notices import say_once

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def check_quotes(where: str, split: Any, files: Iterable[Path], separator: str) -> None:
    """Check texts that run over several lines of a table; say where they may be rows.

    Args:
        where: The split and its data, in words.
        split: The table as it was loaded, a `datasets.Dataset`.
        files: The files that it was loaded from.
        separator: What stands between two fields.

    Raises:
        ValueError: If a quote is not closed at the end of its field, or a text holds lines and
            tabs, by file and row.
    """
    kinds = ("string", "large_string")
    texts = [name for name, x in split.features.items() if getattr(x, "dtype", "") in kinds]
    for column in texts:
        lines = _find_rows(split, column, ["\n"])
        if not lines:
            continue
        both = _find_rows(split, column, ["\n", separator])
        broken = next((file for file in files if _has_open_quote(file, separator)), None)
        if broken is not None or (both and separator == "\t"):
            row = (both or lines)[0]
            raise ValueError(
                f"column {column!r} of {where} holds several lines of {broken or next(iter(files))}"
                f" in row {row}: a field that begins with a quote must end with one, and those "
                "inside be doubled"
            )
        like_rows = [row for row in both if _is_like_rows(split[row][column], split, separator)]
        if like_rows:
            say_once(
                f"column {column!r} of {where} has {len(like_rows):,} texts whose lines have the "
                f"commas of rows, the first in row {like_rows[0]}: if they are rows, a quote is "
                "not closed before them"
            )


def _find_rows(split: Any, column: str, parts: Iterable[str]) -> list[int]:
    """Return the rows whose text holds all of some parts."""
    from pyarrow import compute  # type: ignore[import-untyped]

    found = None
    for part in parts:
        has = compute.match_substring(split.data.column(column), part)
        found = has if found is None else compute.and_(found, has)
    rows: list[int] = compute.indices_nonzero(compute.fill_null(found, False)).to_pylist()
    return rows


def _is_like_rows(text: str, split: Any, separator: str) -> bool:
    """Return whether each line of a text but the last ends as a row could."""
    least = len(split.column_names) - 1
    return all(line.count(separator) >= least for line in text.split("\n")[:-1])


def _has_open_quote(file: Path, separator: str) -> bool:
    """Return whether something follows a closing quote in its field."""
    if file.suffix.lower() == ".zst":  # which Python itself cannot unpack
        return False
    opener = _OPENERS.get(file.suffix.lower(), io.open)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with opener(file, "rt", encoding="utf-8", newline="") as lines:
            for _ in csv.reader(lines, delimiter=separator, strict=True):
                pass
    except csv.Error:
        return True
    finally:
        csv.field_size_limit(limit)
    return False
