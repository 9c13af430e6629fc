"""What is minimised: one file an output family, named after torch's loss."""

from regdrop.loss.adaptive_softmax import (
    AdaptiveSoftmax,
    adaptive_log_softmax,
    adaptive_softmax_terms,
)
from regdrop.loss.binary_cross_entropy import (
    RDropBCEWithLogitsLoss,
    binary_cross_entropy_terms,
    rdrop_binary_cross_entropy_with_logits,
)
from regdrop.loss.counts import ItemCounts, count_items, is_counted
from regdrop.loss.cross_entropy import (
    RDropCrossEntropyLoss,
    cross_entropy_terms,
    rdrop_cross_entropy,
)
from regdrop.loss.ctc import ctc_terms
from regdrop.loss.fraternal import fraternal_terms
from regdrop.loss.linear_cross_entropy import (
    linear_cross_entropy_loss,
    linear_cross_entropy_terms,
    linear_rdrop_cross_entropy,
)
from regdrop.loss.output import RDropOutput
from regdrop.loss.reduction import combine_terms
from regdrop.loss.regression import (
    RDropL1Loss,
    RDropMSELoss,
    RDropSmoothL1Loss,
    l1_terms,
    mse_terms,
    rdrop_l1_loss,
    rdrop_mse_loss,
    rdrop_smooth_l1_loss,
    smooth_l1_terms,
)
from regdrop.loss.symmetric_kl import symmetric_kl
from regdrop.loss.terms import ItemTerms, LossFunction, TermsFunction

__all__ = [
    "AdaptiveSoftmax",
    "ItemCounts",
    "ItemTerms",
    "LossFunction",
    "RDropBCEWithLogitsLoss",
    "RDropCrossEntropyLoss",
    "RDropL1Loss",
    "RDropMSELoss",
    "RDropOutput",
    "RDropSmoothL1Loss",
    "TermsFunction",
    "adaptive_log_softmax",
    "adaptive_softmax_terms",
    "binary_cross_entropy_terms",
    "combine_terms",
    "count_items",
    "cross_entropy_terms",
    "ctc_terms",
    "fraternal_terms",
    "is_counted",
    "l1_terms",
    "linear_cross_entropy_loss",
    "linear_cross_entropy_terms",
    "linear_rdrop_cross_entropy",
    "mse_terms",
    "rdrop_binary_cross_entropy_with_logits",
    "rdrop_cross_entropy",
    "rdrop_l1_loss",
    "rdrop_mse_loss",
    "rdrop_smooth_l1_loss",
    "smooth_l1_terms",
    "symmetric_kl",
]
