"""The tasks of the paper, data to metric; presets are typed Python."""

from regdrop.tasks.base import Metric, PreparedTask, Task, TrainingSettings
from regdrop.tasks.image_classification import DIGITS, IMAGES, ImageClassification

PRESETS: dict[str, Task] = {preset.name: preset for preset in (DIGITS, IMAGES)}

__all__ = [
    "PRESETS",
    "ImageClassification",
    "Metric",
    "PreparedTask",
    "Task",
    "TrainingSettings",
]
