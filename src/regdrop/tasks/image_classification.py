"""Image classification with vision transformers (section 3.5 of arXiv 2106.14448)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from regdrop.config import RDropConfig
from regdrop.tasks.base import LazySplits, Metric, PreparedTask, TrainingSettings
from regdrop.tasks.classification import accuracy, classification_statistics, nll, set_dropout
from regdrop.tasks.image_data import ImageSplits, load_digits_splits, load_image_splits

Augmentation = Literal["none", "shift", "flip"]


@dataclass(frozen=True)
class ImageClassification:
    """An image classifier trained through the Hugging Face Trainer.

    Attributes:
        name: Name of the preset.
        description: One line of what is trained on what.
        dataset: "digits" for scikit-learn's, else a `datasets` folder or hub id.
        model: Hub id or folder of a checkpoint to fine-tune; None to train `model_config`.
        model_config: Hugging Face configuration of a new model, `model_type` included.
        dropout: Dropout rate, set wherever the model's configuration has one.
        image_size: Height and width of the images; a checkpoint that has one of its own decides.
        num_channels: 1 for grey, 3 for RGB.
        augmentation: "shift" moves and turns slightly (characters), "flip" crops and mirrors
            (photographs), "none" does nothing.
        training: Optimisation without R-Drop.
        rdrop: R-Drop's options.
        selection_metric: Figure on the validation split that selects the checkpoint.
    """

    family: ClassVar[str] = "images"

    name: str
    description: str
    dataset: str
    training: TrainingSettings
    rdrop: RDropConfig
    model: str | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)
    dropout: float = 0.1
    image_size: int = 224
    num_channels: int = 3
    augmentation: Augmentation = "flip"
    selection_metric: str = "accuracy"

    @property
    def metrics(self) -> dict[str, Metric]:
        """Return accuracy and negative log-likelihood."""
        return {
            "accuracy": Metric("accuracy (%)", greater_is_better=True, percent=True),
            "nll": Metric("NLL", greater_is_better=False),
        }

    def figures(self, statistics: np.ndarray) -> dict[str, float]:
        """Return the figures from rows of label, prediction and likelihood."""
        return {"accuracy": accuracy(statistics), "nll": nll(statistics)}

    def prepare(self, folder: Path | None = None) -> PreparedTask:
        """Load the data and return what the trainer needs; nothing is kept in the folder.

        Raises:
            ValueError: For a model that has no dropout to set, or a data set that does not fit.
        """
        if (self.model is None) == (not self.model_config):
            raise ValueError("exactly one of model and model_config must be given")
        splits = self._load()
        from transformers import AutoModelForImageClassification

        return PreparedTask(
            splits=LazySplits(
                {
                    "train": lambda: splits.train,
                    "validation": lambda: splits.validation,
                    "test": lambda: splits.test,
                }
            ),
            build_model=partial(self._build_model, splits.class_names),
            load_model=AutoModelForImageClassification.from_pretrained,
            example_statistics=classification_statistics,
        )

    def _load(self) -> ImageSplits:
        image_size = self._image_size()
        augmentation = build_augmentation(self.augmentation, image_size)
        if self.dataset == "digits":
            return load_digits_splits(augmentation)
        mean, std = self._normalisation()
        return load_image_splits(
            self.dataset,
            image_size=image_size,
            num_channels=self.num_channels,
            mean=mean,
            std=std,
            augmentation=augmentation,
        )

    def _image_size(self) -> int:
        if self.model is None:
            return self.image_size
        from transformers import AutoConfig

        size = getattr(AutoConfig.from_pretrained(self.model), "image_size", None)
        return size if isinstance(size, int) else self.image_size

    def _normalisation(self) -> tuple[list[float], list[float]]:
        """Return the checkpoint's own mean and standard deviation where it has them."""
        half = [0.5] * self.num_channels
        if self.model is None:
            return half, half
        from transformers import ImageProcessingMixin

        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(self.model)
        except OSError:  # a folder without a preprocessor
            return half, half
        return processor.get("image_mean", half), processor.get("image_std", half)

    def _build_model(self, class_names: list[str]) -> nn.Module:
        from transformers import AutoConfig, AutoModelForImageClassification

        labels = {
            "id2label": dict(enumerate(class_names)),
            "label2id": {name: i for i, name in enumerate(class_names)},
        }
        if self.model is not None:
            config = AutoConfig.from_pretrained(self.model, **labels)
            set_dropout(config, self.dropout)
            model: nn.Module = AutoModelForImageClassification.from_pretrained(
                self.model, config=config, ignore_mismatched_sizes=True
            )
            return model
        options = {"image_size": self.image_size, "num_channels": self.num_channels}
        config = AutoConfig.for_model(**{**options, **labels, **self.model_config})
        set_dropout(config, self.dropout)
        new_model: nn.Module = AutoModelForImageClassification.from_config(config)
        return new_model


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
    raise ValueError(f"augmentation must be 'none', 'shift' or 'flip', got {kind!r}")


DIGITS = ImageClassification(
    name="digits",
    description="a 4-layer, 64-wide vision transformer on 300 of scikit-learn's 8x8 digits",
    dataset="digits",
    model_config={
        "model_type": "vit",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "patch_size": 4,
    },
    dropout=0.1,
    image_size=8,
    num_channels=1,
    augmentation="none",
    training=TrainingSettings(
        max_steps=600,
        batch_size=64,
        learning_rate=1e-3,
        eval_steps=50,
        logging_steps=25,
        lr_scheduler_type="constant_with_warmup",
    ),
    rdrop=RDropConfig(alpha=3.0),
    selection_metric="nll",
)

IMAGES = ImageClassification(
    name="images",
    description="ViT-B/16 from ImageNet-21k fine-tuned on CIFAR-100, by the authors' settings "
    "for 224 px; takes any --dataset and --model",
    dataset="uoft-cs/cifar100",
    model="google/vit-base-patch16-224-in21k",
    dropout=0.1,
    image_size=224,
    augmentation="flip",
    training=TrainingSettings(
        max_steps=20_000,
        batch_size=512,
        learning_rate=8e-3,
        eval_steps=500,
        logging_steps=100,
        warmup_ratio=0.025,
        weight_decay=0.0,
        optim="sgd",
        optim_args="momentum=0.9",
        mixed_precision="bf16",
    ),
    rdrop=RDropConfig(alpha=0.6),
)
