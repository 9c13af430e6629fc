"""Kinds of data files: what reads them, and what is wrong with one before it is read."""

from pathlib import Path
from typing import Any

SEPARATORS = {"CSV": ",", "TSV": "\t"}
# By kind, the builder of `datasets` that reads it and its options.
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "parquet": ("parquet", {}),
    "arrow": ("arrow", {}),
    "JSON": ("json", {}),
    **{kind: ("csv", {"sep": separator}) for kind, separator in SEPARATORS.items()},
    "text": ("text", {}),
    # A folder alone in its split is a class too.
    "images": ("imagefolder", {"drop_labels": False}),
}
_KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "JSON"),
    ".csv": "CSV",
    ".tsv": "TSV",
    ".txt": "text",
}
ACCEPTED_SUFFIXES = ", ".join(_KINDS)
_BINARY_KINDS = ("parquet", "arrow")
_PACKED = (".gz", ".bz2", ".xz", ".zst")
# What `datasets` writes beside the data that it saves.
_DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def kind_of(path: Path) -> str | None:
    """Return the kind of a data file by its name; None for any other file."""
    name = _unpacked(path).lower()
    return None if name in _DESCRIPTIONS else _KINDS.get(Path(name).suffix)


def stem_of(path: Path) -> str:
    """Return the name of a data file without its suffixes."""
    return Path(_unpacked(path)).stem


def check_start(path: Path) -> None:
    """Check the beginning of a data file.

    Raises:
        ValueError: If it is empty, or text that begins with a byte order mark.
    """
    with path.open("rb") as file:
        start = file.read(3)
    if not start:
        raise ValueError(f"{path} is empty")
    for mark, encoding in _MARKS.items():
        if start.startswith(mark) and kind_of(path) not in _BINARY_KINDS:
            raise ValueError(
                f"{path} begins with a byte order mark of {encoding}: save it as UTF-8 without"
            )


def _unpacked(path: Path) -> str:
    return path.stem if path.suffix.lower() in _PACKED else path.name
