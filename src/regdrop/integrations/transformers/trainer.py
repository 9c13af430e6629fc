"""The Hugging Face Trainer with R-Drop."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from regdrop.config import RDropConfig
from regdrop.diagnostics import (
    extra_pass,
    measure_divergence,
    warn_without_dropout,
    warn_zero_divergence,
)
from regdrop.integrations.transformers.checkpoints import load_renamed_weights
from regdrop.integrations.transformers.forward import HeadForward
from regdrop.integrations.transformers.fused import find_fused_head
from regdrop.integrations.transformers.heads import Head, base_model, find_head, fraternal_head
from regdrop.integrations.transformers.parts import LoggedParts
from regdrop.integrations.transformers.verify import check_fused_head, check_own_loss
from regdrop.passes import dropout_rates, embedding_noise
from regdrop.schedule import is_monitored, plan_step
from regdrop.step import compute_step_loss

CONFIG_NAME = "rdrop_config.json"
STATE_NAME = "rdrop_state.json"
# With fewer words the logits are no larger than what a model keeps for its backward anyway.
SMALLEST_FUSED_VOCABULARY = 8192

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
        ValueError: For a `compute_loss_func`, for several GPUs in one process, for several
            forwards a step under DeepSpeed, or, at the first step, for a model whose loss is
            another than R-Drop's.
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
        graded = self.rdrop.backward_passes or self.rdrop.num_passes
        if self.is_deepspeed_enabled and (
            self.rdrop.passes == "sequential" or graded < self.rdrop.num_passes
        ):
            raise ValueError(
                "DeepSpeed takes one forward for each backward: R-Drop needs passes='stacked' and "
                f"backward_passes=None there, got {self.rdrop.passes!r} and {graded}"
            )
        self._model_counts_items: bool = getattr(self, "model_accepts_loss_kwargs", False)
        # The Trainer counts the items of an accumulation window only for models that ask for it;
        # R-Drop divides by them whatever the model does.
        self.model_accepts_loss_kwargs: bool = True
        self._num_weight: Tensor | None = None
        self._parts = LoggedParts()
        self._is_loss_checked = self._is_dropout_checked = self._has_warned = False
        self._is_fused = False

    def rdrop_head(self, model: nn.Module, inputs: Mapping[str, Any]) -> Head:
        """Return how a batch with its labels enters the unwrapped model, and its outputs the loss.

        Override it for a head that is not known, or a loss of your own.
        """
        return find_head(
            model,
            inputs,
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
            count = num_items_in_batch if self._model_counts_items else None
            return super().compute_loss(model, inputs, return_outputs, count)
        step = self.state.global_step
        plan = plan_step(self.rdrop, step)
        head = self.rdrop_head(self._bare(model), inputs)
        self._check(model, head, inputs, plan.num_passes)
        if self.rdrop.method == "fraternal":
            head = fraternal_head(head)
        # Who asks for the outputs wants their logits.
        is_fused = self._is_fused and not return_outputs
        fused = find_fused_head(self._bare(model)) if is_fused else None
        forward = HeadForward(
            model,
            head,
            may_overwrite=not return_outputs,
            fused=fused,
            impl=self.rdrop.impl,
        )
        monitored = plan.num_passes == 1 and is_monitored(self.rdrop, step)
        other = extra_pass(model, forward, head.inputs) if monitored else None
        with self._noise(model, head, plan.num_passes):
            result = compute_step_loss(
                forward,
                head.inputs,
                head.target,
                forward.terms,
                self.rdrop,
                plan,
                num_items=num_items_in_batch,
                num_weight=None if num_items_in_batch is None else self._num_weight,
                batch_size=head.target.shape[0],
                loss=forward.loss,
            )
        # Fraternal dropout's divergence is no KL.
        is_kl = plan.num_passes > 1 and self.rdrop.method != "fraternal"
        kl = result.kl if is_kl else None
        if other is not None:
            kl = measure_divergence(forward.last_read, other, head.target, forward.terms)
        self._parts.add(plan, result.nll, kl, head)
        loss = result.loss + forward.auxiliary_loss(self.rdrop, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over the processes, the items were counted over all.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, forward.last_output) if return_outputs else loss

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
        with dropout_rates(self._bare(model), shuffled):
            return super().training_step(model, inputs, num_items_in_batch)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect an accumulation window, and count its items and their weight over all ranks."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, num_items
        model = self._bare(self.model)
        heads = [self.rdrop_head(model, sample) for sample in samples]
        counts = [(head.num_items().float(), head.total_weight().float()) for head in heads]
        totals = torch.stack([torch.stack(pair) for pair in counts]).sum(0).to(device)
        if self.args.average_tokens_across_devices:
            totals = self.accelerator.reduce(totals, reduction="sum") / self.get_tp_size()
        count, self._num_weight = totals.unbind()
        return samples, count

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
        """Save the model and, beside it, the R-Drop config; in checkpoints also its state."""
        super().save_model(output_dir, _internal_call)
        state = self._parts.state(self.accelerator.reduce) if _internal_call else None
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            _write(folder / CONFIG_NAME, self.rdrop.to_dict())
            if state is not None:
                _write(folder / STATE_NAME, state)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = Path(resume_from_checkpoint) / STATE_NAME
        if self.accelerator.is_main_process and state.exists():
            self._parts.load(json.loads(state.read_text(encoding="utf-8")), self.args.device)

    def _load_best_model(self) -> None:
        if not self._load_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_renamed(self, checkpoint: str | None) -> bool:
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        return self.model is not None and load_renamed_weights(self.model, checkpoint)

    def _noise(self, model: nn.Module, head: Head, num_passes: int) -> AbstractContextManager[None]:
        if self.rdrop.method != "r3f" or num_passes == 1:
            return nullcontext()
        bare: Any = self._bare(model)
        reader = bare.get_encoder() if bare.config.is_encoder_decoder else bare
        embedding = reader.get_input_embeddings()
        return embedding_noise(embedding, head.target.shape[0], self.rdrop.noise)

    def _bare(self, model: Any) -> nn.Module:
        """Return the model without what distribution and compilation wrap around it."""
        bare: nn.Module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return bare

    def _check(
        self, model: nn.Module, head: Head, inputs: Mapping[str, Any], num_passes: int
    ) -> None:
        """Refuse another loss than the model's own before the first step, and warn once."""
        if not self._is_loss_checked:
            self._is_loss_checked = True
            is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            if type(self).rdrop_head is RDropTrainerMixin.rdrop_head and not is_sharded:
                check_own_loss(self._bare(model), inputs)
            self._is_fused = self._can_fuse(model, head)
        is_noisy = self.rdrop.method == "r3f" and self.rdrop.noise > 0
        if num_passes > 1 and not is_noisy and not self._is_dropout_checked:
            self._is_dropout_checked = True
            self._has_warned = warn_without_dropout(model)

    def _can_fuse(self, model: nn.Module, head: Head) -> bool:
        """Return whether the loss takes the last layer over; tell where it should and cannot."""
        wanted = self.rdrop.fused_linear
        if wanted == "auto":
            wanted = (head.vocabulary or 0) >= SMALLEST_FUSED_VOCABULARY
        # Fraternal dropout compares logits, and the eager form keeps them.
        if not wanted or self.rdrop.method == "fraternal" or self.rdrop.impl == "eager":
            return False
        try:
            if head.vocabulary is None:
                raise ValueError("its head is not one linear layer over a vocabulary")
            if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.get_tp_size() > 1:
                raise ValueError("its last layer is spread over processes")
            if self.args.torch_compile or is_compiled_module(model):
                raise ValueError("it is compiled")
            check_fused_head(self._bare(model), head)
        except ValueError as error:
            name = type(base_model(self._bare(model))).__name__
            if self.rdrop.fused_linear is True:
                raise ValueError(f"fused_linear=True does not work for {name}: {error}") from error
            warnings.warn(
                f"the last layer of {name} and the loss are not computed in one: {error}. "
                "Training is the same and needs memory for all logits; fused_linear=False says so.",
                stacklevel=2,
            )
            return False
        return True


class RDropTrainer(RDropTrainerMixin, Trainer):
    """`transformers.Trainer` with R-Drop: the same arguments, and `rdrop=RDropConfig(...)`."""


class RDropSeq2SeqTrainer(RDropTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with R-Drop: the same, and `rdrop=RDropConfig(...)`."""


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
