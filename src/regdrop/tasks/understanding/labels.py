"""Labels of a GLUE task: whether they are shown, and whether they are the task's."""

from typing import Any

import numpy as np

from regdrop.tasks.common.notices import say_once
from regdrop.tasks.understanding.glue import GlueTask


def has_labels(split: Any) -> bool:
    """Return whether a split shows its labels; GLUE's hidden ones are all -1."""
    return "label" in split.column_names and any(label != -1 for label in split["label"])


def check_labels(where: str, split: Any, task: GlueTask) -> None:
    """Check that labels are the task's: finite scores, or classes that the task has.

    Raises:
        ValueError: If they are not, by the place and the label.
    """
    values = split["label"][:]
    try:
        labels = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"column 'label' of {where} must hold numbers: {error}") from error
    if labels.ndim != 1:
        raise ValueError(f"column 'label' of {where} must hold numbers, got {values[0]!r} in row 0")
    if task.is_regression:
        good, wanted = np.isfinite(labels), "finite scores"
    else:
        good = np.isin(labels, range(task.num_labels))
        wanted = f"classes from 0 to {task.num_labels - 1}"
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"column 'label' of {where} must hold {wanted}, got {values[row]!r} in row {row}"
        )


def say_converted_labels(where: str, split: Any, task: GlueTask) -> None:
    """Say that checked labels are not written as the numbers that they are taken as, if so."""
    from datasets import Value

    feature = split.features["label"]
    kind = feature.dtype if isinstance(feature, Value) else "int64"
    wanted = ("int", "uint", "float") if task.is_regression else ("int", "uint")
    if not kind.startswith(wanted):
        taken = "scores" if task.is_regression else "classes"
        first = split["label"][0]
        say_once(f"column 'label' of {where} is of {kind}, such as {first!r}: taken as {taken}")


def check_classes(where: str, split: Any) -> None:
    """Check that a training split has labels of more than one class.

    Raises:
        ValueError: If all are the same.
    """
    found = set(split["label"][:])
    if len(found) == 1:
        raise ValueError(
            f"column 'label' of {where} must hold several classes, got {found.pop()!r} in all "
            f"{len(split)} rows"
        )
