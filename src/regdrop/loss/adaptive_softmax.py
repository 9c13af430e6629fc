"""R-Drop for an adaptive softmax (Grave et al. 2017): the exact chain rule over head and tails."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regdrop.arguments import IGNORE_INDEX, check_integer
from regdrop.kernels.backward_passes import graded_passes, limit_backward
from regdrop.kernels.eager import kl_divergence
from regdrop.kernels.precision import mean_of_passes, widen
from regdrop.loss.checks import (
    check_classes,
    check_finite_divergence,
    check_floating,
    check_indices,
    check_passes,
    check_plain,
    check_stacked,
)
from regdrop.loss.class_items import count_classes
from regdrop.loss.counts import counted_by
from regdrop.loss.terms import ItemTerms


class AdaptiveSoftmax(Protocol):
    """Classes by frequency: the most frequent ones in the head, the others in tails behind it.

    `torch.nn.AdaptiveLogSoftmaxWithLoss` is one.

    Attributes:
        cutoffs: The first class of each tail, and last the number of classes.
        head: From hidden states (n, features) to logits (n, cutoffs[0] + number of tails): the
            frequent classes, then one a tail.
        tail: For each tail, from hidden states to the logits of its classes.
    """

    @property
    def cutoffs(self) -> Sequence[int]:
        """The first class of each tail, and last the number of classes."""

    @property
    def head(self) -> Any:
        """From hidden states (n, features) to the logits of frequent classes and of tails."""

    @property
    def tail(self) -> Any:
        """For each tail, from hidden states (n, features) to the logits of its classes."""


@counted_by(count_classes)
def adaptive_softmax_terms(
    hidden: Tensor,
    target: Tensor,
    softmax: AdaptiveSoftmax,
    *,
    num_passes: int,
    ignore_index: int = IGNORE_INDEX,
    backward_passes: int | None = None,
    chunk_size: int = 512,
) -> ItemTerms:
    """Return the terms of every item behind an adaptive softmax.

    A class of tail c has the probability P(c) P(class | c), so that the divergence is that of the
    heads plus, for every tail, its divergence weighted by its probability:
    `KL(P||Q) = KL(head) + sum_c P(c) KL(tail_c)`. That is the divergence of the full distributions,
    exactly. It needs every tail for every item, which the NLL alone does not; items are
    computed in chunks, again in the backward, so that only a chunk's logits exist at a time.

    Args:
        hidden: (num_passes * batch, ..., features), floating point; pass 0 of the whole batch
            first.
        target: The original, unstacked target: class indices (batch, ...), int64.
        softmax: Head and tails.
        num_passes: Number of passes in `hidden`; with 1 only the NLL is computed.
        ignore_index: Index that marks an item that counts in neither term.
        backward_passes: Number of first passes that carry the gradient, scaled so that it stays
            unbiased; the others may come from a forward without gradient. None: all.
        chunk_size: Items a chunk.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For shapes that do not fit, or targets out of range (on the CPU).
    """
    check_plain("hidden", hidden)
    check_passes(num_passes, backward_passes)
    check_integer("ignore_index", ignore_index)
    check_integer("chunk_size", chunk_size, low=1)
    chunk_size = int(chunk_size)  # Tensor.split takes no integer of NumPy
    _check(hidden, target, num_passes)
    target = target.long()
    valid = (target != ignore_index).reshape(-1)
    rows = valid.nonzero()[:, 0]
    classes = target.reshape(-1)[rows]
    check_classes(classes, softmax.cutoffs[-1], ignore_index)
    passes = hidden.reshape(num_passes, target.numel(), hidden.shape[-1])[:, rows]
    compute = partial(_nll, softmax)
    if num_passes > 1:
        compute = partial(_both_terms, softmax, graded_passes(num_passes, backward_passes))
    if torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False)
    chunks = (
        passes.split(chunk_size, dim=1),
        classes.split(chunk_size),
        _head_classes(classes, softmax).split(chunk_size),
    )
    parts = [compute(*chunk) for chunk in zip(*chunks, strict=True)]
    nll, kl = (torch.cat([part[i] for part in parts]) for i in range(2))
    check_finite_divergence(kl)
    empty = nll.new_zeros(target.numel())
    nll, kl = (empty.index_add(0, rows, term).view(target.shape) for term in (nll, kl))
    return ItemTerms(nll, kl, *count_classes(target, ignore_index=ignore_index))


def adaptive_log_softmax(hidden: Tensor, softmax: AdaptiveSoftmax) -> Tensor:
    """Return the log-probabilities of all classes, (n, classes), of hidden states (n, features)."""
    head = _log_softmax(softmax.head(hidden))
    first = softmax.cutoffs[0]
    tails = [
        head[:, first + i, None] + _log_softmax(tail(hidden)) for i, tail in enumerate(softmax.tail)
    ]
    return torch.cat([head[:, :first], *tails], dim=-1)


def _nll(
    softmax: AdaptiveSoftmax, passes: Tensor, classes: Tensor, head_classes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the NLL of one pass, each tail computed for its own items alone."""
    hidden = passes[0]
    head = _log_softmax(softmax.head(hidden))
    nll = -_pick(head, head_classes)
    for i, tail in enumerate(softmax.tail):
        low, high = softmax.cutoffs[i], softmax.cutoffs[i + 1]
        # A tail without items is computed for none, so that its parameters have a gradient of 0.
        inside = ((classes >= low) & (classes < high)).nonzero()[:, 0]
        own = _pick(_log_softmax(tail(hidden[inside])), classes[inside] - low)
        nll = nll.index_add(0, inside, -own)
    return nll, torch.zeros_like(nll)


