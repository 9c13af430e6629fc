"""Where what is found out of a finished run is kept: beside it, and over nothing else."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from regdrop.experiments.recording.files import read_object


def split_label(split: str, data: str | None) -> str:
    """Return what the files of a split are called, with the name of other data than the run's."""
    return split if data is None else f"{split}-{Path(data).name}"


def free_path(folder: Path, name: str, made_with: Mapping[str, Any]) -> Path:
    """Return where a result is written: not over one that was made with anything else.

    Args:
        folder: Its folder.
        name: Its name, without ending; a number is added where that is taken.
        made_with: What the file holds of how it was made.

    Raises:
        ValueError: If a file of that name cannot be read.
    """
    path, further = folder / f"{name}.json", count(2)
    while path.exists():
        found = read_object(path, "a result of regdrop")
        if all(key in found and found[key] == value for key, value in made_with.items()):
            break
        path = folder / f"{name}-{next(further)}.json"
    return path
