"""The output that a loss of somebody else's reads, and its slope there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from regdrop.integrations.transformers.evaluation import find_labels
from regdrop.integrations.transformers.forward.attempt import attempt
from regdrop.integrations.transformers.outputs import (
    Key,
    find_logits,
    find_tensor,
    named_tensors,
)
from regdrop.passes import find_batch_size

# From a batch and the place of the logits to the loss's slope there; None where nobody knows.
SlopeOf = Callable[[Mapping[str, Any], Key], Tensor | None]


@dataclass(frozen=True)
class ReadOutput:
    """Logits that a loss reads, in a batch whose inputs may be changed to ask what it does then.

    Attributes:
        inputs: The batch with its labels.
        label: Name of the labels; None where the batch has none.
        key: Where the logits are in the output.
        logits: The logits.
        slope_of: The slope of the loss.
    """

    inputs: Mapping[str, Any]
    label: str | None
    key: Key
    logits: Tensor
    slope_of: SlopeOf

    @property
    def labels(self) -> Tensor | None:
        """The labels of the batch."""
        return None if self.label is None else self.inputs[self.label]

    @cached_property
    def slope(self) -> Tensor | None:
        """The loss's slope there; None where nobody knows."""
        return self.slope_of(self.inputs, self.key)

    def slope_for(self, changed: Mapping[str, Any]) -> Tensor | None:
        """Return the slope where some inputs are others; None too where a loss cannot have them."""
        return attempt(partial(self.slope_of, {**self.inputs, **changed}, self.key), None)


def find_read_output(
    output: Any, inputs: Mapping[str, Any], label_names: Sequence[str], slope_of: SlopeOf
) -> ReadOutput:
    """Return the logits that a loss reads.

    Args:
        output: What the model returned.
        inputs: The batch with its labels.
        label_names: Names that labels have.
        slope_of: The slope of the loss.

    Raises:
        ValueError: If nothing could be logits, or it reads none of those that are called so.
    """
    rows = find_batch_size(inputs)
    name = next(iter(find_labels(inputs, label_names)), None)
    labels = None if name is None else inputs[name]
    try:
        key, logits = find_logits(output, rows)
    except ValueError as error:
        if labels is None:
            raise ValueError(f"{error}; or give label_names in the Trainer's arguments") from error
        alike = [(k, x) for k, x in named_tensors(output) if x.shape == labels.shape]
        if len(alike) != 1 or not alike[0][1].is_floating_point():
            raise
        [(key, logits)] = alike
    if logits.shape[:1] != (rows,):
        raise ValueError(
            f"the model's output {key!r} must have the {rows} rows of the batch as its first "
            f"dimension, to be compared between passes, got shape {tuple(logits.shape)}: return it "
            "so, or override rdrop_head of the trainer"
        )
    called = [other for other, _ in named_tensors(output) if "logits" in str(other)]
    for other in dict.fromkeys((key, *called)):
        found = find_tensor(output, other)
        if not found.is_floating_point() or found.shape[:1] != (rows,):
            continue
        read = ReadOutput(inputs, name, other, found, slope_of)
        is_unknown = read.slope is None and other == key
        if is_unknown or (read.slope is not None and bool(read.slope.any())):
            return read
    raise ValueError(
        f"the loss does not depend on the model's output {key!r}, of shape {tuple(logits.shape)}, "
        "so that nothing tells what passes are compared by: return the scores that it reads under "
        "the name logits, or override rdrop_head of the trainer to say what its divergence is"
    )
