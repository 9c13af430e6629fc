"""scikit-learn's 1797 digits, 8x8, which need no download."""

from typing import Any

import numpy as np
import torch
from torch import nn

from regdrop.tasks.images.dataset import Images, ImageSplits

_SPLIT_SEED = 0


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
