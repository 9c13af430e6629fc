"""Pretrained image classifiers: the hub's, also at another image size, and EfficientNet-Lite."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regdrop.tasks.common.pretrained import find_checkpoint

EFFICIENTNET_LITE0 = "efficientnet-lite0"


def register() -> None:
    """Let transformers' auto classes find the EfficientNet-Lite of this package."""
    from regdrop.tasks.images.efficientnet_lite import register as register_efficientnet_lite

    register_efficientnet_lite()


def load_image_config(model: str, **changes: Any) -> Any:
    """Return the configuration of a checkpoint.

    Raises:
        ValueError: If it cannot be loaded, by its name.
    """
    from transformers import AutoConfig

    if model == EFFICIENTNET_LITE0:
        from regdrop.tasks.images.efficientnet_lite import EfficientNetLiteConfig

        return EfficientNetLiteConfig(**changes)
    try:
        return AutoConfig.from_pretrained(find_checkpoint(model), **changes)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {model!r} cannot be loaded: {error}") from error


def load_processor_settings(model: str) -> dict[str, Any]:
    """Return how a checkpoint's images were processed; nothing for a folder that does not say.

    Raises:
        ValueError: If it cannot be loaded, by the checkpoint's name.
    """
    from transformers import ImageProcessingMixin
    from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

    checkpoint = find_checkpoint(model)
    files = [Path(checkpoint, name) for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)]
    if Path(checkpoint).is_dir() and not any(file.exists() for file in files):
        return {}
    try:
        settings: dict[str, Any]
        settings, _ = ImageProcessingMixin.get_image_processor_dict(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the image processor of model {model!r} cannot be loaded: {error}"
        ) from error
    return settings


def load_image_model(model: str, config: Any, image_size: int) -> nn.Module:
    """Return a pretrained model with a new head, for images of some size.

    Args:
        model: Checkpoint: folder, hub id, or "efficientnet-lite0".
        config: Its configuration, with the labels of the new head.
        image_size: Height and width of the images.

    Raises:
        ValueError: If its positions cannot be resized to this size.
    """
    from transformers import AutoModelForImageClassification

    if model == EFFICIENTNET_LITE0:
        from regdrop.tasks.images.efficientnet_lite import load_pretrained

        return load_pretrained(config)
    loaded: Any = AutoModelForImageClassification.from_pretrained(
        find_checkpoint(model), config=config, ignore_mismatched_sizes=True
    )
    own_size = getattr(config, "image_size", None)
    if own_size in (None, image_size):
        result: nn.Module = loaded
        return result
    return _resized(model, loaded, image_size)


def _resized(name: str, model: Any, image_size: int) -> nn.Module:
    """Return a vision transformer for another image size, its positions interpolated."""
    embeddings: Any = getattr(model.base_model, "embeddings", None)
    if not hasattr(embeddings, "interpolate_pos_encoding"):
        raise ValueError(
            f"image_size must be the {model.config.image_size} of model {name!r}, whose positions "
            f"cannot be resized, got {image_size}"
        )
    config = type(model.config).from_dict({**model.config.to_dict(), "image_size": image_size})
    resized = type(model)(config)
    name_of_positions = next(
        k for k, _ in model.named_parameters() if k.endswith("position_embeddings")
    )
    patches = (image_size // config.patch_size) ** 2
    with torch.no_grad():
        like: Tensor = embeddings.position_embeddings.new_empty(1, patches + 1, config.hidden_size)
        positions = embeddings.interpolate_pos_encoding(like, image_size, image_size)
    resized.load_state_dict({**model.state_dict(), name_of_positions: positions})
    result: nn.Module = resized
    return result
