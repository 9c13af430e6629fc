"""The Hugging Face Trainer with R-Drop."""

import json
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, is_compiled_module
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from regdrop.config import RDropConfig
from regdrop.diagnostics import (
    extra_pass,
    measure_divergence,
    warn_without_dropout,
    warn_zero_divergence,
)
from regdrop.heads import Head, fraternal_head
from regdrop.integrations.transformers.batches import why_not_stacked
from regdrop.integrations.transformers.checkpoints import load_renamed_weights
from regdrop.integrations.transformers.forward import HeadForward
from regdrop.integrations.transformers.fused import find_fused_head
from regdrop.integrations.transformers.heads import base_model
from regdrop.integrations.transformers.own_loss import LossForward, OwnLoss
from regdrop.integrations.transformers.parts import LoggedParts
from regdrop.integrations.transformers.planning import StepPlanner, find_validation_loss
from regdrop.integrations.transformers.recording import RecordOptions, add_to_model_card
from regdrop.integrations.transformers.selection import HeadSelection
from regdrop.integrations.transformers.verify import check_fused_head
from regdrop.loss import ItemCounts, RDropOutput
from regdrop.loss.reduction import term_weights
from regdrop.passes import dropout_rates, embedding_noise
from regdrop.schedule import StepPlan, is_monitored
from regdrop.step import compute_step_loss

CONFIG_NAME = "rdrop_config.json"
STATE_NAME = "rdrop_state.json"
# With fewer words the logits are no larger than what a model keeps for its backward anyway.
SMALLEST_FUSED_VOCABULARY = 8192
# Hyperparameters of a search that are R-Drop's begin so: "rdrop.alpha".
_SEARCH_PREFIX = "rdrop."


