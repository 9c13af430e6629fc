"""The split that a file or a folder is named after."""

import re
from typing import NamedTuple

_TWO_OF_EACH = [
    f"{name}_{kind}" for name in ("validation", "test") for kind in ("matched", "mismatched")
]
# The names that each split may have, its own first.
_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
    **{name: (name,) for name in _TWO_OF_EACH},  # of GLUE's MNLI
}
ACCEPTED_NAMES = "train, validation (or valid, val, dev, eval) and test"
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(?:-[0-9a-f]+)?")


class Part(NamedTuple):
    """What a name without its suffix says.

    Attributes:
        name: The name of the whole, of which the file may be one of several.
        parts: Number of its files.
    """

    name: str
    parts: int


def find_part(name: str) -> Part:
    """Return the whole that a file belongs to: train-00000-of-00002 is the first half of train."""
    shard = _SHARD.fullmatch(name)
    return Part(name, 1) if shard is None else Part(shard[1], int(shard[2]))


def find_split(name: str) -> str | None:
    """Return the split that a name is of, by itself or by one of its words; None for none.

    Raises:
        ValueError: If it has words of several.
    """
    lowered = name.lower()
    exact = next((split for split, names in _NAMES.items() if lowered in names), None)
    if exact is not None:
        return exact
    words = set(re.split(r"[-._ 0-9]+", lowered))
    found = [split for split, names in _NAMES.items() if words & set(names)]
    if len(found) > 1:
        raise ValueError(f"must be named after one split, got {name!r} of {' and '.join(found)}")
    return found[0] if found else None