def _both_terms(
    softmax: AdaptiveSoftmax,
    backward_passes: int,
    passes: Tensor,
    classes: Tensor,
    head_classes: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the mean NLL over passes and the mean divergence over pairs of them."""
    first = softmax.cutoffs[0]
    head = _log_softmax(limit_backward(softmax.head(passes), backward_passes))
    nll = -_pick(head, head_classes.expand(len(passes), -1))
    pairs = list(combinations(range(len(passes)), 2))
    kl = torch.stack([_both_ways(head[a], head[b]).sum(0) for a, b in pairs])
    for i, tail in enumerate(softmax.tail):
        low, high = softmax.cutoffs[i], softmax.cutoffs[i + 1]
        log_p = _log_softmax(limit_backward(tail(passes), backward_passes))
        inside = (classes >= low) & (classes < high)
        own = torch.where(inside, classes - low, 0).expand(len(passes), -1)
        nll = nll - _pick(log_p, own) * inside
        mass = head[..., first + i].exp()
        kl = kl + torch.stack(
            [(mass[[a, b]] * _both_ways(log_p[a], log_p[b])).sum(0) for a, b in pairs]
        )
    return mean_of_passes(nll), kl.mean(0) / 2


def _both_ways(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(P||Q) and KL(Q||P), (2, n)."""
    return torch.stack([kl_divergence(log_p, log_q), kl_divergence(log_q, log_p)])


def _head_classes(classes: Tensor, softmax: AdaptiveSoftmax) -> Tensor:
    """Return the class in the head: itself where it is frequent, else that of its tail."""
    first = softmax.cutoffs[0]
    bounds = torch.tensor(softmax.cutoffs[:-1], device=classes.device)
    tail = torch.bucketize(classes, bounds, right=True) - 1
    return torch.where(classes < first, classes, first + tail)


def _pick(log_p: Tensor, classes: Tensor) -> Tensor:
    return log_p.gather(-1, classes[..., None])[..., 0]


def _log_softmax(logits: Tensor) -> Tensor:
    return widen(logits).log_softmax(-1)


def _check(hidden: Tensor, target: Tensor, num_passes: int) -> None:
    check_floating("hidden", hidden)
    check_stacked("hidden", hidden, target, num_passes)
    check_indices(target)
    if hidden.shape[1:-1] != target.shape[1:]:
        raise ValueError(
            "target must have the shape of one pass without the features, "
            f"{(target.shape[0], *hidden.shape[1:-1])}, got {tuple(target.shape)}"
        )
