"""Which NLL a trainer minimises, as one batch tells: by its name, its own loss or a search."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from regdrop.config import RDropConfig
from regdrop.heads import Head, UnknownHeadError
from regdrop.integrations.transformers.forward.verify import (
    Comparison,
    agrees_when_shaken,
    compare_in_training,
    compare_losses,
)
from regdrop.integrations.transformers.heads.registry import (
    base_model,
    find_head,
    has_registered_class,
)
from regdrop.integrations.transformers.internals import TrainerInternals
from regdrop.integrations.transformers.likelihood.count_rules import find_count_rule
from regdrop.integrations.transformers.likelihood.detection import detect_recipe
from regdrop.integrations.transformers.likelihood.own_loss import OwnLoss
from regdrop.integrations.transformers.likelihood.probing import probe_own_loss
from regdrop.integrations.transformers.likelihood.recipe import Recipe
from regdrop.loss import cross_entropy_terms, is_counted
from regdrop.out_of_memory import is_out_of_memory
from regdrop.reading import require_counts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where the head of every batch and its NLL come from, as the first batch of its kind told.

    Attributes:
        recipe: The head of a model that no name tells.
        own: The NLL is the model's or the trainer's own loss; None where R-Drop computes it.
        count: Rule of `COUNT_RULES` by which the items of terms of one's own are counted.
        obstacle: Why the passes of the first batch cannot be stacked; None if they can.
    """

    recipe: Recipe | None = None
    own: OwnLoss | None = None
    count: str | None = None
    obstacle: str | None = None


