"""Language understanding: an encoder fine-tuned on the tasks of GLUE."""

from regdrop.tasks.common.base import Family
from regdrop.tasks.understanding.presets import PAPER_PRESETS, SMALL_PRESETS
from regdrop.tasks.understanding.task import LanguageUnderstanding

FAMILY = Family(LanguageUnderstanding, SMALL_PRESETS, PAPER_PRESETS, default="minilm-sst2-part")

__all__ = ["FAMILY", "LanguageUnderstanding"]
