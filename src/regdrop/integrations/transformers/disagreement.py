"""The sub-models of a Hugging Face model, item by item of what it predicts."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from regdrop.arguments import IGNORE_INDEX
from regdrop.diagnostics import Disagreement, measure_disagreement
from regdrop.heads import Head
from regdrop.integrations.transformers.heads.registry import base_model, find_head
from regdrop.loss import adaptive_log_softmax, adaptive_softmax_terms, cross_entropy_terms


def measure_model(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], num_masks: int = 32
) -> Disagreement:
    """Measure how far the sub-models of a Hugging Face model are apart: `measure_disagreement`.

    Items are what the model's head predicts a class or a word for: sequences, tokens, the words of
    a text under teacher forcing.

    Args:
        model: A model whose head `find_head` knows.
        batches: Batches with their labels, on the model's device.
        num_masks: Number of masks, at least 2.

    Raises:
        UnknownHeadError: For a head that is not known or has a loss of its own.
        ValueError: For a head that predicts several labels at once, or numbers.
    """
    return measure_disagreement(
        model, _enter(model, batches), num_masks, forward=partial(_logits, model)
    )


def _enter(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Head, Tensor]]:
    for batch in batches:
        head = find_head(model, batch)
        function, options = _terms(head)
        if function not in (cross_entropy_terms, adaptive_softmax_terms):
            raise ValueError(
                "the items of a model must have classes or words as labels, got "
                f"{type(base_model(model)).__name__} with the loss "
                f"{getattr(function, '__name__', function)!r}: several labels an item and numbers "
                "are no distribution over classes"
            )
        ignored = options.get("ignore_index", IGNORE_INDEX)
        yield head, head.target.masked_fill(head.target == ignored, IGNORE_INDEX)


def _terms(head: Head) -> tuple[Any, Mapping[str, Any]]:
    """Return the function of a head's terms and the options bound to it."""
    terms: Any = head.terms
    return (terms.func, terms.keywords) if isinstance(terms, partial) else (terms, {})


def _logits(model: nn.Module, head: Head) -> Tensor:
    outputs = head.outputs(model(**head.inputs))
    function, options = _terms(head)
    if function is cross_entropy_terms:
        return outputs
    # An adaptive softmax reads hidden states; log-probabilities are logits too.
    log_p = adaptive_log_softmax(outputs.flatten(0, -2), options["softmax"])
    return log_p.view(*outputs.shape[:-1], -1)
