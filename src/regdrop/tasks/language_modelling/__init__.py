"""Language modelling by words: a Transformer from scratch, scored by perplexity."""

from regdrop.tasks.common.base import Family
from regdrop.tasks.language_modelling.presets import PAPER_PRESETS, SMALL_PRESETS
from regdrop.tasks.language_modelling.task import LanguageModelling

FAMILY = Family(LanguageModelling, SMALL_PRESETS, PAPER_PRESETS, default="alice")

__all__ = ["FAMILY", "LanguageModelling"]
