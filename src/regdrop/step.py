"""One training step of a loop of one's own, from the plan over the passes to the loss."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from regdrop.arguments import check_alpha, check_integer
from regdrop.config import RDropConfig
from regdrop.divergence_watch import reached_modules, watch_divergence
from regdrop.extra_pass import extra_pass, measure_divergence
from regdrop.loss import ItemTerms, RDropOutput, is_counted
from regdrop.loss.checks import check_counts, place_of_tensor
from regdrop.passes import find_tensors, refuse_other_rows, run_as_pass
from regdrop.passes.per_sample import has_per_sample_gradients
from regdrop.schedule import is_monitored, plan_step
from regdrop.step_passes import compute_passes_loss, rows_of_target, run_step_passes
from regdrop.step_terms import Loss, find_terms


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
        config: The options. `dropout_rates`, likelihood="model", fused_linear=True and method="r3f"
            need a trainer.
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
        check_alpha(alpha)
        if alpha and config.num_passes == 1:
            raise ValueError(
                f"alpha={alpha} needs a config with num_passes of at least 2 (one pass has nothing "
                "to be compared with), got num_passes=1"
            )
    check_counts("mean", num_items=num_items, num_weight=num_weight)
    _refuse_per_sample_gradients(forward, config)
    labels = next(find_tensors(target), None)
    device = None if labels is None else labels.device
    terms = find_terms(loss, config, device, num_items)
    plan = plan_step(config, step, total_steps=total_steps, alpha=alpha)
    run = partial(_checked_output, forward, is_counted(terms), loss)
    other = None
    if plan.num_passes == 1 and is_monitored(config, step):
        last = partial(run_as_pass, forward, config.num_passes - 1)
        other = extra_pass(_monitored_modules(forward), last, batch)
    passes = run_step_passes(run, batch, target, config, plan, batch_size=batch_size, shared=shared)
    output = compute_passes_loss(
        passes, target, terms, config, plan, num_items=num_items, num_weight=num_weight
    )
    if other is not None:
        both, groups = [passes.outputs, other], [[None], [None]]
        refuse_other_rows(both, groups, batch, batch_size=batch_size, rows=rows_of_target(target))
        return output._replace(kl=measure_divergence(passes.outputs, other, target, terms))
    if plan.num_passes > 1:
        watch_divergence(forward, output)
    return output


def _checked_output(
    forward: Callable[[Any], Any], is_one_tensor: bool, loss: Any, inputs: Any
) -> Any:
    """Return what forward does; raise where the loss takes a tensor of items and it is none."""
    output = forward(inputs)
    if is_one_tensor and not isinstance(output, Tensor):
        place = place_of_tensor(output) or ".logits"
        raise TypeError(
            f"forward must return logits, one tensor, for loss={loss!r}, got "
            f"{type(output).__name__}; give forward=lambda batch: model(batch){place} (of a model "
            "of transformers forward=lambda batch: model(**batch).logits), or as loss a function "
            "of terms, which gets all of it (docs/recipes.md, two heads)"
        )
    if is_one_tensor and not output.dim():
        raise ValueError(
            f"forward must return logits, (items, ...), for loss={loss!r}, got one number, as a "
            "model's own loss is, or .squeeze() of a batch of one item; return what the loss is "
            "computed from, one row an item, and give the labels as target"
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
    modules = nn.ModuleList(list(reached_modules(forward)))
    if not len(modules):
        raise ValueError(
            "monitor_steps needs the model, whose statistics an extra pass must not change, and "
            "forward names none: give the module itself, or a function that names it"
        )
    return modules
