"""Translation: a Transformer trained from scratch, scored by BLEU."""

from regdrop.tasks.common.base import Family
from regdrop.tasks.translation.presets import PAPER_PRESETS, SMALL_PRESETS
from regdrop.tasks.translation.task import Translation

FAMILY = Family(Translation, SMALL_PRESETS, PAPER_PRESETS, default="multi30k-part-de-en")

__all__ = ["FAMILY", "Translation"]
