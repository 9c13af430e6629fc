"""Folders of images, one a class: what `datasets` would read otherwise, or not at all."""

from collections.abc import Iterable, Mapping
from pathlib import Path

_SUFFIXES = (
    ".bmp",
    ".gif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def is_image(path: Path) -> bool:
    """Return whether a file is an image by its name."""
    return path.suffix.lower() in _SUFFIXES


def check_image_folders(splits: Mapping[Path, Iterable[Path]]) -> None:
    """Check the files in the folder of each split, whose classes are the folders they lie in.

    Raises:
        ValueError: If classes could not be told by the folders' names.
    """
    first: dict[int, Path] = {}
    for folder, files in splits.items():
        for file in files:
            if file.name in _METADATA:
                raise ValueError(
                    f"{file} would take the place of the classes that folders of images are named "
                    "after: move it elsewhere"
                )
            if is_image(file):
                first.setdefault(len(file.relative_to(folder).parts), file)
    if 1 in first:
        raise ValueError(f"images must lie in folders of their classes, got {first[1]}")
    if len(first) > 1:
        one, other = list(first.values())[:2]
        raise ValueError(
            f"folders of classes must be on one level in all splits, got {one} and {other}"
        )