class RDropTrainerMixin(HeadSelection):
    """R-Drop for a `transformers.Trainer` or a subclass of it; list it first among the bases.

    Training runs the passes that `rdrop` asks for and logs `nll`, `kl` and `alpha` beside the
    loss; evaluation and prediction run one pass and are the Trainer's own. The loss is exact
    under gradient accumulation and over several processes, also for models whose own loss is not.
    The config is saved beside every checkpoint as `rdrop_config.json`.

    The likelihood is the one that R-Drop knows for the model's class; for an unknown class the one
    of a few that agrees with the model's own loss on the first batch; else, and where a class below
    the mixin has a `compute_loss` of its own, that loss as it is (`likelihood="model"`), which is
    said.

    Args:
        rdrop: The options; `RDropConfig()` by default.
        args: Everything else is the Trainer's.

    Raises:
        TypeError: If `rdrop` is no RDropConfig.
        ValueError: For several GPUs in one process, for several forwards a step under DeepSpeed,
            or, at the first step, for a head of one's own that its terms or the model contradict.
    """

    def __init__(self, *args: Any, rdrop: RDropConfig | None = None, **kwargs: Any) -> None:
        self.rdrop = RDropConfig() if rdrop is None else rdrop
        if not isinstance(self.rdrop, RDropConfig):
            raise TypeError(f"rdrop must be an RDropConfig, got {type(rdrop).__name__}")
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"R-Drop needs one process a GPU, got {self.args.n_gpu} GPUs in one process; "
                "start it by torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES"
            )
        graded = self.rdrop.backward_passes or self.rdrop.num_passes
        if self.rdrop.passes == "sequential" or graded < self.rdrop.num_passes:
            self._require_several_forwards(f"passes={self.rdrop.passes!r} and {graded} graded")
        self._model_takes_num_items = getattr(self, "model_accepts_loss_kwargs", False)
        # The Trainer counts the items of an accumulation window only for models that ask for it;
        # R-Drop divides by them whatever the model does.
        self.model_accepts_loss_kwargs: bool = True
        self.loss_is_scaled_for_ga = True
        self._num_weight: Tensor | None = None
        self._own_num_items: Tensor | int | None = None
        self._parts = LoggedParts()
        max_steps = self.args.max_steps
        self._planner = StepPlanner(self.rdrop, max_steps if max_steps > 0 else None)
        self._resumed_state: dict[str, Any] | None = None
        self._should_restore = False
        self._is_checked = self._is_dropout_checked = self._has_warned = False
        self._is_fused = self._was_computed = False
        self._has_told_of_passes = False
        self._searched = self.rdrop
        self.callback_handler.callbacks.insert(0, RecordOptions(self))

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
            return self._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        self._was_computed = True
        step = self.state.global_step
        plan = self._planner.plan(self.rdrop, step)
        head = self._head(inputs)
        assert self._source is not None
        own = self._source.own
        self._check(model, head, plan.num_passes, own)
        if self.rdrop.method == "fraternal":
            head = fraternal_head(head)
        forward = self._forward(model, head, own, return_outputs)
        monitored = plan.num_passes == 1 and is_monitored(self.rdrop, step)
        other = extra_pass(model, forward, head.inputs) if monitored else None
        with self._noise(model, head, plan.num_passes):
            result = compute_step_loss(
                forward,
                head.inputs,
                head.target,
                forward.terms,
                self._step_config(head, own, plan),
                plan,
                num_items=num_items_in_batch,
                num_weight=None if num_items_in_batch is None else self._num_weight,
                batch_size=head.rows,
                loss=forward.loss,
            )
        # Fraternal dropout's divergence is no KL.
        is_kl = plan.num_passes > 1 and self.rdrop.method != "fraternal"
        kl = result.kl if is_kl else None
        if other is not None:
            kl = measure_divergence(forward.last_read, other, head.target, forward.terms)
        if isinstance(forward, LossForward):
            loss = self._add_own_loss(forward, result, plan, kl, num_items_in_batch)
        else:
            self._note(plan, result.nll, kl, head.counts())
            loss = result.loss + forward.auxiliary_loss(self.rdrop, num_items_in_batch)
            loss = loss * self._gradient_shares(num_items_in_batch)
        return (loss, forward.last_output) if return_outputs else loss

    def _evaluation_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Any
    ) -> Any:
        """Compute the loss of one pass as the Trainer does, a mean over the batch of this process.

        The Trainer gives the number of items of all processes to every model, and then multiplies
        the loss by the number of processes also for models that do not divide by it.
        """
        owner = self._loss_owner()
        own = None if self._source is None else self._source.own
        is_counting = owner is not None and (
            self._model_takes_num_items or self.compute_loss_func is not None
        )
        if owner is not None and own is not None:
            is_counting = own.counts_items
        return self._compute_without_rdrop(
            model, inputs, return_outputs, num_items if is_counting else None
        )

    def _forward(
        self, model: nn.Module, head: Head, own: OwnLoss | None, return_outputs: bool
    ) -> HeadForward | LossForward:
        """Return the micro-batch as a function from inputs to what the loss reads."""
        if own is not None:
            num_items = self._own_num_items if own.counts_items else None
            return LossForward(partial(self._own_loss, model), head, num_items)
        # Who asks for the outputs wants their logits.
        is_fused = self._is_fused and not return_outputs
        return HeadForward(
            model,
            head,
            may_overwrite=not return_outputs,
            fused=find_fused_head(self._bare(model)) if is_fused else None,
            impl=self.rdrop.impl,
        )

    def _step_config(self, head: Head, own: OwnLoss | None, plan: StepPlan) -> RDropConfig:
        """Return the options of a step: passes run one by one where a batch cannot be stacked."""
        config = self.rdrop
        if plan.num_passes == 1 or (config.passes == "sequential" and config.fraction == 1):
            return config
        assert self._source is not None
        reason = self._source.obstacle or why_not_stacked(head.inputs, head.rows)
        if self._source.obstacle is None and reason and self.accelerator.num_processes > 1:
            raise ValueError(
                f"passes must be 'sequential' on several processes where {reason}, and the first "
                "batch did not show it: processes would run other numbers of forwards"
            )
        if own is not None and not own.is_rowwise:
            reason = "the loss of its rows is none of each row by itself"
        if reason is not None and config.fraction < 1:
            raise ValueError(
                f"fraction={config.fraction} takes some rows of a batch, and here {reason}; use "
                "fraction=1.0"
            )
        # A part of the batch has no place in the mean of a loss that somebody else computes.
        if reason is None and (own is None or config.fraction == 1):
            return config
        if reason is not None:
            self._require_several_forwards(f"a batch that cannot be stacked: {reason}")
            # Of a loss whose rows depend on each other that has been said.
            # Once: the numbers of rows may be others in each batch.
            if not self._has_told_of_passes and (own is None or own.is_rowwise):
                self._has_told_of_passes = True
                self._tell(f"passes run one after the other, not stacked: {reason}")
        return replace(config, passes="sequential")

    def _add_own_loss(
        self,
        forward: LossForward,
        result: RDropOutput,
        plan: StepPlan,
        kl: Tensor | None,
        num_items: Tensor | int | None,
    ) -> Tensor:
        """Return the loss of a micro-batch from the own loss of its passes and the divergence."""
        likelihood = forward.likelihood(self.rdrop.fraction < 1)
        batches = getattr(self, "current_gradient_accumulation_steps", 1)
        divergence = result.loss * self._gradient_shares(num_items)
        if num_items is None:
            divergence = result.loss / batches
        counts = forward.head.counts()
        weight = torch.ones((), device=likelihood.device)
        nll = likelihood.detach()
        if forward.counts_items:
            # It is a share of the window's mean; the window's items are shared out alike.
            nll = nll * batches
        else:
            likelihood = likelihood / batches
        self._note(plan, nll, kl, ItemCounts(weight, counts.kl))
        factor = plan.factor
        if plan.num_passes > 1:
            factor = term_weights(plan.alpha, plan.num_passes, self.rdrop.scale)[0]
        return likelihood * factor + divergence

    def _note(self, plan: StepPlan, nll: Tensor, kl: Tensor | None, counts: ItemCounts) -> None:
        self._parts.add(plan, nll, kl, counts)
        self._planner.add(plan, nll, kl, counts)

    def _gradient_shares(self, num_items: Tensor | int | None) -> int:
        """Return over how many processes gradients are averaged that were counted together."""
        if num_items is None or not self.args.average_tokens_across_devices:
            return 1
        return int(self.accelerator.num_processes // self.get_tp_size())

    def _require_several_forwards(self, what: str) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed takes one forward for each backward: R-Drop needs passes='stacked' and "
                f"backward_passes=None there, got {what}"
            )

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run one micro-batch forward and backward, with each pass's dropout rate in force."""
        rates = self.rdrop.dropout_rates
        context: AbstractContextManager[None] = nullcontext()
        plan = self._planner.plan(self.rdrop, self.state.global_step)
        if rates is not None and plan.num_passes > 1:
            # Where passes are not treated alike, chance decides which rate each of them gets.
            shuffled = [rates[i] for i in torch.randperm(len(rates)).tolist()]
            context = dropout_rates(self._bare(model), shuffled)
        self._was_computed = False
        with context:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._was_computed:
            raise ValueError(
                f"{type(self).__name__} must call RDropTrainerMixin.compute_loss, and a class "
                "before the mixin has a compute_loss that does not. Put it into a subclass of "
                "Trainer, OwnTrainer, and list RDropTrainerMixin first: "
                "class OwnRDropTrainer(RDropTrainerMixin, OwnTrainer)"
            )
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect an accumulation window, and count its items and their weight over all ranks."""
        samples, self._own_num_items = super().get_batch_samples(
            epoch_iterator, num_batches, device
        )
        if not samples:
            return samples, self._own_num_items
        counts = [self._head(sample).counts() for sample in samples]
        pairs = [torch.stack([nll.float(), kl.float()]) for nll, kl in counts]
        totals = torch.stack(pairs).sum(0).to(device)
        if self.args.average_tokens_across_devices:
            totals = self.accelerator.reduce(totals, reduction="sum") / self.get_tp_size()
        self._num_weight, num_items = totals.unbind()
        return samples, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside a training loss also its parts, means over the items since the last log."""
        if "loss" in logs and not self._parts.is_empty:
            parts = self._parts.collect(self.accelerator.reduce)
            # In its first step a new LoRA adapter is zero, and so is the divergence.
            if parts.get("kl") == 0.0 and self.state.global_step > 1 and not self._has_warned:
                warn_zero_divergence()
                self._has_warned = True
            if self.rdrop.single_pass_below is not None:
                parts["passes"] = self._planner.collect_passes()
            logs = {**logs, **parts}
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, beside it, the R-Drop config; in checkpoints also its state."""
        super().save_model(output_dir, _internal_call)
        state = self._state() if _internal_call else None
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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load these, and R-Drop's state: DeepSpeed does not call `_load_from_checkpoint`."""
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_state = None
        if checkpoint is None or not self.accelerator.is_main_process:
            return
        state = Path(checkpoint) / STATE_NAME
        if state.exists():
            self._resumed_state = json.loads(state.read_text(encoding="utf-8"))

    def _state(self) -> dict[str, Any]:
        reduce = self.accelerator.reduce
        return {**self._parts.state(reduce), "planner": self._planner.state(reduce)}

    def begin_training(self) -> None:
        """Begin the logged parts and the rule of alpha anew, or as a checkpoint has them.

        An attempt that `auto_find_batch_size` gave up has left its own.
        """
        self._parts = LoggedParts()
        self._planner = StepPlanner(self.rdrop, self.state.max_steps)
        if self.rdrop.alpha_rule == "restore" and not self.args.load_best_model_at_end:
            raise ValueError(
                "alpha_rule='restore' goes back to the best checkpoint: it needs "
                "load_best_model_at_end=True in the Trainer's arguments, got False"
            )
        has_validation = self.eval_dataset is not None and self.args.eval_strategy != "no"
        if self._planner.reads_validation and not has_validation:
            self._follow_ramp("no evaluation during training")
        if not self.state.global_step:
            return
        is_main = self.accelerator.is_main_process
        if is_main and self._resumed_state is not None:
            self._parts.load(self._resumed_state, self.args.device)
        held = [(self._resumed_state or {}).get("planner")]
        if self.accelerator.num_processes > 1:
            held = broadcast_object_list(held)
        if held[0] is not None:
            read_validation = self._planner.reads_validation
            self._planner.load(held[0], self.args.device, is_main)
            if read_validation and not self._planner.reads_validation:
                self._follow_ramp("none in the run so far")

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Evaluate in training; a rule of alpha reads the loss that comes out."""
        metrics: dict[str, float] = super()._evaluate(
            trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler
        )
        # An evaluation before the first step, which skips the schedule of the learning rate, would
        # count a second time where a run goes on.
        if not self._planner.reads_validation or skip_scheduler:
            return metrics
        loss = find_validation_loss(metrics, self.eval_dataset)
        if self.accelerator.num_processes > 1:
            [loss] = broadcast_object_list([loss])
        if loss is None:
            self._follow_ramp(f"no loss among {', '.join(metrics)}, which the evaluation gave")
            return metrics
        step = self.state.global_step - 1
        self._should_restore = self._planner.observe(step, loss, self.accelerator.reduce)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Note the best figure; weights that do not have it give way to those of the checkpoint.

        That is before the checkpoint is written: one with the best figure keeps its own weights.
        """
        is_best: bool = super()._determine_best_metric(metrics, trial)
        if self._should_restore and not is_best and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self._should_restore = False
        return is_best

    def _follow_ramp(self, reason: str) -> None:
        assert self._planner.controller is not None
        self._planner.controller.follow_ramp()
        self._tell(
            f"alpha_rule={self.rdrop.alpha_rule!r} follows the validation loss, and there is "
            f"{reason}: alpha follows the ramp to {self.rdrop.alpha_max:g}"
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's model card, with the R-Drop options among its hyperparameters."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_model_card(Path(self.args.output_dir or ".") / "README.md", self.rdrop)

    def _hp_search_setup(self, trial: Any) -> None:
        """Take R-Drop's hyperparameters of a trial, such as "rdrop.alpha"; leave the others."""
        if trial is None:
            return super()._hp_search_setup(trial)
        space: Any = getattr(self, "hp_space", None)
        params = dict(space(trial) if _is_optuna(trial) and space else trial)
        own = {name: value for name, value in params.items() if name.startswith(_SEARCH_PREFIX)}
        options = {name.removeprefix(_SEARCH_PREFIX): value for name, value in own.items()}
        # What a trial does not name is as it was given, not as another trial had it; its model may
        # be another too.
        self.rdrop = RDropConfig.from_dict({**self._searched.to_dict(), **options})
        self._source, self._is_checked = None, False
        rest = {name: value for name, value in params.items() if name not in own}
        self.hp_space = lambda _: rest
        try:
            super()._hp_search_setup(trial if _is_optuna(trial) else rest)
        finally:
            self.hp_space = space
            self._trial = trial

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

    def _check(self, model: nn.Module, head: Head, num_passes: int, own: OwnLoss | None) -> None:
        """Before the first step, choose how the last layer is computed; warn without dropout."""
        if not self._is_checked:
            self._is_checked = True
            self._is_fused = own is None and self._can_fuse(model, head)
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
            if self._splits_parameters() or self.get_tp_size() > 1:
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


def _is_optuna(trial: Any) -> bool:
    return not isinstance(trial, dict) and hasattr(trial, "suggest_float")


class RDropTrainer(RDropTrainerMixin, Trainer):
    """`transformers.Trainer` with R-Drop: the same arguments, and `rdrop=RDropConfig(...)`."""


class RDropSeq2SeqTrainer(RDropTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with R-Drop: the same, and `rdrop=RDropConfig(...)`."""


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
