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
    """Return a model for another image size; positions that a vision transformer has are resized.

    Raises:
        ValueError: If it cannot be made for this size.
    """
    config = type(model.config).from_dict({**model.config.to_dict(), "image_size": image_size})
    try:
        resized = type(model)(config)
        resized.load_state_dict(_resized_state(model, resized))
        image = torch.zeros(1, getattr(config, "num_channels", 3), image_size, image_size)
        with torch.no_grad():  # windows may be larger than so small an image
            resized.eval()(image)
    except Exception as error:
        raise ValueError(
            f"image_size must be the {model.config.image_size} of model {name!r}, whose positions "
            f"cannot be resized, got {image_size}"
        ) from error
    result: nn.Module = resized.train(model.training)
    return result


def _resized_state(model: Any, resized: Any) -> dict[str, Tensor]:
    """Return a model's weights, with its positions interpolated where another size has others."""
    state: dict[str, Tensor] = model.state_dict()
    changed = [name for name, x in resized.state_dict().items() if x.shape != state[name].shape]
    if not changed:
        return state
    # Whatever else depends on the size, such as a bias of relative positions, cannot be loaded.
    (name,) = changed
    embeddings, config = model.base_model.embeddings, model.config
    own, size = embeddings.position_embeddings, resized.config.image_size
    before, after = ((each // config.patch_size) ** 2 for each in (config.image_size, size))
    with torch.no_grad():
        like = own.new_empty(1, own.shape[1] - before + after, own.shape[2])
        return {**state, name: embeddings.interpolate_pos_encoding(like, size, size)}
