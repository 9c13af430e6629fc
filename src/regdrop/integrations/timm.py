"""R-Drop as a task of timm's training loop."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regdrop.config import RDropConfig
from regdrop.integrations import extra
from regdrop.loss import ItemTerms, binary_cross_entropy_terms, cross_entropy_terms
from regdrop.passes import find_dropout
from regdrop.schedule import plan_step, refuse_validation_rule
from regdrop.step import rdrop_step

with extra("timm"):
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    from timm.task import ClassificationTask, TrainingTask

_LOSSES = (
    nn.CrossEntropyLoss,
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
    BinaryCrossEntropy,
)


class RDropTask(ClassificationTask):
    """`timm.task.ClassificationTask` with R-Drop: the same arguments, and `rdrop=RDropConfig(...)`.

    In training a call returns `nll`, `kl` and `alpha` beside `loss` and `output`, the logits of the
    first pass. In evaluation it is ClassificationTask. EMA, compilation, DDP and checkpoints are
    ClassificationTask's. Steps are counted by the calls in training mode; set `step` where your
    loop knows better.

    Args:
        model: As in ClassificationTask.
        criterion: A cross entropy (of torch, with label smoothing or soft targets of timm), or
            timm's binary cross entropy, whose sum and threshold R-Drop does not know.
        rdrop: The options; `RDropConfig()` by default.
        grad_accum_steps: Calls for each optimiser step.
        total_steps: Optimiser steps of the whole run, for `alpha="auto"` and `alpha_warmup_ratio`.
        kwargs: Everything else is ClassificationTask's.

    Raises:
        TypeError: If `rdrop` is no RDropConfig.
        ValueError: For other losses, a rule of alpha that reads a validation loss, a model that is
            distilled, or calls for each step below 1.

    Attributes:
        step: Optimiser step, counted from 0.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None = None,
        *,
        rdrop: RDropConfig | None = None,
        grad_accum_steps: int = 1,
        total_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.rdrop = RDropConfig() if rdrop is None else rdrop
        if not isinstance(self.rdrop, RDropConfig):
            raise TypeError(f"rdrop must be an RDropConfig, got {type(rdrop).__name__}")
        refuse_validation_rule(self.rdrop, "a task")
        if grad_accum_steps < 1:
            raise ValueError(f"grad_accum_steps must be at least 1, got {grad_accum_steps}")
        _check_model(model, self.rdrop)
        super().__init__(model, criterion, **kwargs)
        _check_loss(self.criterion)
        self.grad_accum_steps, self.total_steps = grad_accum_steps, total_steps
        self._calls = 0

    @property
    def step(self) -> int:
        """Return the optimiser step of the next call."""
        return self._calls // self.grad_accum_steps

    @step.setter
    def step(self, step: int) -> None:
        self._calls = step * self.grad_accum_steps

    def forward(self, input: Any, target: Tensor) -> dict[str, Tensor]:
        """Return the loss of a batch and its parts.

        Args:
            input: Images, (batch, channels, height, width), or the dictionary of their patches that
                a NaFlex model takes.
            target: Classes (batch,), or their probabilities (batch, classes), as of mixup.
        """
        if not self.training:
            plain: dict[str, Tensor] = super().forward(input, target)
            return plain
        step, seen, is_trained = self.step, [], torch.is_grad_enabled()

        def run(images: Any) -> Tensor:
            logits: Tensor = self.trainable_module(images)
            # Without a gradient in between, a pass is one that is only measured.
            if torch.is_grad_enabled() == is_trained:
                seen.append(logits)
            return logits

        output = rdrop_step(
            run,
            input,
            target,
            config=self.rdrop,
            step=step,
            total_steps=self.total_steps,
            loss=_terms(self.criterion),
        )
        alpha = plan_step(self.rdrop, step, total_steps=self.total_steps).alpha
        self._calls += 1
        return {
            "loss": output.loss,
            "output": seen[0][: len(target)],
            "nll": output.nll,
            "kl": output.kl,
            "alpha": torch.full_like(output.nll, alpha),
        }

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return what a checkpoint keeps: the calls so far."""
        return {**super().get_task_state(module, ema), "rdrop_calls": self._calls}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Go on from where a checkpoint is."""
        super().load_task_state(state, strict, module, ema)
        self._calls = (state or {}).get("rdrop_calls", self._calls)


def _terms(criterion: Any) -> Callable[..., ItemTerms]:
    """Return the terms of a loss of timm, with its options."""
    if isinstance(criterion, BinaryCrossEntropy):
        return partial(_binary_terms, criterion)
    if isinstance(criterion, SoftTargetCrossEntropy):
        return cross_entropy_terms
    if isinstance(criterion, LabelSmoothingCrossEntropy):
        return partial(cross_entropy_terms, label_smoothing=criterion.smoothing)
    return partial(
        cross_entropy_terms,
        weight=criterion.weight,
        ignore_index=criterion.ignore_index,
        label_smoothing=criterion.label_smoothing,
    )


def _binary_terms(
    criterion: Any, logits: Tensor, target: Tensor, /, *, num_passes: int
) -> ItemTerms:
    """Return the terms of every class, each a yes or no, whose targets are smoothed as timm's."""
    classes, smoothing = logits.shape[-1], criterion.smoothing
    if target.dim() < logits.dim():
        dense = torch.full((len(target), classes), smoothing / classes, device=logits.device)
        target = dense.scatter_(1, target.long()[:, None], 1 - smoothing + smoothing / classes)
    elif criterion.smooth_dense:
        target = target * (1 - smoothing) + smoothing / 2
    return binary_cross_entropy_terms(
        logits,
        target,
        num_passes=num_passes,
        weight=criterion.weight,
        pos_weight=criterion.pos_weight,
    )


def _check_loss(criterion: Any) -> None:
    name = type(criterion).__name__
    if type(criterion) not in _LOSSES:
        raise ValueError(
            f"criterion must be one of {', '.join(loss.__name__ for loss in _LOSSES)}, got {name}: "
            "R-Drop would change another loss. A loss of your own goes into regdrop.rdrop_step"
        )
    if getattr(criterion, "reduction", "mean") != "mean":
        sums = "sum_classes=True" if getattr(criterion, "sum_classes", False) else ""
        got = sums or f"reduction={criterion.reduction!r}"
        raise ValueError(f"{name} must be a mean over classes and items, got {got}")
    if getattr(criterion, "target_threshold", None) is not None:
        raise ValueError(
            f"target_threshold of {name} must be None, got {criterion.target_threshold}"
        )


def _check_model(model: nn.Module, rdrop: RDropConfig) -> None:
    name = type(model).__name__
    if isinstance(model, TrainingTask):
        raise ValueError(f"model must be the network itself, got a task of timm, {name}")
    if getattr(model, "distilled_training", False):
        raise ValueError(
            f"model must return one tensor of logits, got {name} in distilled training, whose "
            "second head follows a teacher: set_distilled_training(False)"
        )
    if rdrop.num_passes > 1 and not any(source.rate > 0 for source in find_dropout(model)):
        warnings.warn(
            f"R-Drop has nothing to compare: {name} has no source of dropout above 0, as timm's "
            "models have by default, so that the KL is exactly 0 at a multiple of the cost. "
            "timm.create_model(..., drop_path_rate=0.1) or drop_rate=0.1 switches one on.",
            stacklevel=3,
        )
