"""R-Drop (Regularized Dropout, arXiv 2106.14448) for PyTorch."""

from regdrop.loss import (
    RDropBCEWithLogitsLoss,
    RDropCrossEntropyLoss,
    RDropMSELoss,
    RDropOutput,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_mse_loss,
    symmetric_kl,
)
