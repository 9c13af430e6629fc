"""Image classification: a checkpoint fine-tuned, or a new vision transformer."""

from regdrop.tasks.common.base import Family
from regdrop.tasks.images.presets import PAPER_PRESETS, SMALL_PRESETS
from regdrop.tasks.images.task import ImageClassification

FAMILY = Family(ImageClassification, SMALL_PRESETS, PAPER_PRESETS, default="digits")

__all__ = ["FAMILY", "ImageClassification"]
