"""One training step, from the plan over the passes to the loss: shared by every integration."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regdrop.config import RDropConfig
from regdrop.loss import ItemTerms, LossFunction, RDropOutput, TermsFunction, combine_terms
from regdrop.passes import find_batch_size, run_passes
from regdrop.schedule import StepPlan


def compute_step_loss(
    forward: Callable[[Any], Tensor],
    batch: Any,
    target: Tensor,
    terms: TermsFunction,
    config: RDropConfig,
    plan: StepPlan,
    *,
    num_items: Tensor | float | None = None,
    num_weight: Tensor | float | None = None,
    batch_size: int | None = None,
    shared: Iterable[str] = (),
    loss: LossFunction | None = None,
) -> RDropOutput:
    """Run the passes that a step plans and compute their loss.

    Args:
        forward: Maps a batch without its target to the model's output, (items, ...).
        batch: The original batch.
        target: The original target, (batch, ...).
        terms: The output family's terms of each item, its options bound.
        config: How the passes are run.
        plan: What this step does.
        num_items: Denominator of both terms, as in `rdrop_cross_entropy`.
        num_weight: Denominator of the likelihood, as in `rdrop_cross_entropy`.
        batch_size: As in `repeat_batch`.
        shared: As in `repeat_batch`.
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
        output = compute(forward(batch), target, alpha=0.0, num_passes=1, **options)
        return output._replace(loss=output.loss * plan.factor)
    size = find_batch_size(batch) if batch_size is None else batch_size
    items = _random_items(size, config.fraction, target.device)
    outputs = run_passes(
        forward,
        batch,
        num_passes=plan.num_passes,
        strategy=config.passes,
        backward_passes=config.backward_passes,
        items=items,
        batch_size=size,
        shared=shared,
    )
    if config.method == "r3f":  # its likelihood is that of the clean pass alone
        items = torch.arange(size, device=target.device)
    return compute(
        outputs,
        target,
        alpha=plan.alpha,
        num_passes=plan.num_passes,
        backward_passes=config.backward_passes,
        items=items,
        **options,
    )


def _random_items(batch_size: int, fraction: float, device: torch.device) -> Tensor | None:
    if fraction == 1:
        return None
    count = max(1, round(fraction * batch_size))
    return torch.randperm(batch_size, device=device)[:count]


def _combined_loss(
    terms: TermsFunction,
    outputs: Tensor,
    target: Tensor,
    *,
    alpha: float,
    num_passes: int,
    backward_passes: int | None = None,
    items: Tensor | None = None,
    **options: Any,
) -> RDropOutput:
    """Return the loss of terms that are computed by themselves, as `LossFunction` describes it."""
    passes: dict[str, Any] = {"num_passes": num_passes, "backward_passes": backward_passes}
    if items is None:
        step_terms = terms(outputs, target, **passes)
    else:
        step_terms = _partial_terms(outputs, target, items, terms, **passes)
    return combine_terms(step_terms, alpha=alpha, num_passes=num_passes, **options)


def _partial_terms(
    outputs: Tensor, target: Tensor, items: Tensor, terms: TermsFunction, **passes: Any
) -> ItemTerms:
    """Return the likelihood of pass 0 and the divergence of a part, weighted by its inverse."""
    size = target.shape[0]
    first, others = outputs[:size], outputs[size:]
    whole = terms(first, target, num_passes=1)
    part = terms(torch.cat([first[items], others]), target[items], **passes)
    weight = size / items.numel()
    kl = torch.zeros_like(whole.nll).index_add(0, items, part.kl * weight)
    return whole._replace(kl=kl)
