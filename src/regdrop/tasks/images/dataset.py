"""Images and their labels, as what a model takes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.data import Dataset

from regdrop.tasks.images.augmentation import augment


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
