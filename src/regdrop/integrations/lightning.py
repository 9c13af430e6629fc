"""R-Drop in a LightningModule: the training step, and what is logged of it."""

import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regdrop.config import RDropConfig
from regdrop.integrations import extra
from regdrop.loss import ItemTerms
from regdrop.passes import find_batch_size
from regdrop.schedule import (
    is_monitored,
    is_part_of_run,
    plan_step,
    refuse_unknown_length,
    refuse_validation_rule,
)
from regdrop.step import rdrop_step
from regdrop.step_terms import Loss

with extra("lightning"):
    from lightning.pytorch import LightningModule

if TYPE_CHECKING:
    _Base = LightningModule
else:
    _Base = object


class RDropMixin(_Base):
    """R-Drop for a LightningModule; list it first among the bases.

    It provides `training_step`: the passes that `rdrop` asks for through the module's own forward,
    whose `nll`, `kl` and `alpha` are logged. Steps are the trainer's `global_step`. Validation and
    test stay the module's own.

    Lightning hands over one micro-batch at a time, so that nobody knows the number of items of an
    accumulation window before its end: the loss is a mean over each micro-batch of each process,
    and these means count alike, as everywhere in Lightning.

    Attributes:
        rdrop: The options.
        rdrop_loss: Loss of the outputs, as `rdrop_step` takes it; a function is set on the
            instance, as in `self.rdrop_loss = partial(cross_entropy_terms, label_smoothing=0.1)`.
    """

    rdrop: RDropConfig = RDropConfig()
    rdrop_loss: Loss | Callable[..., ItemTerms] = "cross_entropy"
    _knows_whether_it_steps = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a class in which Lightning's own methods come before those of the mixin.

        Raises:
            TypeError: If it lists a LightningModule before the mixin.
        """
        super().__init_subclass__(**options)
        before = cls.__mro__[: cls.__mro__.index(RDropMixin)]
        if any(base.__name__ == "LightningModule" for base in before):
            bases = ", ".join(base.__name__ for base in cls.__bases__)
            raise TypeError(
                f"RDropMixin must be the first base of {cls.__name__}, got ({bases}): "
                "LightningModule would hide its training_step"
            )

    def rdrop_batch(self, batch: Any) -> tuple[Any, Any]:
        """Return what forward is given and the target; override it for batches that are no pair.

        Raises:
            TypeError: If the batch is no pair.
        """
        got = type(batch).__name__
        if isinstance(batch, (tuple, list)):
            if len(batch) == 2:
                return batch[0], batch[1]
            got += f" of {len(batch)}"
        raise TypeError(
            f"a batch must be a pair (inputs, target), got {got}: override rdrop_batch of "
            f"{type(self).__name__} to return such a pair"
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch, and log its parts.

        Where a validation calls it, it returns the NLL of one pass and logs nothing.

        Raises:
            TypeError: For options that are no RDropConfig, a batch that is no pair, and what
                `rdrop_step` refuses.
            ValueError: Under manual optimisation, without a Trainer, for a rule of alpha that
                follows a validation loss, for an alpha that is a part of a run without an end, and
                for what `rdrop_step` refuses.
        """
        if not self.automatic_optimization:
            raise ValueError(
                "automatic_optimization must be True, got False: nobody would optimise the loss "
                "that this training_step returns; call regdrop.rdrop_step in a training_step of "
                "your own"
            )
        config = self.rdrop
        if not isinstance(config, RDropConfig):
            raise TypeError(
                f"rdrop must be an RDropConfig, got {type(config).__name__}; "
                "RDropConfig.from_dict makes one of a mapping"
            )
        refuse_validation_rule(config, "a training step")
        inputs, target = self.rdrop_batch(batch)
        step, run = _read_step(self), partial(rdrop_step, self, inputs, target)
        if not self.trainer.training:
            return run(config=_without_passes(config), step=step, loss=self.rdrop_loss).loss
        self._knows_whether_it_steps = True
        total = self._total_steps()
        loss, nll, kl = run(config=config, step=step, total_steps=total, loss=self.rdrop_loss)
        plan = plan_step(config, step, total_steps=total)
        parts: dict[str, Any] = {"nll": nll}
        if plan.num_passes > 1:
            parts |= {"kl": kl, "alpha": plan.alpha}
        elif is_monitored(config, step):
            parts["kl"] = kl
        self.log_dict(parts, batch_size=_count_items(inputs, target))
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        """Warn once where the first loss of a run is not that of the mixin."""
        super().on_before_backward(loss)
        if not self._knows_whether_it_steps:
            self._knows_whether_it_steps = True
            warnings.warn(
                "R-Drop is off: the first loss is not from RDropMixin's training_step, but from "
                f"another that {type(self).__name__} has. Delete that one, or let it return "
                "super().training_step(batch, batch_idx); if it calls rdrop_step, leave RDropMixin "
                "out.",
                stacklevel=2,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the options with the checkpoint, as `rdrop`."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rdrop"] = self.rdrop.to_dict()

    def _total_steps(self) -> int | None:
        """Return the optimiser steps of the run where alpha needs them, else None."""
        if not is_part_of_run(self.rdrop):
            return None
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps < 1:
            refuse_unknown_length(
                self.rdrop,
                "Lightning knows its steps by Trainer(max_steps=...), or by max_epochs where the "
                "data has a length",
            )
        max_epochs = self.trainer.max_epochs or -1  # where max_steps alone ends the run
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if max_epochs != -1 and any(_changes_steps(x, max_epochs) for x in callbacks):
            refuse_unknown_length(
                self.rdrop,
                "a GradientAccumulationScheduler changes the steps of an epoch, so that Lightning "
                "knows those of the run by Trainer(max_steps=...) without max_epochs only",
            )
        return int(steps)


def _read_step(module: LightningModule) -> int:
    """Return the optimiser step, which a Trainer counts."""
    try:
        return module.trainer.global_step
    except (AttributeError, RuntimeError) as error:  # of Fabric, and of none at all
        raise ValueError(
            "training_step needs a Trainer, which counts the steps, and found none; in Fabric or a "
            "loop of your own call rdrop_step(model, x, y, config=model.rdrop, step=i)"
        ) from error


def _changes_steps(callback: Any, max_epochs: int) -> bool:
    """Return whether a callback accumulates other numbers of batches in other epochs of a run."""
    # Lightning has two packages of the same classes, each with classes of its own.
    packages = [sys.modules.get(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    schedulers = tuple(x.callbacks.GradientAccumulationScheduler for x in packages if x is not None)
    if not isinstance(callback, schedulers):
        return False
    return len({n for epoch, n in callback.scheduling.items() if epoch < max_epochs}) > 1


def _without_passes(config: RDropConfig) -> RDropConfig:
    """Return the options of the NLL alone."""
    return RDropConfig(
        alpha=0.0,
        num_passes=1,
        class_weight=config.class_weight,
        unlabelled_index=config.unlabelled_index,
        impl=config.impl,
    )


def _count_items(*parts: Any) -> int | None:
    """Return the size of a batch by the first of its parts that tells it."""
    for part in parts:
        try:
            return find_batch_size(part)
        except ValueError:
            continue
    return None
