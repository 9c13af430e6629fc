"""The Hugging Face Trainer with R-Drop."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from regdrop.config import RDropConfig
from regdrop.diagnostics import (
    extra_pass,
    measure_divergence,
    warn_without_dropout,
    warn_zero_divergence,
)
from regdrop.integrations.transformers.checkpoints import load_renamed_weights
from regdrop.integrations.transformers.heads import Head, find_head
from regdrop.passes import dropout_rates
from regdrop.schedule import StepPlan, is_monitored, plan_step
from regdrop.step import compute_step_loss

CONFIG_NAME = "rdrop_config.json"

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class RDropTrainerMixin(_Base):
    """R-Drop for a `transformers.Trainer` or a subclass of it; list it first among the bases.

    Training runs the passes that `rdrop` asks for and logs `nll`, `kl` and `alpha` beside the
    loss; evaluation and prediction run one pass and are the Trainer's own. The loss is exact
    under gradient accumulation and over several processes, also for models whose own loss is not.
    The config is saved beside every checkpoint as `rdrop_config.json`.

    Args:
        rdrop: The options; `RDropConfig()` by default.
        args: Everything else is the Trainer's.

    Raises:
        TypeError: If `rdrop` is no RDropConfig.
        ValueError: For a `compute_loss_func`, for several GPUs in one process, or, at the first
            step, for a model whose loss R-Drop does not know.
    """

    def __init__(self, *args: Any, rdrop: RDropConfig | None = None, **kwargs: Any) -> None:
        self.rdrop = RDropConfig() if rdrop is None else rdrop
        if not isinstance(self.rdrop, RDropConfig):
            raise TypeError(f"rdrop must be an RDropConfig, got {type(rdrop).__name__}")
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func must be None: R-Drop computes the loss")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"R-Drop needs one process a GPU, got {self.args.n_gpu} GPUs in one process; "
                "start it by torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES"
            )
        self._model_counts_items: bool = getattr(self, "model_accepts_loss_kwargs", False)
        # The Trainer counts the items of an accumulation window only for models that ask for it;
        # R-Drop divides by them whatever the model does.
        self.model_accepts_loss_kwargs: bool = True
        self._num_weight: Tensor | None = None
        self._parts = _LoggedParts()
        self._is_checked = self._has_warned = False

    def rdrop_head(self, model: nn.Module, labels: Tensor) -> Head:
        """Return the terms of the loss for the unwrapped model; override it for another head."""
        return find_head(
            model,
            labels,
            label_smoothing=self.args.label_smoothing_factor,
            class_weight=self.rdrop.class_weight,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss; with R-Drop in training, as the Trainer does in evaluation.

        With `return_outputs` in training, the outputs are those of the last forward, stacked.
        """
        if not model.training:
            return super().compute_loss(
                model,
                inputs,
                return_outputs,
                num_items_in_batch if self._model_counts_items else None,
            )
        step = self.state.global_step
        plan = plan_step(self.rdrop, step)
        batch = dict(inputs)
        labels = self._pop_labels(batch)
        head = self.rdrop_head(self.accelerator.unwrap_model(model), labels)
        if plan.num_passes > 1 and not self._is_checked:
            self._has_warned = warn_without_dropout(model)
            self._is_checked = True
        last_output: Any = None

        def forward(items: dict[str, Any]) -> Tensor:
            nonlocal last_output
            last_output = model(**items)
            return head.outputs(last_output)

        monitored = plan.num_passes == 1 and is_monitored(self.rdrop, step)
        other = extra_pass(model, forward, batch) if monitored else None
        result = compute_step_loss(
            forward,
            batch,
            head.target,
            head.terms,
            self.rdrop,
            plan,
            num_items=num_items_in_batch,
            num_weight=self._num_weight,
            batch_size=labels.shape[0],
        )
        kl = result.kl if plan.num_passes > 1 else None
        if other is not None:
            kl = measure_divergence(head.outputs(last_output), other, head.target, head.terms)
        self._parts.add(plan, result.nll, kl, head)
        loss = result.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over the processes, the items were counted over all.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, last_output) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run one micro-batch forward and backward, with each pass's dropout rate in force."""
        rates = self.rdrop.dropout_rates
        if rates is None or plan_step(self.rdrop, self.state.global_step).num_passes == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        # Where passes are not treated alike, chance decides which rate each of them gets.
        shuffled = [rates[i] for i in torch.randperm(len(rates)).tolist()]
        with dropout_rates(self.accelerator.unwrap_model(model), shuffled):
            return super().training_step(model, inputs, num_items_in_batch)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect an accumulation window; count its items and, with class weights, their weight."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_weight = None
        if self.rdrop.class_weight is not None and num_items is not None:
            model = self.accelerator.unwrap_model(self.model)
            heads = [self.rdrop_head(model, sample["labels"]) for sample in samples]
            total = torch.stack([head.total_weight() for head in heads]).sum().to(device)
            if self.args.average_tokens_across_devices:
                total = self.accelerator.gather(total).sum() / self.get_tp_size()
            self._num_weight = total
        return samples, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside a training loss also its parts, means over the items since the last log."""
        if "loss" in logs and not self._parts.is_empty:
            parts = self._parts.collect(self.accelerator.reduce)
            # In its first step a new LoRA adapter is zero, and so is the divergence.
            if parts.get("kl") == 0.0 and self.state.global_step > 1 and not self._has_warned:
                warn_zero_divergence()
                self._has_warned = True
            logs = {**logs, **parts}
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, beside it, the R-Drop config."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            text = json.dumps(self.rdrop.to_dict(), indent=2) + "\n"
            (folder / CONFIG_NAME).write_text(text, encoding="utf-8")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_renamed(self, checkpoint: str | None) -> bool:
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        return self.model is not None and load_renamed_weights(self.model, checkpoint)

    def _pop_labels(self, batch: dict[str, Any]) -> Tensor:
        labels = batch.pop("labels", None)
        if not isinstance(labels, Tensor):
            raise ValueError(f"inputs must hold a tensor named 'labels', got {sorted(batch)}")
        return labels


class RDropTrainer(RDropTrainerMixin, Trainer):
    """`transformers.Trainer` with R-Drop: the same arguments, and `rdrop=RDropConfig(...)`."""


class _LoggedParts:
    """The parts of the loss since the last log, summed on the device over items."""

    def __init__(self) -> None:
        self.alpha = 0.0
        self.sums: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self.sums is None

    def add(self, plan: StepPlan, nll: Tensor, kl: Tensor | None, head: Head) -> None:
        """Add the means of a micro-batch, each times what it is a mean over."""
        weight, count = head.total_weight(), head.num_items()
        if kl is None:
            kl, count = torch.zeros_like(nll), torch.zeros_like(count)
        sums = torch.stack([nll * weight, weight, kl * count, count]).float()
        self.sums = sums if self.sums is None else self.sums + sums
        if plan.num_passes > 1:
            self.alpha = plan.alpha

    def collect(self, reduce: Any) -> dict[str, float]:
        nll, count, kl, kl_count = reduce(self.sums, reduction="sum").tolist()
        self.sums = None
        parts = {"nll": nll / max(count, 1), "alpha": self.alpha}
        return parts | ({"kl": kl / kl_count} if kl_count else {})
