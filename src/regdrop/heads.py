"""What a model predicts: how one batch enters it, and its outputs the loss. No framework's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from regdrop.loss import (
    ItemCounts,
    TermsFunction,
    count_items,
    cross_entropy_terms,
    fraternal_terms,
)


class UnknownHeadError(ValueError):
    """Nothing is known of what a model predicts and minimises, or of a part of that.

    Attributes:
        head: What is known of it: how its outputs are compared, beside a loss that has more parts.
    """

    head: "Head | None" = None


def read_output(output: Any, name: str) -> Tensor:
    """Return a tensor of a model's output by name.

    Raises:
        ValueError: If the output has none of that name.
    """
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model's output must have {name}, got {type(output).__name__}; for another head "
            "override rdrop_head of the trainer"
        )
    return found


def read_logits(output: Any) -> Tensor:
    """Return the logits of a model's output."""
    return read_output(output, "logits")


@dataclass(frozen=True)
class Head:
    """How one batch enters the model, and its outputs the loss.

    Attributes:
        inputs: What the model is given: the batch without its labels.
        target: The labels in the shape that the terms expect.
        terms: The output family's terms of each item, its options bound.
        outputs: From the model's output to the logits, (items, ...).
        takes_kernel: Whether `terms` take `inplace` and `impl`, as `cross_entropy_terms` do.
        vocabulary: Number of words between which a language model chooses; None for other heads.
        batch_size: Rows of the batch; by default those of the target.
        count: From the target to the denominators of both terms, for terms that are not of this
            library. A trainer may learn it from the first batch where it is None.
        is_guessed: Whether the labels alone tell what kind of head it is, so that a loss that
            somebody else computes may read them otherwise.
    """

    inputs: dict[str, Any]
    target: Tensor
    terms: TermsFunction
    outputs: Callable[[Any], Tensor] = read_logits
    takes_kernel: bool = False
    vocabulary: int | None = None
    batch_size: int | None = None
    count: Callable[[Tensor], ItemCounts] | None = None
    is_guessed: bool = False

    @property
    def rows(self) -> int:
        """Return the number of rows of the batch."""
        return self.target.shape[0] if self.batch_size is None else self.batch_size

    def counts(self) -> ItemCounts:
        """Return the denominators of the means of both terms.

        Raises:
            ValueError: If nobody knows them before the terms are computed.
        """
        if self.count is not None:
            return self.count(self.target)
        found = count_items(self.terms, self.target)
        if found is None:
            raise ValueError(
                "count must be given for a head whose terms are not of regdrop.loss: a function "
                "from the target to regdrop.loss.ItemCounts"
            )
        return found


def strip_options(terms: TermsFunction) -> TermsFunction:
    """Return terms as a model's own loss has them: without label smoothing and class weights."""
    if not isinstance(terms, partial):
        return terms
    own = ("label_smoothing", "weight")
    kept = {name: value for name, value in terms.keywords.items() if name not in own}
    return partial(terms.func, *terms.args, **kept)


def fraternal_head(head: Head) -> Head:
    """Return a head whose divergence is the squared difference of logits.

    Raises:
        ValueError: For a head of other outputs than classes.
    """
    terms: Any = head.terms
    if not isinstance(terms, partial) or terms.func is not cross_entropy_terms:
        raise ValueError("method='fraternal' compares the logits of classes; this head has none")
    changed = partial(fraternal_terms, **terms.keywords)
    return replace(head, terms=changed, takes_kernel=False)
