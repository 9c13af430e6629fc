"""Images of a data set that is too large to keep: read while it trains, in shuffled order."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset

from regdrop.tasks.common.data import open_splits
from regdrop.tasks.images.augmentation import augment
from regdrop.tasks.images.dataset import ImageSplits
from regdrop.tasks.images.decoding import say_conversion, to_tensor
from regdrop.tasks.images.splits import find_columns

# Images of the training split on which checkpoints are selected: its first ones.
HELD_OUT_IMAGES = 10_000
_BUFFER = 10_000
# As many labels tell whether images come class by class.
_WATCHED_LABELS = 1_000


class StreamedImages(IterableDataset[dict[str, Any]]):
    """Images as `Images` has them, one after the other.

    Those of training never end: epoch follows epoch, each in an order of its own that the seed of
    the run decides. So the n-th image is always the same, and a Trainer that resumes finds its
    place by reading as many again.

    Args:
        source: A streaming `datasets.IterableDataset`.
        columns: Names of the columns of images and labels.
        prepare: From an image (C, H, W) between 0 and 1 to the model's input.
        augmentation: Applied before, to images (1, C, H, W); None for none.
        num_channels: 1 for grey, 3 for RGB.
        name: Of the split, for what is said of it.
        train: Whether images are shuffled and have no end.
    """

    def __init__(
        self,
        source: Any,
        columns: tuple[str, str],
        prepare: Callable[[torch.Tensor], torch.Tensor],
        *,
        num_channels: int,
        name: str,
        augmentation: nn.Module | None = None,
        train: bool = False,
    ) -> None:
        self.name = name
        self.source, self.train, self.augmentation = source, train, augmentation
        self.columns, self.prepare, self.num_channels = columns, prepare, num_channels

    def __iter__(self) -> Iterator[dict[str, Any]]:
        image_column, label_column = self.columns
        for position, row in enumerate(self._endless() if self.train else self.source):
            pixels = to_tensor(row[image_column], self.num_channels)
            where = f"split {self.name!r} of the stream"
            say_conversion(where, row[image_column], self.num_channels)
            if self.augmentation is not None:
                pixels = augment(self.augmentation, pixels[None], (position,))[0]
            yield {
                "pixel_values": self.prepare(pixels),
                "labels": torch.tensor(row[label_column]),
            }

    def _endless(self) -> Iterator[dict[str, Any]]:
        seed = torch.initial_seed() % 2**32
        for epoch in count():
            shuffled = self.source.shuffle(seed=seed, buffer_size=_BUFFER)
            shuffled.set_epoch(epoch)
            yield from shuffled


def stream_image_splits(
    dataset: str,
    *,
    image_size: int,
    num_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: nn.Module | None,
    config_name: str | None = None,
    train_examples: int | None = None,
) -> ImageSplits:
    """Open a folder or a hub id by `datasets.load_dataset`, to be read while it trains.

    The first images of the training split are its validation split. The test split is the set's
    own validation split where it has one, as ImageNet keeps the labels of its test split.

    Args:
        dataset: Folder or hub id, with one column of images and one of class labels.
        image_size: Height and width to which images are resized, or cropped.
        num_channels: 1 for grey, 3 for RGB.
        mean: Mean of each channel, between 0 and 1.
        std: Standard deviation of each channel.
        augmentation: Applied to the training split, before images are resized.
        config_name: Configuration of the hub's set.
        train_examples: As many images of the training split as are used; None for all.

    Raises:
        ValueError: For a set without a training split, a test split, an image column or a label
            column, or one whose training images come class by class.
    """
    loaded = open_splits(dataset, config_name, streaming=True)
    tested = next((name for name in ("validation", "test") if name in loaded), None)
    if "train" not in loaded or tested is None:
        raise ValueError(
            f"data {dataset!r} must have the splits 'train' and 'validation' or 'test', "
            f"got {sorted(loaded)}"
        )
    train, test = loaded["train"], loaded[tested]
    columns = find_columns(dataset, train)
    labels = [r[columns[1]] for r in train.select_columns(columns[1]).take(_WATCHED_LABELS)]
    if len(labels) == _WATCHED_LABELS and labels == sorted(labels):
        raise ValueError(
            f"split 'train' of data {dataset!r} must be in no order of its classes to be streamed, "
            f"got its first {_WATCHED_LABELS:,} images sorted by {columns[1]!r}: shuffle its files"
        )
    rest = train.skip(HELD_OUT_IMAGES)
    rest = rest if train_examples is None else rest.take(train_examples)
    if next(iter(rest), None) is None:
        raise ValueError(
            f"split 'train' of data {dataset!r} must have more than the {HELD_OUT_IMAGES:,} images "
            "on which checkpoints are selected; without streaming a tenth is held out"
        )
    centre, spread = (torch.tensor(list(x)).reshape(-1, 1, 1) for x in (mean, std))

    def prepare(pixels: torch.Tensor) -> torch.Tensor:
        return (resize(pixels, image_size) - centre) / spread

    options: dict[str, Any] = {"num_channels": num_channels}
    return ImageSplits(
        StreamedImages(
            *(rest, columns, prepare),
            name="train",
            augmentation=augmentation,
            train=True,
            **options,
        ),
        StreamedImages(train.take(HELD_OUT_IMAGES), columns, prepare, name="validation", **options),
        StreamedImages(test, columns, prepare, name="test", **options),
        list(train.features[columns[1]].names),
    )


def resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Return an image (C, H, W) of another height and width."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    resized = F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)
    return resized[0].clamp(0, 1)
