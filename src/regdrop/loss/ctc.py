"""R-Drop for connectionist temporal classification: both CTC losses and the KL of every frame."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX, check_flag, check_integer
from regdrop.kernels.backward_passes import limit_backward
from regdrop.kernels.precision import mean_of_passes, widen
from regdrop.loss.checks import (
    check_choice,
    check_floating,
    check_indices,
    check_passes,
    check_plain,
    check_stacked,
    check_tensor,
)
from regdrop.loss.counts import ItemCounts, counted_by
from regdrop.loss.symmetric_kl import symmetric_kl
from regdrop.loss.terms import ItemTerms
from regdrop.tracing import can_read

CTCReduction = Literal["mean", "sum"]


def count_sequences(target: Tensor, reduction: CTCReduction = "mean") -> ItemCounts:
    """Return the number of sequences, or 1 for a batch that is summed."""
    count = torch.full((), target.shape[0] if reduction == "mean" else 1, device=target.device)
    return ItemCounts(count, count)


@counted_by(count_sequences, of_items=("logit_lengths", "target_lengths"))
def ctc_terms(
    logits: Tensor,
    target: Tensor,
    *,
    num_passes: int,
    blank: int = 0,
    logit_lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    zero_infinity: bool = False,
    reduction: CTCReduction = "mean",
    backward_passes: int | None = None,
) -> ItemTerms:
    """Return the terms of every sequence, as in CR-CTC (arXiv 2410.05101), no gradient stopped.

    The divergence of a sequence is the sum of that of its frames, as its NLL is a sum over
    them. `reduction` weighs both alike, so that alpha has one meaning. CR-CTC detaches one side of
    each KL, which halves its gradient: with the scale "mean" an alpha equal to its weight gives
    about its gradient, and one of twice that the value of its loss.

    Args:
        logits: (num_passes * batch, frames, C), raw scores, floating point; pass 0 of the whole
            batch first. Half precision is computed in float32.
        target: The original, unstacked target: class indices (batch, symbols). Negative numbers,
            `ignore_index` and `blank` are padding, wherever they are.
        num_passes: Number of passes in `logits`; with 1 only the NLL is computed.
        blank: Index of the class that stands for no symbol.
        logit_lengths: (batch,), the first frames of each sequence that count. None: all.
        target_lengths: (batch,), the first positions of each target that count. None: all but the
            padding.
        ignore_index: Index that marks padding of the target.
        zero_infinity: Count an infinite NLL, of a target that is longer than its frames, and
            its gradient as 0.
        reduction: What a mean over the terms is, as in `torch.nn.functional.ctc_loss`. "mean":
            sequences are divided by the length of their target, and the mean is over sequences.
            "sum": the batch is summed up and counts as one item, so that a mean over several
            batches is one of their sums.
        backward_passes: As in `rdrop_cross_entropy`.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For shapes that do not fit, or targets or lengths out of range (on the CPU).
    """
    check_plain("logits", logits)
    check_passes(num_passes, backward_passes)
    check_flag("zero_infinity", zero_infinity)
    frames, symbols = _check(
        logits, target, num_passes, blank, logit_lengths, target_lengths, ignore_index, reduction
    )
    passes = logits.reshape(num_passes, *target.shape[:1], *logits.shape[1:])
    passes = limit_backward(widen(passes), backward_passes)
    if len(target) == 0:  # which torch's loss refuses
        empty = passes.sum((0, 2, 3))
        return ItemTerms(empty, empty, *count_sequences(target, reduction))
    if logit_lengths is not None:
        # Frames behind the end may hold anything, a nan included.
        passes = passes.masked_fill(~frames[..., None], 0)
    stacked = passes.flatten(0, 1)
    lengths = symbols.sum(-1)
    nll = F.ctc_loss(
        stacked.log_softmax(-1).transpose(0, 1),
        target[symbols].long().repeat(num_passes),
        frames.sum(-1).repeat(num_passes),
        lengths.repeat(num_passes),
        blank=blank,
        reduction="none",
        zero_infinity=zero_infinity,
    )
    nll = mean_of_passes(nll.view(num_passes, -1))
    if num_passes == 1:
        kl = torch.zeros_like(nll)
    else:
        kl = symmetric_kl(stacked, num_passes=num_passes, mask=frames, reduction="none").sum(-1)
    if reduction == "mean":
        nll, kl = (term / lengths.clamp(min=1) for term in (nll, kl))
    return ItemTerms(nll, kl, *count_sequences(target, reduction))


def _check(
    logits: Tensor,
    target: Tensor,
    num_passes: int,
    blank: int,
    logit_lengths: Tensor | None,
    target_lengths: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Return which frames, (batch, frames), and which symbols, (batch, symbols), count."""
    check_floating("logits", logits)
    check_tensor("target", target)
    if logits.dim() != 3:
        raise ValueError(
            f"logits must be (num_passes * batch, frames, classes), got {tuple(logits.shape)}"
        )
    if target.dim() != 2:
        raise ValueError(
            f"target must be (batch, symbols), padded, got shape {tuple(target.shape)}; of "
            "concatenated targets give torch.nn.utils.rnn.pad_sequence(target.split("
            "target_lengths.tolist()), batch_first=True, padding_value=-100)"
        )
    batch = num_passes * len(target)
    if len(logits) != batch and logits.shape[1] == batch:
        raise ValueError(
            "logits must be (num_passes * batch, frames, classes), got shape "
            f"{tuple(logits.shape)}: time comes first; give logits.transpose(0, 1)"
        )
    check_stacked("logits", logits, target, num_passes)
    check_indices(target)
    check_choice("reduction", reduction, get_args(CTCReduction))
    check_integer("blank", blank)
    check_integer("ignore_index", ignore_index)
    num_classes = logits.shape[-1]
    if not 0 <= blank < num_classes:
        raise ValueError(f"blank must be a class, 0 to {num_classes - 1}, got {blank}")
    sizes = len(target), logits.shape[1]
    frames = _first("logit_lengths", logit_lengths, *sizes, logits.device)
    sizes = len(target), target.shape[1]
    symbols = _first("target_lengths", target_lengths, *sizes, target.device)
    symbols = symbols & (target >= 0) & (target != blank) & (target.long() != ignore_index)
    if can_read(target.device):
        wrong = target[symbols & (target >= num_classes)]
        if wrong.numel():
            raise ValueError(
                f"target must hold class indices from 0 to {num_classes - 1} or padding, "
                f"got {int(wrong[0])}"
            )
    return frames, symbols


def _first(
    name: str, lengths: Tensor | None, batch: int, longest: int, device: torch.device
) -> Tensor:
    """Return which positions, (batch, longest), are among the first ones of their row."""
    positions = torch.arange(longest, device=device)
    if lengths is None:
        return (positions >= 0).expand(batch, longest)
    if not isinstance(lengths, Tensor) or lengths.is_floating_point():
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}")
    if lengths.shape != (batch,):
        raise ValueError(
            f"{name} must have one entry a sequence, shape ({batch},), got {tuple(lengths.shape)}"
        )
    if can_read(lengths.device) and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > longest:
            raise ValueError(f"{name} must be from 0 to {longest}, got {low if low < 0 else high}")
    return positions < lengths.to(device)[:, None]
