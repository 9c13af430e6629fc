"""R-Drop (Regularized Dropout, arXiv 2106.14448) for PyTorch."""

from regdrop.alpha import AlphaController
from regdrop.config import RDropConfig
from regdrop.loss import (
    ItemCounts,
    RDropBCEWithLogitsLoss,
    RDropCrossEntropyLoss,
    RDropL1Loss,
    RDropMSELoss,
    RDropOutput,
    RDropSmoothL1Loss,
    count_items,
    ctc_terms,
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_l1_loss,
    rdrop_mse_loss,
    rdrop_smooth_l1_loss,
    symmetric_kl,
)
from regdrop.passes import (
    DropoutSource,
    dropout_rates,
    find_dropout,
    repeat_batch,
    share_prefix,
)
from regdrop.step import rdrop_step

__version__ = "0.2.0"

__all__ = [
    "AlphaController",
    "DropoutSource",
    "ItemCounts",
    "RDropBCEWithLogitsLoss",
    "RDropConfig",
    "RDropCrossEntropyLoss",
    "RDropL1Loss",
    "RDropMSELoss",
    "RDropOutput",
    "RDropSmoothL1Loss",
    "__version__",
    "count_items",
    "ctc_terms",
    "dropout_rates",
    "find_dropout",
    "linear_rdrop_cross_entropy",
    "rdrop_binary_cross_entropy_with_logits",
    "rdrop_cross_entropy",
    "rdrop_l1_loss",
    "rdrop_mse_loss",
    "rdrop_smooth_l1_loss",
    "rdrop_step",
    "repeat_batch",
    "share_prefix",
    "symmetric_kl",
]
