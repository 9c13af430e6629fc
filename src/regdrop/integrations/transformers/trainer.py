"""The Hugging Face Trainer with R-Drop: what one micro-batch computes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from regdrop.config import RDropConfig
from regdrop.cost import full_step_cost
from regdrop.divergence_watch import warn_without_dropout
from regdrop.extra_pass import extra_pass, measure_divergence
from regdrop.heads import Head, fraternal_head
from regdrop.integrations.transformers.forward.batches import why_not_stacked
from regdrop.integrations.transformers.forward.fusing import chooses_fused
from regdrop.integrations.transformers.forward.last_layer import FusedHead, find_fused_head
from regdrop.integrations.transformers.forward.micro_batch import (
    Window,
    fused_terms,
    read_logits_of,
    read_states_of,
    weigh_expert_loss,
)
from regdrop.integrations.transformers.internals import require_internals
from regdrop.integrations.transformers.likelihood.own_loss import (
    OwnLoss,
    divergence_terms,
    read_own_loss,
)
from regdrop.integrations.transformers.run.planning import StepPlanner
from regdrop.integrations.transformers.run.recording import RecordOptions
from regdrop.integrations.transformers.run.state import RunState
from regdrop.loss import ItemCounts, LossFunction, RDropOutput, TermsFunction
from regdrop.loss.reduction import term_weights
from regdrop.meter import LossMeter
from regdrop.passes import dropout_rates, embedding_noise, find_dropout
from regdrop.reading import (
    Reading,
    check_implementation,
    head_terms,
    join_readings,
    may_overwrite,
    refuse_second_gradient,
)
from regdrop.schedule import StepPlan, is_monitored
from regdrop.step_passes import compute_passes_loss, run_step_passes

# Steps at which a model is asked whether it still has the last layer that the first batch showed.
_LATER_LOOKS = (1, 10, 100, 1000)


# The Trainer passes None where it has no number; a step of one's own that divides passes nothing.
_NOT_GIVEN: Any = object()


class RDropTrainerMixin(RunState):
    """R-Drop for a `transformers.Trainer` or a subclass of it; list it first among the bases.

    Training runs the passes that `rdrop` asks for and logs `nll`, `kl` and `alpha` beside the
    loss; evaluation and prediction run one pass and are the Trainer's own. The loss is exact
    under gradient accumulation and over several processes, also for models whose own loss is not.
    The config is saved beside every checkpoint as `rdrop_config.json`.

    The NLL is the one that R-Drop knows for the model's class; for an unknown class the one
    of a few that agrees with the model's own loss on the first batch; else, and where a class below
    the mixin has a `compute_loss` of its own, that loss as it is (`likelihood="model"`), which is
    said.

    Args:
        rdrop: The options; `RDropConfig()` by default.
        args: Everything else is the Trainer's.

    Raises:
        TypeError: If `rdrop` is no RDropConfig.
        RuntimeError: For a version of transformers that has other names than those used here.
        ValueError: For several GPUs in one process, for several forwards a step under DeepSpeed,
            or, at the first step, for a head of one's own that its terms or the model contradict.
    """

    def __init__(self, *args: Any, rdrop: RDropConfig | None = None, **kwargs: Any) -> None:
        require_internals()
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
            self._refuse_several_forwards(f"passes={self.rdrop.passes!r} and {graded} graded")
        self._take_over_counting()
        self._meter = LossMeter()
        max_steps = self.args.max_steps
        self._planner = StepPlanner(self.rdrop, max_steps if max_steps > 0 else None)
        self._is_fused = self._was_computed = False
        self._is_in_step = self._is_asked_by_trainer = False
        self._given_rdrop = self.rdrop
        self.callback_handler.callbacks.insert(0, RecordOptions(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = _NOT_GIVEN,
    ) -> Any:
        """Compute the loss; with R-Drop in training, as the Trainer does in evaluation.

        Training is a training step, and a model in training mode whose gradient is asked for.

        With `return_outputs` in training, the outputs are those of the forward with pass 0, of
        stacked passes all of them.

        Without `num_items_in_batch` the loss is the mean of the micro-batch: a `training_step` of
        one's own divides it by the micro-batches, as it does without R-Drop.
        """
        is_given = num_items_in_batch is not _NOT_GIVEN
        num_items = num_items_in_batch if is_given else None
        is_training = self._is_in_step or (model.training and torch.is_grad_enabled())
        if not is_training:
            return self._evaluation_loss(model, inputs, return_outputs, num_items)
        self._was_computed = True
        step = self.state.global_step
        plan = self._planner.plan(self.rdrop, step)
        head = self._head(inputs)
        assert self._source is not None
        own = self._source.own
        self._look_again(step)
        self._check(model, head, plan.num_passes, own)
        self._check_counts(head)
        if self.rdrop.method == "fraternal":
            head = fraternal_head(head)

        window = self._window(own, num_items, self._divides_here(is_given))
        read = self._reader(model, head, own, window, return_outputs)
        is_measured_apart = plan.num_passes == 1 and is_monitored(self.rdrop, step)
        other = extra_pass(model, read, head.inputs) if is_measured_apart else None
        config = self._step_config(head, own, plan)
        if plan.num_passes > 1 and config.passes == "sequential":
            self._refuse_unused_parameters(model)
        with self._noise(model, plan.num_passes):
            passes = run_step_passes(
                *(read, head.inputs, head.target, config, plan),
                batch_size=head.rows,
                join=join_readings,
            )
        reading: Reading = passes.outputs

        overwrites = own is None and reading.projection is None and not return_outputs
        if overwrites:
            unwrapped = self._unwrapped(model)
            overwrites = may_overwrite(unwrapped, head, self.rdrop.impl, reading.scores)
        terms, loss_function = self._terms(head, own, reading, overwrites)
        result = compute_passes_loss(
            *(passes._replace(outputs=reading.scores), head.target, terms, config, plan),
            num_items=window.num_items,
            num_weight=None if window.num_items is None else self._num_weight,
            loss=loss_function,
        )
        if overwrites:
            refuse_second_gradient(result.loss)
        # Fraternal dropout's divergence is no KL.
        is_kl = plan.num_passes > 1 and self.rdrop.method != "fraternal"
        kl = result.kl if is_kl else None
        if other is not None:
            kl = measure_divergence(reading.scores, other.scores, head.target, terms)

        if own is None:
            self._note_step(plan, result.nll, kl, head.counts())
            loss = window.scale(result.loss + weigh_expert_loss(reading, head, self.rdrop, window))
        else:
            loss = self._add_own_loss(head, reading, result, plan, kl, window)
        self._note_reading(inputs, head, reading)
        return (loss, reading.output) if return_outputs else loss

    def compute_loss_context_manager(self) -> ExitStack:
        """Return the Trainer's context, in which its own `training_step` asks for the loss."""
        context = super().compute_loss_context_manager()
        context.callback(setattr, self, "_is_asked_by_trainer", self._is_asked_by_trainer)
        self._is_asked_by_trainer = self._is_in_step
        return context

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

    def _divides_here(self, is_given: bool) -> bool:
        """Return whether the loss is divided here, or by a `training_step` of one's own.

        The Trainer's own leaves it to the loss. The number of items that it gives may not be handed
        on by the `compute_loss` of a subclass.
        """
        is_overridden = type(self).compute_loss is not RDropTrainerMixin.compute_loss
        return self._is_asked_by_trainer and (is_given or is_overridden)

    def _look_again(self, step: int) -> None:
        """At some later steps, look at the last layer anew: what follows it may act by now."""
        if step in _LATER_LOOKS and step != self._looked_at:
            self._looked_at = step
            self._is_checked = self._is_checked and not self._is_fused

    def _check(self, model: nn.Module, head: Head, num_passes: int, own: OwnLoss | None) -> None:
        """Before the first step, choose how the last layer is computed; warn without dropout."""
        if not self._is_checked:
            self._is_checked = True
            is_alone = len(self._sources) == 1  # a batch of another kind has another last layer
            self._is_fused = own is None and is_alone and chooses_fused(self, model, head)
        if own is None:
            check_implementation(head, self.rdrop.impl)
        is_noisy = self.rdrop.method == "r3f" and self.rdrop.noise > 0
        if num_passes > 1 and not is_noisy and not self._is_dropout_checked:
            self._is_dropout_checked = True
            self._has_warned = warn_without_dropout(model)

    def _reader(
        self,
        model: nn.Module,
        head: Head,
        own: OwnLoss | None,
        window: Window,
        return_outputs: bool,
    ) -> Callable[[dict[str, Any]], Reading]:
        """Return a function from the inputs of some passes to what the loss reads of them."""
        if own is not None:
            return partial(read_own_loss, partial(self._own_loss, model), head, window.own_items)
        # Who asks for the outputs wants their logits.
        if self._is_fused and not return_outputs:
            fused = self._find_fused_head(model)
            if fused is not None:
                return partial(read_states_of, model, fused)
        assert self._source is not None
        # What a recipe agreed with had no other part.
        return partial(read_logits_of, model, head, self._source.recipe is None)

    def _find_fused_head(self, model: nn.Module) -> FusedHead | None:
        """Return the last layer that the loss takes over; None where it has become another."""
        try:
            return find_fused_head(self._unwrapped(model))
        except ValueError as error:
            if self.rdrop.fused_linear is True:
                raise
            self._is_fused = False
            self._tell(f"from this step on the logits are computed: {error}")
            return None

    def _terms(
        self, head: Head, own: OwnLoss | None, reading: Reading, overwrites: bool
    ) -> tuple[TermsFunction, LossFunction | None]:
        """Return the terms of what was read, and the loss where it is cheaper than its terms."""
        if own is not None:
            return divergence_terms(head), None
        if reading.projection is not None:
            return fused_terms(head, reading.projection._replace(impl=self.rdrop.impl))
        return head_terms(head, self.rdrop.impl, overwrites), None

    def _note_reading(self, inputs: dict[str, Any], head: Head, reading: Reading) -> None:
        """See what the loss of a micro-batch read, for a subclass that has metrics of its own."""

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
            self._refuse_several_forwards(f"a batch that cannot be stacked: {reason}")
            # Of a loss whose rows depend on each other that has been said.
            # Once: the numbers of rows may be others in each batch.
            if not self._has_told_of_passes and (own is None or own.is_rowwise):
                self._has_told_of_passes = True
                self._tell(f"passes run one after the other, not stacked: {reason}")
        return replace(config, passes="sequential")

    def _add_own_loss(
        self,
        head: Head,
        reading: Reading,
        result: RDropOutput,
        plan: StepPlan,
        kl: Tensor | None,
        window: Window,
    ) -> Tensor:
        """Return the loss of a micro-batch from the own loss of its passes and the divergence."""
        own_loss = torch.stack(reading.losses).mean()
        if self.rdrop.fraction < 1:
            own_loss = reading.losses[0]  # that of pass 0, which alone has all rows
        items, nll = head.counts().kl, own_loss.detach()
        has_items = items > 0  # the mean over no item is nan
        if window.own_items is not None:
            # It is a share of the window's mean, to which micro-batches without an item belong.
            has_items = torch.as_tensor(window.own_items, device=nll.device) > 0
            nll = nll * window.num_batches
        else:
            own_loss = own_loss / window.num_batches
        nll, weight = torch.where(has_items, nll, 0), has_items.to(nll.device, torch.float)
        self._note_step(plan, nll, kl, ItemCounts(weight, items))
        factor = plan.factor
        if plan.num_passes > 1:
            factor = term_weights(plan.alpha, plan.num_passes, self.rdrop.scale)[0]
        return own_loss * factor + window.scale(result.loss)

    def _refuse_unused_parameters(self, model: nn.Module) -> None:
        """Refuse several forwards a backward of which each leaves out layers of its own."""
        graded = self.rdrop.backward_passes or self.rdrop.num_passes
        if graded == 1 or not getattr(model, "find_unused_parameters", False):
            return
        if any(source.kind == "layerdrop" and source.rate > 0 for source in find_dropout(model)):
            raise ValueError(
                "passes must be 'stacked', or backward_passes 1, under DistributedDataParallel for "
                "a model with LayerDrop, and here they run one after the other: it counts the "
                "layers that a pass leaves out once a backward. Or set the model's layerdrop to 0"
            )

    def _refuse_several_forwards(self, what: str) -> None:
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
            context = dropout_rates(self._unwrapped(model), shuffled)
        self._was_computed, self._is_in_step = False, True
        try:
            with context:
                loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._is_in_step = False
        if not self._was_computed:
            raise ValueError(
                f"{type(self).__name__} must call RDropTrainerMixin.compute_loss, and a class "
                "before the mixin has a compute_loss that does not. Put it into a subclass of "
                "Trainer, OwnTrainer, and list RDropTrainerMixin first: "
                "class OwnRDropTrainer(RDropTrainerMixin, OwnTrainer)"
            )
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a micro-batch in all its passes, for a true `total_flos`."""
        passes = self._planner.plan(self.rdrop, self.state.global_step).num_passes
        cost = 1.0 if passes == 1 else full_step_cost(self.rdrop)
        return round(cost * super().floating_point_ops(inputs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside a training loss also its parts, means over the items since the last log."""
        if "loss" in logs and not self._meter.is_empty:
            logs = {**logs, **self._collect_parts()}
        super().log(logs, start_time)

    def _noise(self, model: nn.Module, num_passes: int) -> AbstractContextManager[None]:
        """Return the context in which the embeddings of r3f's second pass are noisy."""
        if self.rdrop.method != "r3f" or num_passes == 1:
            return nullcontext()
        unwrapped: Any = self._unwrapped(model)
        is_pair = unwrapped.config.is_encoder_decoder
        reader = unwrapped.get_encoder() if is_pair else unwrapped
        embedding = reader.get_input_embeddings()
        return embedding_noise(embedding, num_passes, self.rdrop.noise)


class RDropTrainer(RDropTrainerMixin, Trainer):
    """`transformers.Trainer` with R-Drop: the same arguments, and `rdrop=RDropConfig(...)`."""


class RDropSeq2SeqTrainer(RDropTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with R-Drop: the same, and `rdrop=RDropConfig(...)`."""
