"""The R-Drop terms as the paper writes them: the readable definition, the oracle of every test."""

from itertools import combinations

import torch
from torch import Tensor

from regdrop.kernels.backward_passes import limit_backward
from regdrop.kernels.precision import mean_of_passes, widen
from regdrop.kernels.target import Target


def eager_terms(logits: Tensor, target: Target, *, backward_passes: int) -> tuple[Tensor, Tensor]:
    """Return each item's NLL and divergence by autograd through `log_softmax`.

    Args:
        logits: (num_passes, N, C), computed in float32 at least.
        target: What the N items are compared with.
        backward_passes: The first passes that carry the gradient, times num_passes / this.

    Returns:
        The negative log-likelihood, mean over passes, and the symmetric KL, mean over pairs of
        passes, both (N,) and 0 on invalid items (equation 4 of arXiv 2106.14448).
    """
    x = limit_backward(widen(logits), backward_passes)
    if target.valid is not None:
        x = x.masked_fill(~target.valid[None, :, None], 0)
    log_p = x.log_softmax(-1)
    nll = mean_of_passes(torch.stack([_nll(row, target) for row in log_p]))
    kl = _mean_symmetric_kl(log_p)
    if target.valid is not None:
        nll, kl = (term.masked_fill(~target.valid, 0) for term in (nll, kl))
    return nll, kl


def _nll(log_p: Tensor, target: Target) -> Tensor:
    if target.probabilities is not None:
        dense = target.dense(log_p.dtype)
        return -torch.where(dense == 0, 0, dense * log_p).sum(-1)
    assert target.classes is not None
    at_class = log_p.gather(-1, target.classes[:, None])[:, 0]
    nll = -_weighted(at_class, target.class_mass(log_p.dtype))
    if target.label_smoothing:
        spread = target.spread_mass(log_p.shape[-1], log_p.dtype)
        nll = nll - _weighted(log_p, spread).sum(-1)
    return nll


def _weighted(log_p: Tensor, mass: Tensor | float) -> Tensor:
    """Return mass * log_p; a class without mass costs nothing, though -inf may mask it."""
    if isinstance(mass, Tensor):
        return torch.where(mass == 0, 0, log_p * mass)
    return log_p * mass if mass else torch.zeros_like(log_p)


def _mean_symmetric_kl(log_p: Tensor) -> Tensor:
    pairs = list(combinations(log_p, 2))
    if not pairs:
        return log_p.new_zeros(log_p.shape[1])
    return torch.stack([kl_divergence(a, b) + kl_divergence(b, a) for a, b in pairs]).mean(0) / 2


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(P||Q) over the last dimension, from log-probabilities."""
    # A class masked with -inf in P contributes nothing, whatever Q gives it.
    difference = (log_p - log_q).masked_fill(torch.isneginf(log_p), 0)
    # One masked in Q alone is infinitely unlikely there, though P may be too small to be above 0.
    masked = torch.isposinf(difference)
    return torch.where(masked, difference, log_p.exp() * difference).sum(-1)
