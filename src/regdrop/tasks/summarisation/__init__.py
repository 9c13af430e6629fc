"""Summarisation: an encoder-decoder, fine-tuned or new, scored by ROUGE."""

from regdrop.tasks.common.base import Family
from regdrop.tasks.summarisation.presets import PAPER_PRESETS, SMALL_PRESETS
from regdrop.tasks.summarisation.task import Summarisation

FAMILY = Family(Summarisation, SMALL_PRESETS, PAPER_PRESETS, default="scitldr-part")

__all__ = ["FAMILY", "Summarisation"]
