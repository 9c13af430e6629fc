"""Images for classification: scikit-learn's digits, a `datasets` folder or a hub id."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from regdrop.tasks.common.data import hold_out, load_raw_splits, take_part

# The name of scikit-learn's digits among data sets.
DIGITS = "digits"
# Splits up to this size are decoded once and kept in memory.
_IN_MEMORY_BYTES = 2**29
_SPLIT_SEED = 0


class ImageSplits(NamedTuple):
    """The splits of an image data set and the names of its classes; None where there is none."""

    train: Any
    validation: Any
    test: Any
    class_names: list[str]


class Images(Dataset[dict[str, Any]]):
    """Images and labels as model inputs `pixel_values` (C, H, W) and `labels`.

    Args:
        read: Returns the images of some positions as uint8, (n, C, H, W).
        labels: (N,) class indices.
        mean: Mean of a pixel between 0 and 1, subtracted.
        std: Standard deviation, by which is divided.
        augmentation: Applied to float images (n, C, H, W) between 0 and 1; None for none.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int]], Tensor],
        labels: Tensor,
        *,
        mean: Tensor,
        std: Tensor,
        augmentation: nn.Module | None = None,
    ) -> None:
        self.read = read
        self.labels = labels
        self.mean, self.std = (x.reshape(-1, 1, 1) for x in (mean, std))
        self.augmentation = augmentation
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, whose augmentations are its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        pixels = self.read(positions).float() / 255
        if self.augmentation is not None:
            pixels = augment(self.augmentation, pixels, (self.epoch, *positions))
        pixels = (pixels - self.mean) / self.std
        labels = self.labels[list(positions)]
        return [
            {"pixel_values": image, "labels": label}
            for image, label in zip(pixels, labels, strict=True)
        ]


def augment(augmentation: nn.Module, pixels: Tensor, key: Sequence[int]) -> Tensor:
    """Augment images (n, C, H, W) by random numbers that the run's seed and the key decide alone.

    A resumed run could not repeat numbers from the global generator: batches are read ahead of the
    step whose checkpoint keeps its state.
    """
    seed = hash((torch.initial_seed(), *key))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        augmented: Tensor = augmentation(pixels)
    return augmented


def load_digits_splits(augmentation: nn.Module | None) -> ImageSplits:
    """Load scikit-learn's 1797 digits, 8x8: 300 to train, 300 to validate, the rest to test.

    The split is stratified by class and the same for every seed of a training.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).div(16).mul(255).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    rest, train = train_test_split(
        np.arange(len(labels)), test_size=300, stratify=labels, random_state=_SPLIT_SEED
    )
    test, validation = train_test_split(
        rest, test_size=300, stratify=labels[rest], random_state=_SPLIT_SEED
    )
    mean, std = torch.tensor([0.5]), torch.tensor([0.5])

    def split(positions: Any, augmentation: nn.Module | None = None) -> Images:
        own = pixels[positions]
        return Images(
            lambda chosen: own[list(chosen)],
            labels[positions],
            mean=mean,
            std=std,
            augmentation=augmentation,
        )

    names = [str(name) for name in digits.target_names]
    return ImageSplits(split(train, augmentation), split(validation), split(test), names)


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

    Raises:
        ValueError: For a set that cannot be found, or without a split that is used, an image
            column or a label column, or with other classes than a model's.
    """
    loaded = load_raw_splits(dataset, config_name)
    train, held_out, test = (loaded.get(name) for name in ("train", "validation", "test"))
    known = [x for x in (train, held_out, test) if x is not None]
    if not known:
        raise ValueError(
            f"dataset {dataset!r} must have a split named train, validation or test, "
            f"got {sorted(loaded)}"
        )
    image_column, label_column = find_columns(dataset, known[0])
    if test is not None and set(test[label_column][:]) == {-1}:  # they are hidden
        test = None
    if train is not None:
        if test is None:
            test, held_out = held_out, None
        if test is None:
            raise ValueError(
                f"dataset {dataset!r} must have a split 'test' or 'validation' with labels, "
                f"got {sorted(loaded)}"
            )
        if held_out is None:
            train, held_out = hold_out(train)
        train = take_part(train, train_examples)
    own_names = list(known[0].features[label_column].names)
    places = match_classes(dataset, own_names, class_names)

    def split(name: str, source: Any, augmentation: nn.Module | None = None) -> Images | None:
        if source is None:
            return None
        where = f"split {name!r} of data {dataset!r}"
        labels = check_labels(where, source[label_column][:], len(own_names))
        if name == "train" and len(labels.unique()) == 1:
            raise ValueError(
                f"the labels of {where} must be of several classes, got {labels[0]} in all "
                f"{len(labels)} rows"
            )
        labels = labels if places is None else torch.tensor(places)[labels]
        read = _reader(where, source, image_column, image_size, num_channels)
        return Images(
            read,
            labels,
            mean=torch.tensor(list(mean)),
            std=torch.tensor(list(std)),
            augmentation=augmentation,
        )

    splits = split("train", train, augmentation), split("validation", held_out), split("test", test)
    return ImageSplits(*splits, own_names if class_names is None else list(class_names))


