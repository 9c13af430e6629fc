"""What every head is made from: a batch with its labels, its model, the NLL's options."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from regdrop.arguments import IGNORE_INDEX
from regdrop.heads import Head, UnknownHeadError, read_logits
from regdrop.loss import cross_entropy_terms
from regdrop.loss.class_weight import class_weight_on

WAY_OUT = (
    "RDropConfig(likelihood='model') keeps the model's own loss, and overriding rdrop_head of the "
    "trainer says another"
)
# What PEFT learns in place of the keys and values of earlier positions adds no position.
_SAME_LENGTH = frozenset({"PREFIX_TUNING", "CARTRIDGE"})


def base_model(model: nn.Module) -> nn.Module:
    """Return the model itself where PEFT has wrapped it."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


@dataclass
class LabelledBatch:
    """A batch with its labels, the model that it enters, and the options of the NLL.

    Attributes:
        model: The model, without what PEFT wraps around it.
        inputs: The batch, a dictionary of its own; a head takes the labels out of it.
        label_smoothing: Smoothing of the NLL's target.
        class_weight: Weight of each class in the NLL.
        unlabelled_index: Label of items that count in the divergence alone.
        label_names: What the batch calls its labels, where somebody said so.
        prompt: PEFT's config of the tokens that it learns for every sequence, if it does.
    """

    model: Any
    inputs: dict[str, Any]
    label_smoothing: float = 0.0
    class_weight: Sequence[float] | None = None
    unlabelled_index: int | None = None
    label_names: Sequence[str] = ()
    prompt: Any = None

    @classmethod
    def enter(cls, model: Any, inputs: Mapping[str, Any], **options: Any) -> "LabelledBatch":
        """Return a batch for a model that PEFT may have wrapped."""
        config = getattr(model, "active_peft_config", None)
        prompt = config if getattr(config, "is_prompt_learning", False) else None
        return cls(base_model(model), dict(inputs), prompt=prompt, **options)

    @property
    def name(self) -> str:
        """Return the name of the model's class."""
        return type(self.model).__name__

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Return what the model's forward takes."""
        return inspect.signature(self.model.forward).parameters

    @property
    def virtual_tokens(self) -> int:
        """Return how many learned positions come before those of the batch."""
        if self.prompt is None or self.prompt.peft_type in _SAME_LENGTH:
            return 0
        count: int = self.prompt.num_virtual_tokens
        return count

    def unknown(self, found: str, head: Head | None = None) -> UnknownHeadError:
        """Return an error that names the model, what was found and the way out."""
        error = UnknownHeadError(f"{self.name} {found}; {WAY_OUT}")
        error.head = head
        return error

    def refuse_options(self, needed: str) -> None:
        """Raise where the NLL has options and the head is not what they need."""
        given = (self.class_weight, self.label_smoothing or None, self.unlabelled_index)
        if any(option is not None for option in given):
            raise ValueError(
                f"class_weight, label_smoothing and unlabelled_index need {needed} ({self.name})"
            )

    def pop(self, name: str = "labels") -> Tensor:
        """Take the labels out of the inputs.

        Raises:
            UnknownHeadError: If the model's forward takes labels by another name alone.
            ValueError: If the batch has none of that name; tells those that may be meant.
        """
        labels = self.inputs.pop(name, None)
        if isinstance(labels, Tensor):
            return labels
        accepted = self.parameters
        if name not in accepted and "labels" in accepted:
            raise self.unknown(f"has a loss of its own: its forward takes no {name!r}")
        named = [key for key in self.inputs if key in self.label_names]
        meant = named or [key for key in self.inputs if key not in accepted]
        hint = f": rename {meant[0]!r} to {name!r}" if meant else ""
        raise ValueError(
            f"inputs must hold a tensor named {name!r}, as the forward of {self.name} calls it, "
            f"got {sorted(self.inputs)}{hint}"
        )

    def pop_next_words(self) -> Tensor:
        """Take the labels out of the inputs, moved by one: position t predicts word t + 1."""
        labels = self.pad_prompt(self.pop())
        # Padding the labels leaves the logits as they are; slicing them would copy a vocabulary.
        moved: Tensor | None = self.inputs.pop("shift_labels", None)
        return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX) if moved is None else moved

    def pad_prompt(self, labels: Tensor) -> Tensor:
        """Return the labels of all positions: those that PEFT has learned are ignored."""
        return F.pad(labels, (self.virtual_tokens, 0), value=IGNORE_INDEX)

    def classes(
        self,
        target: Tensor,
        num_labels: int | None = None,
        outputs: Callable[[Any], Tensor] = read_logits,
        **options: Any,
    ) -> Head:
        """Return a head that predicts one class an item.

        Args:
            target: Class indices.
            num_labels: Number of classes, which class weights must have.
            outputs: From the model's output to the logits.
            options: Others of `cross_entropy_terms`.
        """
        if self.class_weight is not None:
            if num_labels is not None and len(self.class_weight) != num_labels:
                raise ValueError(
                    f"class_weight must have one entry for each of {num_labels} labels of "
                    f"{self.name}, got {len(self.class_weight)}"
                )
            options["weight"] = class_weight_on(target.device, self.class_weight)
        if self.unlabelled_index is not None:
            options["unlabelled_index"] = self.unlabelled_index
        terms = partial(cross_entropy_terms, label_smoothing=self.label_smoothing, **options)
        return Head(self.inputs, target, terms, outputs, takes_kernel=True)
