"""The passes of a step, whole or of a part of the batch, and the loss of them."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from regdrop.config import RDropConfig
from regdrop.loss import (
    ItemTerms,
    LossFunction,
    RDropOutput,
    TermsFunction,
    combine_terms,
    cross_entropy_terms,
    is_counted,
    rdrop_cross_entropy,
)
from regdrop.loss.checks import check_plain
from regdrop.loss.counts import terms_of_items
from regdrop.out_of_memory import is_out_of_memory
from regdrop.passes import (
    count_rows,
    find_batch_size,
    find_tensors,
    map_rows,
    run_passes,
)
from regdrop.passes.batch_size import name_size
from regdrop.schedule import StepPlan


class StepPasses(NamedTuple):
    """The passes of a step.

    Attributes:
        outputs: Those of pass 0, of pass 1 and so on, along the first dimension.
        items: Positions (n,) of the items whose divergence counts: those that all passes but the
            first saw. None: all of them.
    """

    outputs: Any
    items: Tensor | None = None


def run_step_passes(
    forward: Callable[[Any], Any],
    batch: Any,
    target: Any,
    config: RDropConfig,
    plan: StepPlan,
    *,
    batch_size: int | None = None,
    shared: Iterable[str] = (),
    join: Callable[[Sequence[Any]], Any] | None = None,
) -> StepPasses:
    """Run the passes that a step plans.

    Args:
        forward: Maps a batch without its target to the model's output, (items, ...).
        batch: The original batch; never changed.
        target: The original target, (batch, ...).
        config: How the passes are run.
        plan: What this step does.
        batch_size: As in `repeat_batch`.
        shared: As in `repeat_batch`.
        join: As in `run_passes`.

    Raises:
        ValueError: For a fraction of a batch whose target is not one row an item.
    """
    if plan.num_passes == 1:
        return StepPasses(run_passes(forward, batch, num_passes=1, shared=shared))

    def count_items() -> int:
        return find_batch_size(batch) if batch_size is None else batch_size

    items = None
    if config.fraction < 1:
        _check_rows_of_fraction(config.fraction, target, count_items())
        items = _random_items(count_items(), config.fraction, target.device)
    outputs = run_passes(
        forward,
        batch,
        num_passes=plan.num_passes,
        strategy=config.passes,
        backward_passes=config.backward_passes,
        items=items,
        batch_size=batch_size,
        shared=shared,
        rows=rows_of_target(target),
        join=join,
    )
    if batch_size is None:
        _check_told_size(outputs, batch, target, plan.num_passes, config.passes)
    if config.method == "r3f":  # its NLL is that of the clean pass alone
        items = torch.arange(target.shape[0], device=target.device)
    return StepPasses(outputs, items)


def compute_passes_loss(
    passes: StepPasses,
    target: Any,
    terms: TermsFunction,
    config: RDropConfig,
    plan: StepPlan,
    *,
    num_items: Tensor | float | None = None,
    num_weight: Tensor | float | None = None,
    loss: LossFunction | None = None,
) -> RDropOutput:
    """Compute the loss of the passes of a step.

    Args:
        passes: What `run_step_passes` returned.
        target: The original target, (batch, ...).
        terms: The output family's terms of each item, its options bound.
        config: The options.
        plan: What this step does.
        num_items: Denominator of both terms, as in `rdrop_cross_entropy`.
        num_weight: Denominator of the NLL, as in `rdrop_cross_entropy`.
        loss: Computes the loss from the outputs where that is cheaper than terms by themselves,
            as behind a fused last layer; by default the terms are computed and combined.

    Returns:
        The loss of the step; `kl` is 0 where the step has one pass.
    """
    compute = partial(_combined_loss, terms) if loss is None else loss
    options: dict[str, Any] = {
        "scale": config.scale,
        "num_items": num_items,
        "num_weight": num_weight,
    }
    if plan.num_passes == 1:
        output = compute(passes.outputs, target, alpha=0.0, num_passes=1, **options)
        return output._replace(loss=output.loss * plan.factor)
    return compute(
        passes.outputs,
        target,
        alpha=plan.alpha,
        num_passes=plan.num_passes,
        backward_passes=config.backward_passes,
        items=passes.items,
        **options,
    )


def rows_of_target(target: Any) -> list[int]:
    """Return the rows of each tensor of a target, which outputs may have too."""
    return [tensor.size(0) for tensor in find_tensors(target) if tensor.dim()]


def _check_told_size(outputs: Any, batch: Any, target: Any, num_passes: int, passes: str) -> None:
    """Raise where the tensor that told the number of items was not one of them.

    Then the output has the rows of the target, as if nothing had been stacked.
    """
    if passes != "stacked" or not isinstance(outputs, Tensor) or not outputs.dim():
        return
    rows, found = rows_of_target(target), outputs.shape[0]
    if found not in rows:
        return
    size = find_batch_size(batch)
    if size in rows or found == num_passes * size:
        return
    raise ValueError(
        f"the batch size is {size} by {name_size(batch)}, but target has {found} rows, and so has "
        f"the output: give batch_size={found}, or put a tensor with a row for each item first"
    )


def _check_rows_of_fraction(fraction: float, target: Any, size: int) -> None:
    if not isinstance(target, Tensor):
        raise ValueError(
            f"fraction={fraction} needs a target that is one tensor, got {type(target).__name__}"
        )
    if target.shape[0] != size:
        raise ValueError(
            f"fraction={fraction} needs one row an item, got {size} rows for "
            f"{target.shape[0]} items; use fraction=1.0"
        )


def _check_rows_of_parts(outputs: Any, size: int, total: int) -> None:
    for name, rows in count_rows(outputs).items():
        if rows != total:
            raise ValueError(
                f"forward must return {name} with one row an item beside a part of the batch, "
                f"{total} for {size} items and their parts, got {rows}; leave it out, repeat it "
                "for every item, or use fraction=1.0"
            )


def _random_items(batch_size: int, fraction: float, device: torch.device) -> Tensor:
    count = max(1, round(fraction * batch_size))
    return torch.randperm(batch_size, device=device)[:count]


def _combined_loss(
    terms: TermsFunction,
    outputs: Any,
    target: Any,
    *,
    alpha: float,
    num_passes: int,
    backward_passes: int | None = None,
    items: Tensor | None = None,
    **options: Any,
) -> RDropOutput:
    """Return the loss of terms that are computed by themselves, as `LossFunction` describes it."""
    passes: dict[str, Any] = {"num_passes": num_passes, "backward_passes": backward_passes}
    if items is None and isinstance(terms, partial) and terms.func is cross_entropy_terms:
        # No item's own terms are asked for: both sums come with the gradient from one pass over
        # the logits, which terms would have read again in the backward.
        bound = {**terms.keywords, **passes, **options}
        return rdrop_cross_entropy(outputs, target, alpha=alpha, **bound)
    if items is None:
        step_terms = terms(outputs, target, **passes)
    else:
        step_terms = _partial_terms(outputs, target, items, terms, **passes)
    return combine_terms(step_terms, alpha=alpha, num_passes=num_passes, **options)


def _partial_terms(
    outputs: Any, target: Tensor, items: Tensor, terms: TermsFunction, **passes: Any
) -> ItemTerms:
    """Return the NLL of pass 0 and the divergence of a part, weighted by its inverse."""
    for output in find_tensors(outputs):
        check_plain("the output behind fraction", output)
    size = target.shape[0]
    _check_rows_of_parts(outputs, size, size + (passes["num_passes"] - 1) * len(items))
    first = map_rows(lambda output: output[:size], outputs)
    both = map_rows(lambda output: torch.cat([output[:size][items], output[size:]]), outputs)
    whole = terms(first, target, num_passes=1)
    part = _terms_of_part(terms, both, target, items, passes)
    weight = size / max(1, items.numel())
    kl = part.kl.new_zeros(size, *part.kl.shape[1:]).index_add(0, items, part.kl * weight)
    # A trainer's own loss is no NLL of items: its one zero stands for all of them.
    nll = whole.nll if whole.nll.dim() else (whole.nll / max(1, kl.numel())).expand_as(kl)
    return whole._replace(nll=nll, kl=kl)


def _terms_of_part(
    terms: TermsFunction, outputs: Any, target: Tensor, items: Tensor, passes: dict[str, Any]
) -> ItemTerms:
    """Return the terms of some items; raise where terms of one's own hold something of all."""
    try:
        part = terms_of_items(terms, target, items)(outputs, target[items], **passes)
    except (ValueError, IndexError, RuntimeError) as error:
        if is_counted(terms) or is_out_of_memory(error):
            raise
        raise ValueError(
            f"loss fails for {len(items)} of {len(target)} items, as fraction has it: {error}; if "
            "it holds something of all items, such as a mask, use fraction=1.0, or bind that to "
            "terms of regdrop by functools.partial"
        ) from error
    if part.kl.shape[:1] != items.shape:
        raise ValueError(
            "loss must return one divergence an item for a fraction below 1, got kl of shape "
            f"{tuple(part.kl.shape)} for {len(items)} items; use fraction=1.0"
        )
    return cast(ItemTerms, part)
