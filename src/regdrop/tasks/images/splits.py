"""Images from a `datasets` folder or a hub id: splits, labels and classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regdrop.tasks.data_sets.class_names import label_names, renumber_classes
from regdrop.tasks.data_sets.columns import require_columns
from regdrop.tasks.data_sets.digests import data_digests
from regdrop.tasks.data_sets.loading import load_raw_splits
from regdrop.tasks.data_sets.training_split import split_training
from regdrop.tasks.images.dataset import Images, ImageSplits
from regdrop.tasks.images.decoding import reader
from regdrop.tasks.notices import say_once

# The column of the row of an image in its file, wherever it is drawn to.
ROW = "row of the split"
_USED = ("train", "validation", "test")


def load_image_splits(
    dataset: str,
    *,
    image_size: int,
    num_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: nn.Module | None,
    config_name: str | None = None,
    train_examples: int | None = None,
    class_names: Sequence[str] | None = None,
    in_memory: bool | None = None,
) -> ImageSplits:
    """Load a folder or a hub id by `datasets.load_dataset`.

    A set without a validation split gives a tenth of its training split, drawn by a fixed seed;
    one without a test split, or whose test split hides its labels, is tested on its validation
    split and validated on that tenth. One without a training split is there to be tested on.

    Args:
        dataset: Folder or hub id, with one column of images and one of class labels.
        image_size: Height and width to which images are resized.
        num_channels: 1 for grey, 3 for RGB.
        mean: Mean of each channel, between 0 and 1.
        std: Standard deviation of each channel.
        augmentation: Applied to the training split.
        config_name: Configuration of the hub's set.
        train_examples: Size of the part of the training split that is used; None for all.
        class_names: Classes in the order of a trained model's outputs; None for the set's own.
        in_memory: As in `reader`.

    Raises:
        ValueError: For a set that cannot be found, or without a split that is used, an image
            column or a label column, or with other classes than a model's.
    """
    loaded = {
        name: split.add_column(ROW, np.arange(len(split)))
        for name, split in load_raw_splits(dataset, config_name).items()
    }
    first = next((name for name in _USED if name in loaded), None)
    if first is None:
        raise ValueError(
            f"dataset {dataset!r} must have a split named train, validation or test, "
            f"got {sorted(loaded)}"
        )
    is_trained = class_names is not None
    image_column, label_column = columns = find_columns(dataset, loaded[first])
    chosen, origins = _choose_splits(
        dataset, loaded, label_column, train_examples, is_trained=is_trained
    )
    require_columns(dataset, {origins[use]: split for use, split in chosen.items()}, columns)
    own_names = list(loaded[first].features[label_column].names)
    wanted = own_names if class_names is None else list(class_names)
    digests = None if is_trained else data_digests(dataset)
    splits = {}
    for use, split in chosen.items():
        where = f"split {origins[use]!r} of data {dataset!r}"
        labels = _read_labels(
            where,
            split,
            label_column,
            names=label_names(split, label_column) or own_names,
            wanted=wanted,
            whose="the model" if is_trained else f"split {first!r}",
            must_vary=use == "train",
        )
        read = reader(
            *(where, split, image_column, image_size, num_channels),
            rows=split[ROW][:],
            # A trained model is evaluated on a part: the others are not read for it.
            read_first=not is_trained,
            identity=f"{config_name} {digests}" if digests else None,
            in_memory=in_memory,
        )
        splits[use] = Images(
            read,
            labels,
            mean=torch.tensor(list(mean)),
            std=torch.tensor(list(std)),
            augmentation=augmentation if use == "train" else None,
        )
    train, validation, test = (splits.get(use) for use in _USED)
    return ImageSplits(train, validation, test, wanted)


def _choose_splits(
    dataset: str,
    loaded: Mapping[str, Any],
    label_column: str,
    train_examples: int | None,
    *,
    is_trained: bool,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the splits by what they are used for, and which of the set's each is made of.

    Raises:
        ValueError: If there is nothing to test on beside the training split, or that is too small.
    """
    chosen = {name: loaded[name] for name in _USED if name in loaded}
    origins = {name: name for name in _USED}
    if "test" in chosen and _hides_labels(chosen["test"], label_column):
        say_once(f"split 'test' of data {dataset!r} has no labels in {label_column!r}: not used")
        del chosen["test"]
    if "train" not in chosen:
        return chosen, origins
    if "test" not in chosen:
        if "validation" not in chosen:
            raise ValueError(
                f"dataset {dataset!r} must have a split 'test' or 'validation' with labels, "
                f"got {sorted(loaded)}"
            )
        chosen["test"], origins["test"] = chosen.pop("validation"), "validation"
    if not is_trained:
        _say_unlearned(f"split 'train' of data {dataset!r}", chosen["train"], label_column)
    if "validation" not in chosen:
        origins["validation"] = "train"
    chosen = split_training(chosen, train_examples)
    return {use: chosen[use] for use in _USED if use in chosen}, origins


