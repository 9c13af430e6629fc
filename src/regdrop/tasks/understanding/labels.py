"""Labels of a GLUE task: whether they are shown, and whether they are the task's."""

from pathlib import Path
from typing import Any

import numpy as np

from regdrop.tasks.common.model_config import holds_model
from regdrop.tasks.data_sets.class_names import label_names, renumber_classes
from regdrop.tasks.data_sets.columns import shorten
from regdrop.tasks.notices import say_once
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
        raise ValueError(
            f"column 'label' of {where} must hold numbers, got {shorten(values[0])} in row 0"
        )
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


def saved_class_names(folder: Path | None, task: GlueTask) -> list[str] | None:
    """Return the classes that a kept model has where they are not the task's; else None."""
    if folder is None or not task.labels or not holds_model(folder):
        return None
    from transformers import AutoConfig

    names: dict[int, str] = AutoConfig.from_pretrained(folder).id2label
    ordered = [names[i] for i in sorted(names)]
    return None if ordered == list(task.labels) else ordered


def class_names(splits: dict[str, Any], task: GlueTask, saved: list[str] | None) -> list[str]:
    """Return the names that a model's classes have: the kept model's, the data's or the task's."""
    first_names = next(filter(None, (label_names(x, "label") for x in splits.values())), [])
    if saved is not None:
        return saved
    is_whole = len(first_names) == task.num_labels
    is_own = set(first_names) <= set(task.labels)
    return first_names if task.labels and is_whole and not is_own else list(task.labels)


def match_labels(
    dataset: str, splits: dict[str, Any], task: GlueTask, saved: list[str] | None = None
) -> dict[str, Any]:
    """Return splits whose checked labels are numbered as the task's, by the names they have.

    Classes of other names than the task's are numbered as a kept model's, or as in the first split.

    Args:
        dataset: Folder or hub id, for errors.
        splits: The splits.
        task: The task.
        saved: Classes of a kept model that has names of its own.

    Raises:
        ValueError: If splits name different classes, or some name none and others in another order.
    """
    named = {name: label_names(split, "label") for name, split in splits.items()}
    first, first_names = next(((k, v) for k, v in named.items() if v), ("", []))
    if task.is_regression or not first_names:
        return splits
    is_own = set(first_names) <= set(task.labels)
    wanted = list(task.labels) if is_own else first_names
    whose = task.title if is_own else f"split {first!r}"
    if saved is not None and not is_own:
        wanted, whose = saved, "the model"
    elif not is_own:
        say_once(
            f"column 'label' of data {dataset!r} has the classes {first_names}: taken by their "
            f"numbers as {task.title}'s {list(task.labels)}"
        )
    matched = {}
    for name, split in splits.items():
        where = f"column 'label' of split {name!r} of data {dataset!r}"
        own = named[name] or wanted
        if named[name] is None and first_names != wanted:
            raise ValueError(
                f"{where} must name its classes as split {first!r} does, {first_names}, whose "
                f"order is not that of {whose}; got numbers without names"
            )
        labels = renumber_classes(where, split["label"][:], own, wanted, whose)
        is_same = list(own) == wanted
        matched[name] = (
            split if is_same else split.remove_columns("label").add_column("label", labels)
        )
    return matched


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


def check_variety(where: str, split: Any, task: GlueTask) -> None:
    """Check that a training split has labels of more than one class, or more than one score.

    Raises:
        ValueError: If all are the same.
    """
    found = set(split["label"][:])
    if len(found) == 1:
        what = "scores" if task.is_regression else "classes"
        raise ValueError(
            f"column 'label' of {where} must hold several {what}, got {found.pop()!r} in all "
            f"{len(split)} rows"
        )
