"""The tasks of the paper, data to metric; presets are typed Python."""

from regdrop.tasks import (
    image_presets,
    language_modelling_presets,
    summarisation_presets,
    translation_presets,
    understanding,
)
from regdrop.tasks.base import LazySplits, Metric, PreparedTask, Task, TrainingSettings
from regdrop.tasks.image_classification import ImageClassification
from regdrop.tasks.language_modelling import LanguageModelling
from regdrop.tasks.summarisation import Summarisation
from regdrop.tasks.translation import Translation
from regdrop.tasks.understanding import LanguageUnderstanding

_ALL: tuple[Task, ...] = (
    *image_presets.SMALL_PRESETS,
    *understanding.SMALL_PRESETS,
    *translation_presets.SMALL_PRESETS,
    *summarisation_presets.SMALL_PRESETS,
    *language_modelling_presets.SMALL_PRESETS,
    *image_presets.PAPER_PRESETS,
    *understanding.PAPER_PRESETS,
    *translation_presets.PAPER_PRESETS,
    *summarisation_presets.PAPER_PRESETS,
    *language_modelling_presets.PAPER_PRESETS,
)
PRESETS = {preset.name: preset for preset in _ALL}
# The class of each family, and the preset that stands for it on the command line.
FAMILIES: dict[str, type[Task]] = {
    cls.family: cls
    for cls in (
        ImageClassification,
        LanguageUnderstanding,
        Translation,
        Summarisation,
        LanguageModelling,
    )
}
DEFAULT_PRESETS = {
    "images": "vit-base-cifar100",
    "understanding": "minilm-cola",
    "translation": "multi30k-de-en",
    "summarisation": "aeslc",
    "language-modelling": "ptb",
}

__all__ = [
    "DEFAULT_PRESETS",
    "FAMILIES",
    "PRESETS",
    "ImageClassification",
    "LanguageModelling",
    "LanguageUnderstanding",
    "LazySplits",
    "Metric",
    "PreparedTask",
    "Summarisation",
    "Task",
    "TrainingSettings",
    "Translation",
]