def _read_labels(
    where: str,
    split: Any,
    column: str,
    *,
    names: Sequence[str],
    wanted: Sequence[str],
    whose: str,
    must_vary: bool,
) -> Tensor:
    """Return the labels of a split as classes of all splits, or of a model.

    Args:
        where: The split and its data, in words.
        split: A `datasets.Dataset` with the column `ROW`.
        column: Its labels.
        names: The classes of the split.
        wanted: Those of all splits, or of a model.
        whose: Whose these are, in words.
        must_vary: Whether labels of one class alone are refused.

    Raises:
        ValueError: If one is missing, or of no class that is wanted.
    """
    labels = check_labels(where, split[column][:], len(names), split[ROW][:])
    if must_vary and len(labels.unique()) == 1:
        raise ValueError(
            f"the labels of {where} must be of several classes, got {labels[0]} in all "
            f"{len(labels)} rows"
        )
    return torch.tensor(renumber_classes(where, labels.tolist(), names, wanted, whose))


def check_labels(
    where: str, labels: Sequence[Any], num_classes: int, rows: Sequence[int] | None = None
) -> Tensor:
    """Return the labels of some rows of a split, of its first ones if none are given.

    Raises:
        ValueError: If one is missing, or no class of the set, by its row.
    """
    for row, label in zip(range(len(labels)) if rows is None else rows, labels, strict=True):
        check_label(where, row, label, num_classes)
    return torch.tensor(labels).long()


def check_label(where: str, row: int, label: Any, num_classes: int) -> None:
    """Check the label of a row.

    Raises:
        ValueError: If it is missing, or no class of the set.
    """
    if not isinstance(label, int) or not 0 <= label < num_classes:
        raise ValueError(
            f"the labels of {where} must be classes from 0 to {num_classes - 1}, got "
            f"{'null' if label is None else label} in row {row}"
        )


def _hides_labels(split: Any, column: str) -> bool:
    return column not in split.column_names or set(split[column][:]) == {-1}


def _say_unlearned(where: str, train: Any, column: str) -> None:
    """Say which classes have no image to learn from."""
    missing = set(range(len(train.features[column].names))) - set(train[column][:])
    if missing:
        names = [train.features[column].names[i] for i in sorted(missing)]
        say_once(f"{where} has no image of the classes {names}: they are not learned")


def find_columns(dataset: str, split: Any) -> tuple[str, str]:
    """Return the columns of images and of labels.

    Raises:
        ValueError: If there are none.
    """
    import datasets

    images = [n for n, f in split.features.items() if isinstance(f, datasets.Image)]
    labels = [n for n, f in split.features.items() if isinstance(f, datasets.ClassLabel)]
    if not images or not labels:
        raise ValueError(
            f"dataset {dataset!r} must have a column of images and one of class labels, "
            f"got {dict(split.features)}"
        )
    preferred = [name for name in ("label", "labels", "fine_label") if name in labels]
    return images[0], (preferred or labels)[0]