class SourceSearch(TrainerInternals):
    """The part of `RDropTrainerMixin` that finds where the head of a batch comes from."""

    rdrop: RDropConfig

    def rdrop_head(self, model: nn.Module, inputs: Mapping[str, Any]) -> Head:
        """Return how a batch with its labels enters the unwrapped model, and its outputs the loss.

        Override it for a head that is not known, or a loss of your own.
        """
        return find_head(
            model,
            inputs,
            label_smoothing=self.args.label_smoothing_factor,
            class_weight=self.rdrop.class_weight,
            unlabelled_index=self.rdrop.unlabelled_index,
            label_names=self.label_names,
        )

    def _find_source(self, inputs: Mapping[str, Any]) -> Source:
        owner = self._loss_owner()
        if owner is not None or self.rdrop.likelihood == "model":
            source = self._own_source(inputs)
            self._tell_own(f"the loss is that of {owner or 'the model'}", source)
            return source
        model = self._unwrapped(self.model)
        is_sharded = self._splits_parameters()
        if self._is_head_given(model):
            head = self.rdrop_head(model, inputs)
            return Source() if is_sharded else self._check_own_head(model, head, inputs)
        name = type(base_model(model)).__name__
        # What the library itself defines is what its name says.
        is_own_class = not is_of_library(base_model(model))
        try:
            head = self.rdrop_head(model, inputs)
            found = None if is_sharded else compare_losses(model, head, inputs)
        except UnknownHeadError as error:
            says = str(error).split(";")[0]
            reason = says if says.startswith(name) else f"{name} is not a class that regdrop knows"
        except Exception as error:  # whatever somebody's own class raises
            if not is_own_class and isinstance(error, ValueError) and name not in str(error):
                raise ValueError(
                    f"{name}: {error} (RDropConfig(likelihood='model') minimises its own loss)"
                ) from error
            if not is_own_class or is_out_of_memory(error):
                raise
            reason = f"{name} is not what its name says ({error})".replace(";", ",")
        else:
            if found is None or self._is_its_kind(model, head, found, is_own_class, inputs):
                return Source()
            reason = f"{name} has a loss of its own"
            if found.own is None:
                reason += ", in training mode alone"
            elif not found.agrees_closely:
                reason += (
                    f" ({found.own.item():.6g} on the first batch, where that of its kind is "
                    f"{found.ours.item():.6g})"
                )
        recipe = self._detect(inputs)
        if recipe is not None:
            self._tell(f"{reason}; its own loss on the first batch is {recipe}, which is minimised")
            return Source(recipe=recipe)
        source = self._own_source_for(reason, inputs)
        self._tell_own(f"{reason}, and its own loss is none that regdrop knows", source)
        return source

    def _is_its_kind(
        self,
        model: nn.Module,
        head: Head,
        found: Comparison,
        is_own_class: bool,
        inputs: Mapping[str, Any],
    ) -> bool:
        """Return whether a model's loss is that of its kind, as far as the first batch tells."""
        if not is_own_class:
            return found.agrees
        find = partial(self.rdrop_head, model)
        return (
            found.agrees_closely
            and agrees_when_shaken(model, find, inputs)
            and compare_in_training(model, head, inputs).agrees_closely
        )

    def _detect(self, inputs: Mapping[str, Any]) -> Recipe | None:
        return detect_recipe(
            self._unwrapped(self.model), self._runnable(), inputs, self.label_names
        )

    def _check_own_head(self, model: nn.Module, head: Head, inputs: Mapping[str, Any]) -> Source:
        """Hold a head of `rdrop_head` against the model's own loss and its terms' own count."""
        found = compare_losses(model, head, inputs)
        if not found.agrees:
            self._compare_readings(head, found, inputs)
        assert found.terms is not None
        if head.count is None and not is_counted(head.terms):
            return Source(count=find_count_rule(head.target, found.terms))
        require_counts(head, found.terms)
        return Source()

    def _compare_readings(self, head: Head, found: Comparison, inputs: Mapping[str, Any]) -> None:
        """Refuse a head that reads the same labels otherwise than the model's own loss does."""
        assert found.own is not None
        own, ours = found.own.item(), found.ours.item()
        terms = head.terms.func if isinstance(head.terms, partial) else head.terms
        is_classes = terms is cross_entropy_terms and not head.target.is_floating_point()
        recipe = self._detect(inputs) if is_classes else None
        if recipe is not None and recipe.family == "cross entropy":
            raise ValueError(
                f"rdrop_head gives a cross entropy of {ours:.6g} on the first batch, where the "
                f"model's own loss is {own:.6g}: a {recipe}. Give the Head that target (a causal "
                "model needs its labels moved by one); if another loss is meant, give it terms of "
                "your own"
            )
        self._tell(
            f"rdrop_head gives an NLL of {ours:.6g} on the first batch, where the model's "
            f"own loss is {own:.6g}; the former is minimised"
        )

    def _own_source(self, inputs: Mapping[str, Any], is_first: bool = True) -> Source:
        """Return the facts of a loss that the model or the trainer computes.

        How another loss was to be computed is refused before the first step, and left after it.
        """
        options = self._options_of_terms()
        if is_first and self.rdrop.impl != "auto":
            options["impl"] = self.rdrop.impl
        if is_first and self.rdrop.fused_linear is True:
            options["fused_linear"] = True
        for name, value in options.items():
            raise ValueError(
                f"{name}={value!r} needs an NLL that regdrop computes, and here it is "
                "the model's or the trainer's own loss: leave it out, or override rdrop_head"
            )
        model = self._unwrapped(self.model)
        try:
            head: Head | None = self._compared_head(inputs)
        except ValueError:
            head = None
        if head is not None and head.is_guessed:
            head = None
        own = probe_own_loss(
            model,
            partial(self._own_loss, self._runnable()),
            inputs,
            head=head,
            label_names=self.label_names,
            counts_items=self._own_loss_counts(),
            is_given=self._is_head_given(model),
            asks_slope=not self._splits_parameters(),
        )
        return Source(own=own)

    def _own_source_for(
        self, reason: str, inputs: Mapping[str, Any], is_first: bool = True
    ) -> Source:
        """Return what `_own_source` returns; `reason` begins what is said where it finds none."""
        try:
            return self._own_source(inputs, is_first)
        except ValueError as error:
            raise ValueError(
                f"{reason}, and there is no loss that could be minimised as it is: {error} "
                "(override rdrop_head of the trainer to say what is minimised)"
            ) from error

    def _options_of_terms(self) -> dict[str, Any]:
        """Return the options that only a loss which regdrop computes can have."""
        options = {
            "class_weight": self.rdrop.class_weight,
            "unlabelled_index": self.rdrop.unlabelled_index,
            "method": None if self.rdrop.method == "rdrop" else self.rdrop.method,
        }
        return {name: value for name, value in options.items() if value is not None}

    def _compared_head(self, inputs: Mapping[str, Any]) -> Head:
        """Return the head whose logits are compared beside a loss that may have more parts."""
        try:
            return self.rdrop_head(self._unwrapped(self.model), inputs)
        except UnknownHeadError as error:
            if error.head is None:
                raise
            return error.head

    def _own_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Any = None
    ) -> tuple[Tensor, Any]:
        """Return the loss and the output as they are without R-Drop."""
        result = self._compute_without_rdrop(model, dict(inputs), True, num_items)
        if not isinstance(result, tuple):
            raise ValueError(
                f"{self._loss_owner()} must return (loss, outputs) under return_outputs=True, got "
                f"{type(result).__name__}"
            )
        loss, outputs = result
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be one number, got {got}")
        return loss, outputs

    def _tell_own(self, reason: str, source: Source) -> None:
        assert source.own is not None
        compared = source.own.divergence or "the KL that regdrop has for its head"
        lines = [f"{reason}; that loss is minimised as it is, beside {compared}"]
        if not source.own.is_rowwise:
            lines.append("Its rows depend on each other, so that passes run one after the other")
        if source.own.note is not None:
            lines.append(source.own.note)
        batches = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        if not source.own.counts_items and batches > 1:
            lines.append(
                "It is a mean over its own batch: micro-batches count alike, however many items "
                "they hold"
            )
        if self.rdrop.likelihood == "auto":
            lines.append("RDropConfig(likelihood='model') says so")
        self._tell(". ".join(lines))

    def _is_head_given(self, model: nn.Module) -> bool:
        """Return whether somebody says what the model predicts."""
        is_overridden = type(self).rdrop_head is not SourceSearch.rdrop_head
        return is_overridden or has_registered_class(model)

    def _runnable(self) -> Any:
        """Return what may be called beside training: what holds the whole of its parameters."""
        return self.model_wrapped if self._splits_parameters() else self._unwrapped(self.model)

    def _splits_parameters(self) -> bool:
        """Return whether a process holds a part of each parameter: FSDP, or DeepSpeed's ZeRO 3."""
        plugin = self.accelerator.state.deepspeed_plugin
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def _tell(self, line: str) -> None:
        if self.is_world_process_zero():
            logger.warning("R-Drop: %s.", line)

    def _unwrapped(self, model: Any) -> nn.Module:
        """Return the model without what distribution and compilation wrap around it."""
        found: nn.Module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return found


def is_of_library(model: nn.Module) -> bool:
    """Return whether a model's class, forward and loss are transformers' (or regdrop's) own."""
    home = type(model).__module__.split(".")[0]
    own = vars(model)
    # accelerate puts autocast, or what brings the parts to their devices, around a model's forward,
    # and keeps the one before.
    names = ("_old_forward", "_original_forward", "forward")
    forward = next((own[name] for name in names if name in own), None)
    function = getattr(forward, "__func__", None)
    # TRL puts one of its own there, whose logits are those of the class.
    origin = getattr(function, "__globals__", {}).get("__name__", "").split(".")[0]
    is_kept = forward is None or function is type(model).forward or origin == "trl"
    return home in ("transformers", "regdrop") and is_kept and "_loss_function" not in own
