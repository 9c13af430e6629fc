"""Image classification with vision transformers (section 3.5 of arXiv 2106.14448)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from regdrop.config import RDropConfig
from regdrop.tasks.common.accepted import BelowOne, Channels, Count, Name, Text
from regdrop.tasks.common.base import (
    LazySplits,
    Metric,
    OldNames,
    PreparedTask,
    TrainingSettings,
    check_task,
)
from regdrop.tasks.common.classification import (
    accuracy,
    classification_statistics,
    dropout_names,
    nll,
    set_dropout,
)
from regdrop.tasks.common.model_config import (
    check_model_config,
    find_config_class,
    holds_model,
    named_model_config,
    refused_if_new,
)
from regdrop.tasks.data_sets.folders import DIGITS_NAME
from regdrop.tasks.images.augmentation import Augmentation, build_augmentation
from regdrop.tasks.images.dataset import ImageSplits
from regdrop.tasks.images.digits import load_digits_splits
from regdrop.tasks.images.models import (
    EFFICIENTNET_LITE0,
    load_image_config,
    load_image_model,
    load_processor_settings,
    register,
)
from regdrop.tasks.images.splits import load_image_splits
from regdrop.tasks.images.streaming import stream_image_splits


@dataclass(frozen=True)
class ImageClassification(OldNames):
    """An image classifier trained through the Hugging Face Trainer.

    Attributes:
        name: Name of the preset.
        description: One line of what is trained on what.
        dataset: "digits" for scikit-learn's, else a `datasets` folder or hub id.
        model: Checkpoint to fine-tune: folder, hub id, or "efficientnet-lite0", whose weights are
            in a Python package; None to train `model_config`.
        model_config: Hugging Face configuration of a new model, `model_type` included.
        dropout: Dropout rate, set wherever the model's configuration has one.
        image_size: Height and width of the images; None for the checkpoint's own. A vision
            transformer of another size has its positions resized (arXiv 2010.11929, section 3.2).
        num_channels: 1 for grey, 3 for RGB.
        augmentation: "shift" moves and turns slightly (characters), "flip" moves and mirrors
            (small photographs), "crop" takes a part of 5 % to all and scales it (photographs),
            "none" does nothing.
        dataset_config: Configuration of the hub's data set.
        streaming: Whether the data set is read while it trains, never downloaded or kept as a
            whole. Selection is then on the first images of the training split.
        train_examples: Size of the part of the training split that is used; None for all of it.
        training: Optimisation without R-Drop.
        rdrop: R-Drop's options.
        selection_metric: Metric on the validation split that selects the checkpoint.
    """

    family: ClassVar[str] = "images"

    name: Name
    description: Text
    dataset: Text
    training: TrainingSettings
    rdrop: RDropConfig
    model: Text | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)
    dropout: BelowOne = 0.1
    image_size: Count | None = None
    num_channels: Channels = 3
    augmentation: Augmentation = "flip"
    dataset_config: Text | None = None
    streaming: bool = False
    train_examples: Count | None = None
    selection_metric: Text = "accuracy"

    def __post_init__(self) -> None:
        check_task(self)

    @property
    def metrics(self) -> dict[str, Metric]:
        """Return accuracy and NLL."""
        return {
            "accuracy": Metric("accuracy (%)", greater_is_better=True, percent=True),
            "nll": Metric("NLL", greater_is_better=False),
        }

    def compute_metrics(self, statistics: np.ndarray) -> dict[str, float]:
        """Return the metrics from rows of label, prediction and NLL."""
        return {"accuracy": accuracy(statistics), "nll": nll(statistics)}

    def prepare(self, folder: Path | None = None, *, begun: bool = False) -> PreparedTask:
        """Load the data and return what the trainer needs; nothing is kept in the folder.

        Raises:
            ValueError: For a model that has no dropout to set, or a data set that does not fit.
        """
        if (self.model is None) == (not self.model_config):
            raise ValueError("exactly one of model and model_config must be given")
        register()
        if self.model is None:
            with refused_if_new(folder, begun=begun):
                self._check_model_config()
        splits = self._load(saved_class_names(folder))
        from transformers import AutoModelForImageClassification

        names = ("train", "validation", "test")
        return PreparedTask(
            splits=LazySplits(
                {
                    name: partial(getattr, splits, name)
                    for name in names
                    if getattr(splits, name) is not None
                },
                self.dataset,
            ),
            build_model=partial(self._build_model, splits.class_names),
            load_model=AutoModelForImageClassification.from_pretrained,
            example_statistics=classification_statistics,
            processing_class=self._processor(),
        )

    def _check_model_config(self) -> None:
        """Check the settings of a new model, which others of the task set too."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

        kind = find_config_class(
            self.model_config, "an image classifier", MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        )
        standard = kind()
        fixed = {
            **dict.fromkeys(("id2label", "label2id", "num_labels"), "what the data has"),
            **{name: f"the setting {name}" for name in ("image_size", "num_channels")},
            **dict.fromkeys(dropout_names(standard), "the setting dropout"),
        }
        check_model_config(self.model_config, standard, fixed)

    def _processor(self) -> Any:
        """Return what makes a model's input of an image, to be saved with it.

        The library has none for grey images.
        """
        if self.num_channels != 3 or self.dataset == DIGITS_NAME:
            return None
        from PIL.Image import Resampling
        from transformers import ViTImageProcessor

        size, (mean, std) = self._image_size(), self._normalisation()
        return ViTImageProcessor(
            size={"height": size, "width": size},
            resample=Resampling.BICUBIC,
            image_mean=list(mean),
            image_std=list(std),
            do_convert_rgb=True,
        )

    def _load(self, class_names: Sequence[str] | None) -> ImageSplits:
        if self.dataset == DIGITS_NAME:
            given = (self.train_examples, self.dataset_config)
            if self.streaming or any(value is not None for value in given):
                raise ValueError(
                    "digits come with scikit-learn and are a few: neither streaming nor "
                    "train_examples nor dataset_config applies"
                )
            return load_digits_splits(build_augmentation(self.augmentation, 8))
        image_size = self._image_size()
        mean, std = self._normalisation()
        # A trained model is tested on a folder of files as they are.
        streaming = self.streaming and (class_names is None or not Path(self.dataset).exists())
        options: dict[str, Any] = {} if streaming else {"class_names": class_names}
        load: Callable[..., ImageSplits] = stream_image_splits if streaming else load_image_splits
        return load(
            self.dataset,
            config_name=self.dataset_config,
            train_examples=self.train_examples,
            image_size=image_size,
            num_channels=self.num_channels,
            mean=mean,
            std=std,
            augmentation=build_augmentation(self.augmentation, image_size),
            **options,
        )

    def _image_size(self) -> int:
        if self.image_size is not None:
            return self.image_size
        if self.model is None:
            raise ValueError("image_size must be given where there is no model, got None")
        size = getattr(load_image_config(self.model), "image_size", None)
        if not isinstance(size, int):
            raise ValueError(f"image_size must be given: model {self.model!r} has none of its own")
        return size

    def _normalisation(self) -> tuple[list[float], list[float]]:
        """Return the checkpoint's own mean and standard deviation where it has them."""
        own: dict[str, Any] = {}
        if self.model is not None and self.model != EFFICIENTNET_LITE0:
            own = load_processor_settings(self.model)
        half = [0.5] * self.num_channels
        return own.get("image_mean", half), own.get("image_std", half)

    def _build_model(self, class_names: list[str]) -> nn.Module:
        from transformers import AutoConfig, AutoModelForImageClassification

        labels = {
            "id2label": dict(enumerate(class_names)),
            "label2id": {name: i for i, name in enumerate(class_names)},
        }
        if self.model is not None:
            config = load_image_config(self.model, **labels)
            set_dropout(config, self.dropout)
            return load_image_model(self.model, config, self._image_size())
        options = {"image_size": self._image_size(), "num_channels": self.num_channels}
        with named_model_config(self.model_config):
            config = AutoConfig.for_model(**{**options, **labels, **self.model_config})
            set_dropout(config, self.dropout)
            new_model: nn.Module = AutoModelForImageClassification.from_config(config)
        return new_model


def saved_class_names(folder: Path | None) -> list[str] | None:
    """Return the classes of the model that a folder holds, in their order; None for no model."""
    if folder is None or not holds_model(folder):
        return None
    from transformers import AutoConfig

    names: dict[int, str] = AutoConfig.from_pretrained(folder).id2label
    return [names[i] for i in range(len(names))]
