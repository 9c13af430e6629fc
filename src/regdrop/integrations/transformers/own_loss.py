"""The model's or the trainer's own loss as the likelihood, beside the divergence of the logits.

Whatever the loss is, it is computed by whoever computes it without R-Drop, for every pass. What
it is not known to be, a mean over rows or one that counts items, is tried on the first batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regdrop.arguments import IGNORE_INDEX
from regdrop.diagnostics import extra_pass
from regdrop.heads import Head
from regdrop.integrations.transformers.detection import find_tensor, named_tensors
from regdrop.integrations.transformers.evaluation import evaluation_mode, shaken
from regdrop.loss import (
    ItemCounts,
    ItemTerms,
    TermsFunction,
    binary_cross_entropy_terms,
    mse_terms,
    symmetric_kl,
)
from regdrop.passes import find_batch_size, preserve_buffers, preserve_random_state, repeat_batch
from regdrop.reading import Reading
from regdrop.step import cut_outputs_of

# A number of items that no batch has.
_SOME_ITEMS = 37.0

# From a batch with its labels, and the number of items of the window or None, to loss and output.
ComputeLoss = Callable[[dict[str, Any], Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class OwnLoss:
    """What the first batch told of a loss that somebody else computes.

    Attributes:
        counts_items: Whether it is divided by the number of items that it is given; else it is a
            mean over its own batch.
        is_rowwise: Whether its value for a stacked batch is the mean of those of the passes. Where
            it is not, as with negatives or pairs in the batch, passes run one by one.
        divergence: How the logits are compared; None where the head is known.
    """

    counts_items: bool
    is_rowwise: bool
    divergence: "Divergence | None"


@dataclass(frozen=True)
class Divergence:
    """How the logits of a model with a loss of its own are compared.

    Attributes:
        kind: "classes", "labels" (each a yes or no), "numbers" or "margins" (of pairs of rows).
        logits: Where they are in the output: a name, a position, or None for the output itself.
        mask: Name of the input that tells which items count, of their shape; None where all do.
        class_dim: Dimension of the classes.
        is_shifted: Whether position t predicts the label of position t + 1, which tells of `mask`.
        label: Name of the labels of "labels" and "numbers".
    """

    kind: str
    logits: str | int | None
    mask: str | None = None
    label: str | None = None
    class_dim: int = -1
    is_shifted: bool = False

    def __str__(self) -> str:
        name = "its output" if self.logits is None else f"output {self.logits!r}"
        if self.kind == "margins":
            return f"the KL of the margins of pairs of rows in {name}"
        if self.kind == "numbers":
            return f"the squared difference of {name}"
        if self.kind == "labels":
            return f"the KL of {name}, each number a yes or no"
        items = "all" if self.mask is None else f"those that {self.mask} tells"
        items += ", moved by one" if self.is_shifted else ""
        return f"the KL of {name}, read as scores of classes (items: {items})"

    def head(self, inputs: Mapping[str, Any], rows: int) -> Head:
        """Return a head whose terms hold the divergence; its NLL is not used."""
        batch = dict(inputs)
        read = partial(find_tensor, key=self.logits)
        if self.kind == "margins":
            device = next(v for v in batch.values() if isinstance(v, Tensor)).device
            ones = torch.ones(rows // 2, device=device)
            margins = partial(_read_margins, read=read)
            return Head(batch, ones, binary_cross_entropy_terms, margins, batch_size=rows)
        if self.label is not None:
            target = batch[self.label].float()
            terms = binary_cross_entropy_terms if self.kind == "labels" else mse_terms
            shaped = partial(_read_shaped, read=read, shape=target.shape[1:])
            return Head(batch, target, terms, shaped, batch_size=rows)
        if self.mask is None:
            device = next(v for v in batch.values() if isinstance(v, Tensor)).device
            counted = torch.ones(rows, dtype=torch.bool, device=device)
        else:
            counted = batch[self.mask]
            is_attention = self.mask == "attention_mask"
            counted = counted.bool() if is_attention else counted != IGNORE_INDEX
            if self.is_shifted:
                counted = _moved(counted)
        terms = partial(_class_terms, class_dim=self.class_dim)
        return Head(batch, counted, terms, read, batch_size=rows, count=_count_true)


def _class_terms(
    logits: Tensor, counted: Tensor, /, *, num_passes: int, class_dim: int, **_: Any
) -> ItemTerms:
    """Return the KL of each item; of each row its mean over positions where all of them count."""
    logits = logits.movedim(class_dim, -1)
    if num_passes == 1:
        kl = torch.zeros(counted.shape, device=logits.device)
    elif logits.shape[1:-1] == counted.shape[1:]:
        kl = symmetric_kl(logits, num_passes=num_passes, mask=counted, reduction="none")
    else:
        kl = symmetric_kl(logits, num_passes=num_passes, reduction="none").flatten(1).mean(1)
    return ItemTerms(torch.zeros_like(kl), kl, *_count_true(counted))


def _count_true(counted: Tensor) -> ItemCounts:
    return ItemCounts(counted.sum(), counted.sum())


def _read_margins(output: Any, *, read: Callable[[Any], Tensor]) -> Tensor:
    """Return the margin of each pair of one pass: the first half of its rows less the second."""
    chosen, rejected = read(output).flatten().chunk(2)
    return chosen - rejected


def _read_shaped(output: Any, *, read: Callable[[Any], Tensor], shape: torch.Size) -> Tensor:
    return read(output).reshape(-1, *shape)


def read_own_loss(
    compute: ComputeLoss, head: Head, num_items: Tensor | float | None, inputs: dict[str, Any]
) -> Reading:
    """Compute the own loss of some passes, and read the logits beside it.

    Args:
        compute: The loss of a batch with its labels.
        head: Reads the logits.
        num_items: Items of the accumulation window as the loss counts them; None if it does not.
        inputs: The batch, of one pass or several.

    Raises:
        ValueError: If the logits have no gradient where the loss is trained.
    """
    if num_items is not None:
        num_items = num_items * (find_batch_size(inputs) / head.rows)
    loss, output = compute(inputs, num_items)
    logits = head.outputs(output)
    if not torch.is_grad_enabled():
        return Reading(logits, output)
    if not logits.requires_grad:
        raise ValueError(
            "the logits to be compared must carry a gradient, and those beside this loss "
            "have none, so that their divergence would train nothing (TRL's trainers "
            "compute losses without logits: use regdrop.integrations.trl.RDropSFTTrainer; "
            "there is no form for preferences against a reference model, as DPO's)"
        )
    return Reading(logits, output, (loss,))


def divergence_terms(head: Head) -> TermsFunction:
    """Return terms that hold the divergence of each item alone; their NLL is 0."""
    own_terms = cut_outputs_of(head.terms)

    def terms(
        outputs: Tensor,
        target: Tensor,
        /,
        *,
        num_passes: int,
        backward_passes: int | None = None,
    ) -> ItemTerms:
        if num_passes == 1:
            zero, one = outputs.new_zeros(()), outputs.new_ones(())
            return ItemTerms(zero, zero, one, head.counts().kl)
        own = own_terms(outputs, target, num_passes=num_passes, backward_passes=backward_passes)
        return own._replace(nll=torch.zeros_like(own.kl), nll_count=own.kl_count)

    return terms


def probe_own_loss(
    model: nn.Module,
    compute: ComputeLoss,
    inputs: Mapping[str, Any],
    *,
    head: Head | None,
    label_names: Sequence[str],
    counts_items: bool | None,
) -> OwnLoss:
    """Try a loss on one batch, dropout off, to see what it is.

    Args:
        model: The unwrapped model.
        compute: The loss.
        inputs: A batch with its labels.
        head: The head of the batch where one is known.
        label_names: Names that labels have.
        counts_items: Whether the loss divides by the number of items that it is given; None to try.

    Raises:
        ValueError: If the output holds nothing that could be logits.
    """
    with evaluation_mode(model):
        trial = _try_loss(model, compute, inputs, counts_items)
        # A new head may score all rows alike, and there a loss of pairs is as good as one of rows.
        with shaken(model):
            other = _try_loss(model, compute, inputs, counts_items)
    counts_items = trial.counts_items or other.counts_items
    is_rowwise = trial.is_rowwise and other.is_rowwise
    divergence = None
    if head is None:
        rows = find_batch_size(inputs)
        divergence = _find_divergence(other.output, inputs, label_names, rows, other.loss)
        if divergence.mask not in (None, "attention_mask") and divergence.class_dim == -1:
            read = partial(find_tensor, key=divergence.logits)
            some = _SOME_ITEMS if counts_items else None
            is_shifted = _predicts_next(model, compute, inputs, some, read, divergence.mask)
            divergence = replace(divergence, is_shifted=is_shifted)
    return OwnLoss(counts_items, is_rowwise, divergence)


class _Trial(NamedTuple):
    """What one batch told of a loss, dropout off."""

    counts_items: bool
    is_rowwise: bool
    loss: Tensor
    output: Any


def _try_loss(
    model: nn.Module, compute: ComputeLoss, inputs: Mapping[str, Any], counts_items: bool | None
) -> _Trial:
    def look(batch: Mapping[str, Any], num_items: float | None) -> tuple[Tensor, Any]:
        items = _on_device(num_items, inputs)
        return extra_pass(model, lambda own: compute(own, items), dict(batch))

    if counts_items is None:
        # Only a divisor makes twice as many half the loss.
        losses = [look(inputs, items)[0] for items in (_SOME_ITEMS, 2 * _SOME_ITEMS)]
        counts_items = not _are_close(*losses)
    some = _SOME_ITEMS if counts_items else None
    loss, output = look(inputs, some)
    try:
        stacked, _ = look(repeat_batch(dict(inputs)), None if some is None else 2 * some)
        is_rowwise = _are_close(stacked, loss)
    except Exception:  # whatever a model raises for rows that do not fit together
        is_rowwise = False
    return _Trial(counts_items, is_rowwise, loss, output)


def _predicts_next(
    model: nn.Module,
    compute: ComputeLoss,
    inputs: Mapping[str, Any],
    num_items: float | None,
    read: Callable[[Any], Tensor],
    label: str,
) -> bool:
    """Return whether the logits that a loss depends on are those one before the labels."""
    valid = inputs[label] != IGNORE_INDEX
    items = _on_device(num_items, inputs)
    with (
        evaluation_mode(model),
        preserve_random_state(),
        preserve_buffers(model),
        torch.enable_grad(),
    ):
        loss, output = compute(dict(inputs), items)
        logits = read(output)
        if valid.dim() < 2 or not (loss.requires_grad and logits.requires_grad):
            return False
        (slope,) = torch.autograd.grad(loss, logits, allow_unused=True)
    if slope is None:
        return False
    acts = slope.abs().sum(-1) > 0
    return torch.equal(acts, _moved(valid)) and not torch.equal(acts, valid)


def _on_device(num_items: float | None, inputs: Mapping[str, Any]) -> Tensor | None:
    if num_items is None:
        return None
    device = next(v for v in inputs.values() if isinstance(v, Tensor)).device
    return torch.tensor(num_items, device=device)


def _moved(counted: Tensor) -> Tensor:
    return F.pad(counted[..., 1:], (0, 1), value=False)


def _are_close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isclose(a, b.to(a), rtol=1e-3, atol=1e-6, equal_nan=True))


def _find_divergence(
    output: Any, inputs: Mapping[str, Any], label_names: Sequence[str], rows: int, loss: Tensor
) -> Divergence:
    """Return how the logits of an output are compared, by their shape and that of the labels."""
    key, logits = _find_logits(output, rows)
    name = next(
        (n for n in (*label_names, "labels", "label") if isinstance(inputs.get(n), Tensor)), None
    )
    labels = None if name is None else inputs[name]
    items = logits.shape[:-1] if logits.dim() > 1 else logits.shape
    is_single = logits.dim() == 1 or logits.shape[-1] == 1
    if (
        labels is not None
        and labels.numel() == logits.numel()
        and (is_single or labels.is_floating_point())
    ):
        values = labels.float()
        is_shares = (
            logits.dim() > 1
            and not is_single
            and bool(torch.isclose(values.sum(-1), values.new_ones(())).all())
        )
        if is_shares:
            return Divergence("classes", key)
        is_binary = bool(((values >= 0) & (values <= 1)).all())
        return Divergence("labels" if is_binary else "numbers", key, label=name)
    if is_single:
        if rows % 2 == 0 and logits.numel() == rows and _are_pairs(logits, loss):
            return Divergence("margins", key)
        raise ValueError(
            f"the model's output {key!r} is one number a row, of shape {tuple(logits.shape)}, and "
            "no labels of that shape tell how passes are compared: override rdrop_head of the "
            "trainer to say what its divergence is"
        )
    second = (len(logits), *logits.shape[2:]) if logits.dim() > 2 else None
    if labels is not None and not labels.is_floating_point() and labels.shape == second != items:
        return Divergence("classes", key, mask=name, class_dim=1)
    # Labels may be padded by one of themselves: then the attention mask tells.
    attention = inputs.get("attention_mask")
    is_attended = isinstance(attention, Tensor) and attention.shape == items
    if (
        labels is not None
        and not labels.is_floating_point()
        and labels.shape == items
        and not (is_attended and bool((labels != IGNORE_INDEX).all()))
    ):
        return Divergence("classes", key, mask=name)
    return Divergence("classes", key, mask="attention_mask" if is_attended else None)


def _are_pairs(logits: Tensor, loss: Tensor) -> bool:
    """Return whether a loss is that of pairs, their better rows first (Bradley and Terry)."""
    chosen, rejected = logits.flatten().float().chunk(2)
    return _are_close(-F.logsigmoid(chosen - rejected).mean(), loss)


def _find_logits(output: Any, rows: int) -> tuple[str | int | None, Tensor]:
    """Return the logits of an output: by name, else the only numbers with a row an item.

    Raises:
        ValueError: If there are none, or several of which none is called logits.
    """
    tensors = dict(named_tensors(output))
    fitting = [
        key
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.dim() > 0 and len(tensor) == rows
    ]
    named = [key for key in fitting if isinstance(key, str) and "logits" in key]
    if "logits" in tensors:
        named = ["logits"]
    if named or len(fitting) == 1:
        key = (named or fitting)[0]
        return key, tensors[key]
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    reason = "one of them must be called logits" if fitting else "return them beside the loss"
    raise ValueError(
        f"the model's output must hold logits of {rows} rows to be compared between passes, got "
        f"{found}: {reason}, or override rdrop_head of the trainer"
    )
