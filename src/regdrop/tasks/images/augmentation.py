"""Images changed at random, by numbers that a run repeats when it is resumed."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Augmentation = Literal["none", "shift", "flip", "crop"]


def build_augmentation(kind: Augmentation, image_size: int) -> nn.Module | None:
    """Return the augmentation of float images (n, C, H, W) between 0 and 1."""
    if kind == "none":
        return None
    import kornia.augmentation as K

    if kind == "shift":
        return nn.Sequential(K.RandomAffine(degrees=10.0, translate=(0.1, 0.1), p=1.0))
    if kind == "flip":
        padding = max(1, image_size // 8)
        size = (image_size, image_size)
        return nn.Sequential(
            K.RandomCrop(size, padding=padding, padding_mode="reflect"), K.RandomHorizontalFlip()
        )
    if kind == "crop":
        size = (image_size, image_size)
        return nn.Sequential(K.RandomResizedCrop(size, scale=(0.05, 1.0)))
    raise ValueError(f"augmentation must be 'none', 'shift', 'flip' or 'crop', got {kind!r}")


def augment(augmentation: nn.Module, pixels: Tensor, key: Sequence[int]) -> Tensor:
    """Augment images (n, C, H, W) by random numbers that the run's seed and the key decide alone.

    A resumed run could not repeat numbers from the global generator: batches are read ahead of the
    step whose checkpoint keeps its state.
    """
    seed = hash((torch.initial_seed(), *key))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # no other: a GPU's draws the dropout masks
        augmented: Tensor = augmentation(pixels)
    return augmented
