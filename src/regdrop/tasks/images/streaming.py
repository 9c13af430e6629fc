"""Images of a data set that is too large to keep: read while it trains, in shuffled order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset

from regdrop.tasks.data_sets.class_names import label_names
from regdrop.tasks.data_sets.loading import open_splits
from regdrop.tasks.images.augmentation import augment
from regdrop.tasks.images.dataset import ImageSplits
from regdrop.tasks.images.decoding import check_image, named_image, say_conversion, to_tensor
from regdrop.tasks.images.splits import ROW, check_label, check_labels, find_columns

# Images of the training split on which checkpoints are selected: its first ones.
HELD_OUT_IMAGES = 10_000


class StreamedImages(IterableDataset[dict[str, Any]]):
    """Images as `Images` has them, one after the other.

    Those of training never end: epoch follows epoch, each in an order of its own that the seed of
    the run decides. So the n-th image is always the same, and a Trainer that resumes finds its
    place by reading as many again.
    Of several processes the main one reads for all, as Accelerate has it for such data sets.

    Args:
        source: A streaming `datasets.IterableDataset` of numbered rows, as `number_rows` gives it.
        columns: Names of the columns of images and labels.
        decode: From the file of an image, as `datasets` has it, to a Pillow image.
        prepare: From an image (C, H, W) between 0 and 1 to the model's input.
        augmentation: Applied before, to images (1, C, H, W); None for none.
        num_channels: 1 for grey, 3 for RGB.
        num_classes: Number of classes.
        where: The split and its data, in words.
        train: Whether images are shuffled and have no end.
        shuffle_buffer: Images among which the next one of training is drawn.
    """

    def __init__(
        self,
        source: Any,
        columns: tuple[str, str],
        decode: Callable[[Any], Any],
        prepare: Callable[[torch.Tensor], torch.Tensor],
        *,
        num_channels: int,
        num_classes: int,
        where: str,
        augmentation: nn.Module | None = None,
        train: bool = False,
        shuffle_buffer: int = 10_000,
    ) -> None:
        self.where = where
        self.source, self.train, self.augmentation = source, train, augmentation
        self.columns, self.decode, self.prepare = columns, decode, prepare
        self.num_channels, self.num_classes = num_channels, num_classes
        self.shuffle_buffer = shuffle_buffer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        image_column, label_column = self.columns
        for position, row in enumerate(self._endless() if self.train else self.source):
            place, label = row[ROW], row[label_column]
            with named_image(self.where, place):
                image = self.decode(check_image(row[image_column]))
                pixels = to_tensor(image, self.num_channels)
                say_conversion(self.where, image, self.num_channels)
            check_label(self.where, place, label, self.num_classes)
            if self.augmentation is not None:
                pixels = augment(self.augmentation, pixels[None], (position,))[0]
            yield {
                "pixel_values": self.prepare(pixels),
                "labels": torch.tensor(label),
            }

    def _endless(self) -> Iterator[dict[str, Any]]:
        seed = torch.initial_seed() % 2**32
        for epoch in count():
            shuffled = self.source.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
            shuffled.set_epoch(epoch)
            yield from shuffled


def number_rows(split: Any, columns: Sequence[str]) -> Any:
    """Return a stream of an image's file, its label and its row; the first column holds images.

    The library would decode images where no error could name their row.
    """
    from datasets import Features, Image, Value

    files = split.select_columns(list(columns)).cast_column(columns[0], Image(decode=False))
    return files.map(
        lambda _, row: {ROW: row},
        with_indices=True,
        features=Features({**files.features, ROW: Value("int64")}),
    )


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
    held_out_images: int | None = None,
    shuffle_buffer: int = 10_000,
    watched_labels: int = 1_000,
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
        held_out_images: As many of its first images are the validation split; None for 10,000.
        shuffle_buffer: Images among which the next one of training is drawn.
        watched_labels: As many first labels tell whether images come class by class.

    Raises:
        ValueError: For a set without a training split, a test split, an image column or a label
            column, one whose training images come class by class, or labels that are none among
            its first ones. While it trains: for other such labels, and images that cannot be read.
    """
    if held_out_images is None:
        held_out_images = HELD_OUT_IMAGES
    loaded = open_splits(dataset, config_name, streaming=True)
    tested = _find_tested(dataset, loaded)
    columns = image_column, label_column = find_columns(dataset, loaded["train"])
    class_names = _shared_classes(dataset, loaded, tested, label_column)
    wheres = {name: f"split {name!r} of data {dataset!r}" for name in ("train", tested)}
    _check_first_labels(
        wheres["train"], loaded["train"], label_column, len(class_names), watched_labels
    )
    train, test = (number_rows(loaded[name], columns) for name in ("train", tested))
    rest = train.skip(held_out_images)
    rest = rest if train_examples is None else rest.take(train_examples)
    if next(iter(rest), None) is None:
        raise ValueError(
            f"split 'train' of data {dataset!r} must have more than the {held_out_images:,} images "
            "on which checkpoints are selected; without streaming a tenth is held out"
        )
    centre, spread = (torch.tensor(list(x)).reshape(-1, 1, 1) for x in (mean, std))
    stream = partial(
        StreamedImages,
        columns=columns,
        decode=loaded["train"].features[image_column].decode_example,
        prepare=partial(_prepare, size=image_size, mean=centre, std=spread),
        num_channels=num_channels,
        num_classes=len(class_names),
    )
    return ImageSplits(
        stream(
            rest,
            where=wheres["train"],
            augmentation=augmentation,
            train=True,
            shuffle_buffer=shuffle_buffer,
        ),
        stream(train.take(held_out_images), where=wheres["train"]),
        stream(test, where=wheres[tested]),
        class_names,
    )


def _find_tested(dataset: str, loaded: Mapping[str, Any]) -> str:
    """Return the name of the split that a set is tested on.

    Raises:
        ValueError: If there is none, or no training split.
    """
    tested = next((name for name in ("validation", "test") if name in loaded), None)
    if "train" not in loaded or tested is None:
        raise ValueError(
            f"data {dataset!r} must have the splits 'train' and 'validation' or 'test', "
            f"got {sorted(loaded)}"
        )
    return tested


def _shared_classes(
    dataset: str, loaded: Mapping[str, Any], tested: str, label_column: str
) -> list[str]:
    """Return the classes of the training split, which are those of the split that is tested.

    Raises:
        ValueError: If they are not.
    """
    class_names = list(loaded["train"].features[label_column].names)
    tested_names = label_names(loaded[tested], label_column)
    if tested_names not in (None, class_names):
        raise ValueError(
            f"split {tested!r} of data {dataset!r} must have the classes of split 'train' in their "
            f"order to be streamed, {class_names}; got {tested_names}"
        )
    return class_names


def _check_first_labels(
    where: str, train: Any, label_column: str, num_classes: int, count: int
) -> None:
    """Check the first labels of a training split, and that they do not come class by class.

    Raises:
        ValueError: If they do, or one is none.
    """
    labels = [row[label_column] for row in train.select_columns(label_column).take(count)]
    check_labels(where, labels, num_classes)
    if len(labels) == count and labels == sorted(labels):
        raise ValueError(
            f"{where} must be in no order of its classes to be streamed, got its first {count:,} "
            f"images sorted by {label_column!r}: shuffle its files"
        )


def _prepare(
    pixels: torch.Tensor, *, size: int, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Return what a model takes of an image (C, H, W) between 0 and 1."""
    return (resize(pixels, size) - mean) / std


def resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Return an image (C, H, W) of another height and width."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    resized = F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)
    return resized[0].clamp(0, 1)
