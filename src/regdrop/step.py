"""One training step, from the plan over the passes to the loss: shared by every integration."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from regdrop.arguments import check_integer, check_number
from regdrop.config import RDropConfig
from regdrop.diagnostics import extra_pass, measure_divergence
from regdrop.divergence_watch import reached_modules, watch_divergence
from regdrop.kernels.backward_passes import limit_backward
from regdrop.loss import (
    ItemTerms,
    LossFunction,
    RDropOutput,
    TermsFunction,
    binary_cross_entropy_terms,
    combine_terms,
    cross_entropy_terms,
    fraternal_terms,
    is_counted,
    mse_terms,
    rdrop_cross_entropy,
)
from regdrop.loss.checks import check_counts, check_plain, place_of_tensor
from regdrop.loss.class_weight import class_weight_on
from regdrop.loss.counts import terms_of_items
from regdrop.passes import (
    copy_structure,
    count_rows,
    find_batch_size,
    find_tensors,
    map_rows,
    refuse_other_rows,
    run_passes,
)
from regdrop.passes.per_sample import has_per_sample_gradients
from regdrop.schedule import StepPlan, is_monitored, plan_step

Loss = Literal["cross_entropy", "binary_cross_entropy", "mse"]


def rdrop_step(
    forward: Callable[[Any], Any],
    batch: Any,
    target: Any,
    *,
    config: RDropConfig,
    step: int,
    total_steps: int | None = None,
    alpha: float | None = None,
    loss: Loss | Callable[..., ItemTerms] = "cross_entropy",
    num_items: Tensor | float | None = None,
    num_weight: Tensor | float | None = None,
    batch_size: int | None = None,
    shared: Iterable[str] = (),
) -> RDropOutput:
    """Run the passes of one optimiser step as a config has them, and compute their loss.

    It plans the step (schedule of alpha, `every_n_steps`, `start_step`), stacks or repeats the
    batch (`passes`, `fraction`, `backward_passes`) and combines the terms, like the trainers do.
    The model and the loop stay yours. It warns once where no dropout is active or the KL is
    exactly 0.

    Args:
        forward: Maps a batch without its target to the model's output, (items, ...) with classes
            last: the model itself, or a function around it. With a loss of your own the output may
            also be packed sequences, or a tuple, list, mapping or dataclass of tensors, numbers and
            texts. One forward's output is handed on as it is. Those of several forwards are joined,
            each part with one row an item; a float becomes its mean over the passes.
        batch: The original batch, as `repeat_batch` takes it; never changed. With
            passes="sequential" and fraction 1 it may be anything that `forward` takes.
        target: The original target, (batch, ...); with a loss of your own also a structure.
        config: The options. `dropout_rates` and method="r3f" need a trainer.
        step: Optimiser step, counted from 0; the same for all micro-batches of an accumulation
            window and on all ranks.
        total_steps: Optimiser steps of the whole run, of which alpha="auto" and
            `alpha_warmup_ratio` are parts.
        alpha: Weight of the divergence in this step, by an `AlphaController`, instead of the
            config's.
        loss: "cross_entropy", "binary_cross_entropy" (with logits) or "mse", or a function of
            terms: from stacked outputs, the target and `num_passes` to `regdrop.loss.ItemTerms`,
            such as `functools.partial(regdrop.loss.cross_entropy_terms, label_smoothing=0.1)`. With
            `fraction`, masks, weights and lengths that are bound so are those of the part.
        num_items: Denominator of both terms instead of this batch's own count: a total over an
            accumulation window and all ranks.
        num_weight: Denominator of the NLL alone: the total class weight, or the number of
            labelled items. Defaults to `num_items`.
        batch_size: As in `repeat_batch`.
        shared: As in `repeat_batch`.

    Returns:
        The loss and its two parts; `kl` is 0 where the step has one pass that is not monitored.

    Raises:
        TypeError: For an argument of the wrong type, an output that is no tensor where the loss
            takes one or an object that cannot be joined, or a loss of your own that returns no
            `ItemTerms`.
        ValueError: For an unknown loss, a count that is not positive, an option that needs a
            trainer, a model of Opacus without sequential passes, outputs to be joined or cut that
            have other rows than the items, or what the loss and `repeat_batch` refuse.
    """
    if not callable(forward):
        raise TypeError(f"forward must be a model or a function, got {type(forward).__name__}")
    if not isinstance(config, RDropConfig):
        raise TypeError(f"config must be an RDropConfig, got {type(config).__name__}")
    check_integer("step", step)
    if total_steps is not None:
        check_integer("total_steps", total_steps, low=1)
    check_integer("batch_size", batch_size, low=0, or_none=True)
    if alpha is not None:
        check_number("alpha", alpha, low=0)
        if alpha and config.num_passes == 1:
            raise ValueError(
                f"alpha={alpha} needs a config with num_passes of at least 2 (one pass has nothing "
                "to be compared with), got num_passes=1"
            )
    check_counts("mean", num_items=num_items, num_weight=num_weight)
    _refuse_per_sample_gradients(forward, config)
    labels = next(find_tensors(target), None)
    terms = _find_terms(loss, config, None if labels is None else labels.device)
    plan = plan_step(config, step, total_steps=total_steps, alpha=alpha)
    run = partial(_checked_output, forward, is_counted(terms), loss)
    other = None
    if plan.num_passes == 1 and is_monitored(config, step):
        other = extra_pass(_monitored_modules(forward), forward, batch)
    passes = run_step_passes(run, batch, target, config, plan, batch_size=batch_size, shared=shared)
    output = compute_passes_loss(
        passes, target, terms, config, plan, num_items=num_items, num_weight=num_weight
    )
    if other is not None:
        both, groups = [passes.outputs, other], [[None], [None]]
        refuse_other_rows(both, groups, batch, batch_size=batch_size, rows=_rows_of(target))
        return output._replace(kl=measure_divergence(passes.outputs, other, target, terms))
    if plan.num_passes > 1:
        watch_divergence(forward, output)
    return output


def _checked_output(
    forward: Callable[[Any], Any], is_one_tensor: bool, loss: Any, inputs: Any
) -> Any:
    """Return what forward does; raise where the loss takes one tensor and it is none."""
    output = forward(inputs)
    if is_one_tensor and not isinstance(output, Tensor):
        place = place_of_tensor(output) or ".logits"
        raise TypeError(
            f"forward must return logits, one tensor, for loss={loss!r}, got "
            f"{type(output).__name__}; give forward=lambda batch: model(batch){place} (of a model "
            "of transformers forward=lambda batch: model(**batch).logits), or as loss a function "
            "of terms, which gets all of it (docs/recipes.md, two heads)"
        )
    return output


def _refuse_per_sample_gradients(forward: Callable[[Any], Any], config: RDropConfig) -> None:
    """Raise where the rows that Opacus clips would not be the items."""
    is_exact = config.passes == "sequential" and config.fraction == 1
    if config.num_passes == 1 or is_exact:
        return
    if has_per_sample_gradients(reached_modules(forward)):
        raise ValueError(
            f"passes={config.passes!r} with fraction={config.fraction} would break the privacy "
            "bound of Opacus, which clips each row as an item of its own; use "
            "passes='sequential' with fraction=1.0, which is exact"
        )


def _monitored_modules(forward: Callable[[Any], Any]) -> nn.ModuleList:
    modules = nn.ModuleList(reached_modules(forward))
    if not len(modules):
        raise ValueError(
            "monitor_steps needs the model, whose statistics an extra pass must not change, and "
            "forward names none: give the module itself, or a function that names it"
        )
    return modules


def _find_terms(
    loss: Loss | Callable[..., ItemTerms], config: RDropConfig, device: torch.device | None
) -> TermsFunction:
    """Return the terms of a loss by its name, with the config's options, or of one's own."""
    if config.likelihood == "model":
        raise ValueError(
            "likelihood='model' is for trainers, whose model returns a loss; give rdrop_step a "
            "function of terms as loss instead"
        )
    if config.dropout_rates is not None:
        raise ValueError(
            f"dropout_rates={config.dropout_rates} must hold until the backward has ended: leave "
            "it out of the config and run rdrop_step and backward inside "
            "regdrop.dropout_rates(model, rates)"
        )
    if config.method == "r3f":
        raise ValueError("method='r3f' adds noise to a model's embeddings: it needs RDropTrainer")
    name_of_loss = loss if isinstance(loss, str) else None
    if name_of_loss == "cross_entropy":
        options: dict[str, Any] = {"unlabelled_index": config.unlabelled_index}
        if config.class_weight is not None:
            options["weight"] = class_weight_on(device, config.class_weight)
        if config.method == "fraternal":
            return partial(fraternal_terms, **options)
        return partial(cross_entropy_terms, impl=config.impl, **options)
    for name, default in (
        ("class_weight", None),
        ("unlabelled_index", None),
        ("impl", "auto"),
        ("method", "rdrop"),
    ):
        if getattr(config, name) != default:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is an option of loss='cross_entropy'; bind it "
                "to your terms by functools.partial"
            )
    if name_of_loss == "binary_cross_entropy":
        return binary_cross_entropy_terms
    if name_of_loss == "mse":
        return mse_terms
    if not callable(loss):
        raise ValueError(
            "loss must be 'cross_entropy', 'binary_cross_entropy', 'mse' or a function of terms, "
            f"got {loss!r}"
        )
    return cut_outputs_of(loss)


def cut_outputs_of(terms: Callable[..., ItemTerms]) -> TermsFunction:
    """Return terms whose gradient ends at `backward_passes` also where they know nothing of it.

    The library's own cut the gradient in their kernels, which saves memory. For others the outputs
    are cut before they see them, so that nobody has to scale a gradient by hand.
    """
    if is_counted(terms):
        return terms

    def cut_terms(
        outputs: Any,
        target: Any,
        /,
        *,
        num_passes: int,
        backward_passes: int | None = None,
    ) -> ItemTerms:
        if backward_passes is not None and backward_passes < num_passes:
            outputs = _cut(outputs, num_passes, backward_passes)
        try:
            found = terms(outputs, target, num_passes=num_passes)
        except TypeError as error:
            if "num_passes" not in str(error):
                raise
            raise TypeError(
                "loss must be a name or a function of stacked outputs, the target and num_passes "
                f"that returns regdrop.loss.ItemTerms, got {terms!r} ({error})"
            ) from error
        if not isinstance(found, ItemTerms):
            raise TypeError(f"loss must return regdrop.loss.ItemTerms, got {type(found).__name__}")
        # Who counts may do so in Python.
        return found._replace(
            nll_count=torch.as_tensor(found.nll_count), kl_count=torch.as_tensor(found.kl_count)
        )

    return cut_terms


def _cut(outputs: Any, num_passes: int, backward_passes: int) -> Any:
    def cut(output: Tensor) -> Tensor:
        passes = output.unflatten(0, (num_passes, -1))
        return limit_backward(passes, backward_passes).flatten(0, 1)

    return map_rows(cut, outputs)


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
        batch: The original batch.
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
        return StepPasses(forward(copy_structure(batch)))

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
        rows=_rows_of(target),
        join=join,
    )
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


def _rows_of(target: Any) -> list[int]:
    return [tensor.size(0) for tensor in find_tensors(target) if tensor.dim()]


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
        if is_counted(terms) or isinstance(error, torch.cuda.OutOfMemoryError):
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
