"""Presets of image classification: the paper's, and small ones for a small machine."""

from dataclasses import replace
from typing import Any

from regdrop.config import RDropConfig
from regdrop.tasks.common.base import TrainingSettings
from regdrop.tasks.images.augmentation import Augmentation
from regdrop.tasks.images.models import EFFICIENTNET_LITE0
from regdrop.tasks.images.task import ImageClassification


def _vit(width: int, layers: int, heads: int, patch_size: int) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * width,
        "patch_size": patch_size,
    }


DIGITS = ImageClassification(
    name="digits",
    description="a 4-layer, 64-wide vision transformer on 300 of scikit-learn's 8x8 digits",
    dataset="digits",
    model_config=_vit(64, 4, 4, 4),
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

# 384 px by the paper; issue 25 of the authors' repository reports the gain at 224 px with other
# settings. The weight of the KL has two readings. The paper's text has 0.6, and so do the presets.
# The authors' code sums 0.3 times both directions over a micro-batch of 32 images, where the
# NLL is a mean: alpha 2 * 0.3 * 32 = 19.2 (`--alpha 19.2`). Their rate of dropout inside
# attention could not be checked; here it is 0.1.
_SIZES = {"base": ("ViT-B/16", "base"), "large": ("ViT-L/16", "large")}
_DATA = {
    "cifar100": ("CIFAR-100", "uoft-cs/cifar100", False, 10_000),
    "imagenet": ("ImageNet", "ILSVRC/imagenet-1k", True, 20_000),
}


def _paper_preset(size: str, data: str) -> ImageClassification:
    title, checkpoint = _SIZES[size]
    data_title, dataset, streaming, steps = _DATA[data]
    return ImageClassification(
        name=f"vit-{size}-{data}",
        description=f"{title} from ImageNet-21k fine-tuned on {data_title} at 384 px, by the "
        "paper's settings",
        dataset=dataset,
        model=f"google/vit-{checkpoint}-patch16-224-in21k",
        dropout=0.1,
        image_size=384,
        augmentation="crop",
        streaming=streaming,
        training=TrainingSettings(
            max_steps=steps,
            batch_size=512,
            gradient_accumulation_steps=16,
            learning_rate=1e-2,
            eval_steps=500,
            logging_steps=100,
            warmup_ratio=500 / steps,
            weight_decay=0.0,
            optim="sgd",
            optim_args="momentum=0.9",
            mixed_precision="bf16",
        ),
        rdrop=RDropConfig(alpha=0.6),
    )


def _at_224(task: ImageClassification) -> ImageClassification:
    steps = 20_000
    training = replace(
        task.training,
        max_steps=steps,
        learning_rate=8e-3,
        warmup_ratio=500 / steps,
        gradient_accumulation_steps=4,
    )
    return replace(
        task,
        name=f"{task.name}-224",
        description=task.description.replace(
            "at 384 px, by the paper's settings",
            "at 224 px, by the settings of the authors' issue 25",
        ),
        image_size=224,
        training=training,
    )


PAPER_PRESETS = tuple(
    preset
    for size in _SIZES
    for data in _DATA
    for preset in (_paper_preset(size, data), _at_224(_paper_preset(size, data)))
)


def _small(
    name: str, title: str, channels: int, size: int, augmentation: Augmentation, steps: int
) -> ImageClassification:
    return ImageClassification(
        name=name,
        description=f"a 6-layer, 128-wide vision transformer on {title}",
        dataset=f"data/{name.replace('-', '_')}",
        model_config=_vit(128, 6, 4, 4),
        dropout=0.1,
        image_size=size,
        num_channels=channels,
        augmentation=augmentation,
        training=TrainingSettings(
            max_steps=steps,
            batch_size=128,
            learning_rate=1e-3,
            eval_steps=max(1, steps // 20),
            logging_steps=max(1, steps // 40),
            weight_decay=0.05,
        ),
        rdrop=RDropConfig(alpha=0.6),
    )


_FASHION = _small("fashion-mnist", "Fashion-MNIST", 1, 28, "none", 10_000)


def _part(task: ImageClassification, title: str, images: int) -> ImageClassification:
    """Return a task on so small a part of its training split that it overfits within minutes."""
    training = replace(
        task.training,
        max_steps=1_500,
        batch_size=64,
        eval_steps=100,
        logging_steps=50,
        lr_scheduler_type="constant_with_warmup",
    )
    return replace(
        task,
        name=f"{task.name}-part",
        description=f"a 4-layer, 64-wide vision transformer on {images:,} images of {title}",
        model_config=_vit(64, 4, 4, 7),
        train_examples=images,
        training=training,
        selection_metric="nll",
        rdrop=RDropConfig(alpha=6.0),  # chosen on the validation split
    )


SMALL_PRESETS = (
    DIGITS,
    _FASHION,
    _part(_FASHION, "Fashion-MNIST", 2_000),
    _small("cifar10-jpeg", "CIFAR-10 (JPEG of quality 75)", 3, 32, "flip", 20_000),
    ImageClassification(
        name="efficientnet-cifar10-jpeg",
        description="EfficientNet-Lite0 from ImageNet fine-tuned on CIFAR-10 (JPEG of quality 75)",
        dataset="data/cifar10_jpeg",
        model=EFFICIENTNET_LITE0,
        dropout=0.2,
        image_size=64,
        training=TrainingSettings(
            max_steps=3_000,
            batch_size=64,
            learning_rate=3e-4,
            eval_steps=300,
            logging_steps=50,
        ),
        rdrop=RDropConfig(alpha=0.6),
    ),
)
