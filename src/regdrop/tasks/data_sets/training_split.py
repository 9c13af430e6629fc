"""The training split: the part of it that is used, and what is held out to select on."""

from collections.abc import Mapping
from typing import Any

# The part of a training split held out where a set has no split of its own to select on, and the
# seed by which it is drawn: the same for every seed of a training.
HELD_OUT = 0.1
SPLIT_SEED = 0


def require_training(dataset: str, splits: Mapping[str, Any]) -> Any:
    """Return the training split.

    Raises:
        ValueError: If there is none.
    """
    if "train" not in splits:
        raise ValueError(f"data {dataset!r} must have a split 'train', got {sorted(splits)}")
    return splits["train"]


def split_training(splits: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    """Return splits whose training split is the part that is used, with one to select on.

    Where there is no validation split it is a tenth of the training split. Without a training split
    they are as they were.

    Args:
        splits: Splits by what they are used for.
        size: Rows of the training split that are used, drawn by a fixed seed; None for all.

    Raises:
        ValueError: If the training split has fewer, or is too small to be split.
    """
    result = dict(splits)
    if "train" not in result:
        return result
    if "validation" not in result:
        result["train"], result["validation"] = _hold_out(result["train"])
    result["train"] = _take_part(result["train"], size)
    return result


def _hold_out(train: Any) -> tuple[Any, Any]:
    """Return nine tenths of a training split and the tenth on which to select.

    Raises:
        ValueError: If it is too small to be split.
    """
    if len(train) < 10:
        raise ValueError(
            f"split 'train' must have at least 10 rows to hold out some, got {len(train)}"
        )
    parts = train.train_test_split(test_size=HELD_OUT, seed=SPLIT_SEED)
    return parts["train"], parts["test"]


def _take_part(train: Any, size: int | None) -> Any:
    """Return so many rows of a training split, drawn by a fixed seed; all for None.

    Raises:
        ValueError: If there are fewer.
    """
    if size is None:
        return train
    if not 1 <= size <= len(train):
        raise ValueError(
            f"train_examples must be between 1 and the {len(train)} of the training split, "
            f"got {size}; --set train_examples=null takes all of it"
        )
    return train.shuffle(seed=SPLIT_SEED).select(range(size))
