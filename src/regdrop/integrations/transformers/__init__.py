"""R-Drop in the Hugging Face Trainer (transformers 5)."""

from regdrop.integrations import extra

with extra("transformers"):
    from regdrop.integrations.transformers.heads.registry import (
        Head,
        LabelledBatch,
        find_head,
        register_head,
    )
    from regdrop.integrations.transformers.trainer import (
        RDropSeq2SeqTrainer,
        RDropTrainer,
        RDropTrainerMixin,
    )

__all__ = [
    "Head",
    "LabelledBatch",
    "RDropSeq2SeqTrainer",
    "RDropTrainer",
    "RDropTrainerMixin",
    "find_head",
    "register_head",
]
