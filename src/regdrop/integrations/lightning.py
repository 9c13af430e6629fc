"""R-Drop in a LightningModule: the training step, and what is logged of it."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regdrop.config import RDropConfig
from regdrop.integrations import extra
from regdrop.loss import ItemTerms
from regdrop.passes import find_batch_size
from regdrop.schedule import is_monitored, plan_step
from regdrop.step import Loss, rdrop_step

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

    def rdrop_batch(self, batch: Any) -> tuple[Any, Any]:
        """Return what forward is given and the target; override it for batches that are no pair.

        Raises:
            TypeError: If the batch is no pair.
        """
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        raise TypeError(
            f"a batch must be a pair (inputs, target), got {type(batch).__name__}: override "
            f"rdrop_batch of {type(self).__name__} to return such a pair"
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch, and log its parts.

        Raises:
            TypeError: For a batch that is no pair, and what `rdrop_step` refuses.
            ValueError: Under manual optimisation, for a rule of alpha that follows a validation
                loss, and for what `rdrop_step` refuses.
        """
        if not self.automatic_optimization:
            raise ValueError(
                "automatic_optimization must be True, got False: nobody would optimise the loss "
                "that this training_step returns; call regdrop.rdrop_step in a training_step of "
                "your own"
            )
        if self.rdrop.alpha == "auto" and self.rdrop.alpha_rule != "ramp":
            raise ValueError(
                f"alpha_rule must be 'ramp', got {self.rdrop.alpha_rule!r}: a training step sees "
                "no validation"
            )
        inputs, target = self.rdrop_batch(batch)
        step, total = self.trainer.global_step, self._total_steps()
        loss, nll, kl = rdrop_step(
            self,
            inputs,
            target,
            config=self.rdrop,
            step=step,
            total_steps=total,
            loss=self.rdrop_loss,
        )
        plan = plan_step(self.rdrop, step, total_steps=total)
        parts: dict[str, Any] = {"nll": nll}
        if plan.num_passes > 1:
            parts |= {"kl": kl, "alpha": plan.alpha}
        elif is_monitored(self.rdrop, step):
            parts["kl"] = kl
        self.log_dict(parts, batch_size=_count_items(inputs, target))
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the options with the checkpoint, as `rdrop`."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rdrop"] = self.rdrop.to_dict()

    def _total_steps(self) -> int | None:
        """Return the optimiser steps of the run where alpha needs them; None if nobody knows."""
        if self.rdrop.alpha != "auto" and self.rdrop.alpha_warmup_ratio is None:
            return None
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if math.isfinite(steps) and steps > 0 else None


def _count_items(*parts: Any) -> int | None:
    """Return the size of a batch by the first of its parts that tells it."""
    for part in parts:
        try:
            return find_batch_size(part)
        except ValueError:
            continue
    return None