def check_labels(where: str, labels: Sequence[Any], num_classes: int) -> Tensor:
    """Return the labels of a split.

    Raises:
        ValueError: If one is missing, or no class of the set, by its row.
    """
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < num_classes:
            raise ValueError(
                f"the labels of {where} must be classes from 0 to {num_classes - 1}, got "
                f"{'null' if label is None else label} in row {row}"
            )
    return torch.tensor(labels).long()


def match_classes(
    dataset: str, own: Sequence[str], wanted: Sequence[str] | None
) -> list[int] | None:
    """Return the place of each of a set's classes among a model's; None where it is its own.

    Raises:
        ValueError: If the set has a class that the model does not know.
    """
    if wanted is None:
        return None
    if unknown := sorted(set(own) - set(wanted)):
        raise ValueError(
            f"data {dataset!r} must have the classes of the model, {list(wanted)}; "
            f"got others, {unknown}"
        )
    return [list(wanted).index(name) for name in own]


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


def convert_image(image: Any, num_channels: int) -> Any:
    """Return a Pillow image with eight bits a channel, grey or RGB.

    Sixteen bits and floating point keep their range, and what is transparent is white.

    Raises:
        ValueError: For numbers that are neither between 0 and 1 nor of eight or sixteen bits.
    """
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        array = np.asarray(image, dtype=np.float64)
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high < 2**16):
            raise ValueError(f"its numbers must be from 0 to 65535, got {low:g} to {high:g}")
        is_part = image.mode == "F" and high <= 1
        is_byte = image.mode == "F" and high <= 255
        scale = 255 if is_part else 1 if is_byte else 255 / 65535
        image = Image.fromarray(np.rint(array * scale).astype(np.uint8))
    elif image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("L" if num_channels == 1 else "RGB")


def to_tensor(image: Any, num_channels: int) -> Tensor:
    """Return a Pillow image as (C, H, W) between 0 and 1."""
    array = np.array(convert_image(image, num_channels))
    pixels = torch.from_numpy(array).reshape(*array.shape[:2], num_channels)
    return pixels.permute(2, 0, 1).float() / 255


def _reader(
    where: str, source: Any, column: str, image_size: int, num_channels: int
) -> Callable[[Sequence[int]], Tensor]:
    """Return a function from positions to uint8 images, from memory where they fit."""
    from PIL import Image

    def decode_one(position: int) -> np.ndarray:
        try:
            image = source[int(position)][column]
            if image is None:
                raise ValueError("there is none")
            return np.array(convert_image(image, num_channels).resize((image_size, image_size)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"the image in row {position} of {where} cannot be read: {error}"
            ) from error

    def decode(positions: Sequence[int]) -> Tensor:
        arrays = [decode_one(position) for position in positions]
        return (
            torch.from_numpy(np.stack(arrays))
            .reshape(len(arrays), image_size, image_size, num_channels)
            .permute(0, 3, 1, 2)
        )

    if len(source) * num_channels * image_size**2 > _IN_MEMORY_BYTES:
        return decode
    blocks = [
        decode(range(start, min(start + 1000, len(source))))
        for start in range(0, len(source), 1000)
    ]
    pixels = torch.cat(blocks).contiguous()
    return lambda positions: pixels[list(positions)]
