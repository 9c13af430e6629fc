"""The tasks of the paper, data to metric; presets are typed Python."""

from regdrop.tasks import images, language_modelling, summarisation, translation, understanding
from regdrop.tasks.common.base import LazySplits, Metric, PreparedTask, Task, TrainingSettings
from regdrop.tasks.images import ImageClassification
from regdrop.tasks.language_modelling import LanguageModelling
from regdrop.tasks.summarisation import Summarisation
from regdrop.tasks.translation import Translation
from regdrop.tasks.understanding import LanguageUnderstanding

_FAMILIES = (
    images.FAMILY,
    understanding.FAMILY,
    translation.FAMILY,
    summarisation.FAMILY,
    language_modelling.FAMILY,
)
FAMILIES: dict[str, type[Task]] = {family.task.family: family.task for family in _FAMILIES}
PRESETS: dict[str, Task] = {
    preset.name: preset
    for presets in (
        *(family.small_presets for family in _FAMILIES),
        *(family.paper_presets for family in _FAMILIES),
    )
    for preset in presets
}
DEFAULT_PRESETS = {family.task.family: family.default for family in _FAMILIES}

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
