"""Classes by name: each split may number them in its own order."""

from collections.abc import Sequence
from typing import Any


def label_names(split: Any, column: str) -> list[str] | None:
    """Return the names of a split's labels by their numbers; None where they have none."""
    names = getattr(split.features[column], "names", None)
    return None if names is None else list(names)


def renumber_classes(
    where: str, labels: Sequence[int], own: Sequence[str], wanted: Sequence[str], of: str
) -> list[int]:
    """Return labels as places among the wanted classes; negative ones, which are hidden, as are.

    Args:
        where: The split and its data, in words.
        labels: Numbers of the split's own classes.
        own: Their names.
        wanted: Names by which they are numbered anew.
        of: Whose classes these are, in words.

    Raises:
        ValueError: If a label is of a class that is none of them.
    """
    if list(own) == list(wanted):
        return list(labels)
    numbers = {label for label in labels if label >= 0}
    found = {own[label] if label < len(own) else str(label) for label in numbers}
    unknown = sorted(found - set(wanted))
    if unknown:
        raise ValueError(
            f"{where} must have the classes of {of}, {list(wanted)}; got others, {unknown}"
        )
    places = [wanted.index(name) if name in wanted else -1 for name in own]
    return [places[label] if label >= 0 else label for label in labels]
