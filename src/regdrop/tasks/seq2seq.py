"""What tasks share whose text is generated from text: splits, trainer arguments, outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from regdrop.tasks.generation import EXAMPLE_ID


class Outputs(NamedTuple):
    """What a model gives for the examples of a split.

    Attributes:
        texts: Its output for each.
        references: What they are compared with.
        likelihoods: Summed negative log-likelihood of the labels and their number, (examples, 2).
    """

    texts: list[str]
    references: list[Any]
    likelihoods: np.ndarray


def by_length(split: Any, column: str) -> Any:
    """Return a split ordered by a column's length, so that outputs of a batch end together."""
    lengths = [len(text) for text in texts_of(split[column][:])]
    return split.select(np.argsort(lengths, kind="stable"))


def encode_split(
    split: Any,
    encode: Callable[[Mapping[str, list[Any]]], dict[str, Any]],
    references: list[Any],
    own: Sequence[Any],
) -> Any:
    """Return a split's model inputs; the id of an example is its place among all references.

    Args:
        split: A `datasets.Dataset`.
        encode: From columns of a batch to inputs and labels.
        references: References of all splits so far, to which these are added.
        own: References of this split, one an example.
    """
    first = len(references)
    references.extend(own)

    def numbered(rows: Mapping[str, list[Any]], positions: list[int]) -> dict[str, Any]:
        return {**encode(rows), EXAMPLE_ID: [first + i for i in positions]}

    return split.map(
        numbered,
        batched=True,
        with_indices=True,
        remove_columns=split.column_names,
        keep_in_memory=True,
    )


def seq2seq_options(num_beams: int, eval_batch_size: int) -> dict[str, Any]:
    """Return the arguments of a trainer with batches by tokens that scores what it generates.

    Args:
        num_beams: Beams of the evaluations during training.
        eval_batch_size: Examples a batch of an evaluation.
    """
    return {
        "predict_with_generate": True,
        "generation_num_beams": num_beams,
        "per_device_train_batch_size": 1,  # batches are by tokens
        "per_device_eval_batch_size": eval_batch_size,
        "remove_unused_columns": False,
    }


def read_outputs(tokenizer: Any, references: Sequence[Any], prediction: Any) -> Outputs:
    """Return the texts that `GenerationTrainer` predicted, with their references."""
    tokens, nll = prediction.predictions
    labels, example_ids = prediction.label_ids
    tokens = np.where(tokens < 0, tokenizer.pad_token_id, tokens)
    counts = np.asarray(labels != -100).sum(1)
    return Outputs(
        texts=tokenizer.batch_decode(tokens, skip_special_tokens=True),
        references=[references[int(i)] for i in example_ids],
        likelihoods=np.stack([np.asarray(nll, dtype=np.float64).reshape(-1), counts], axis=1),
    )


def texts_of(values: Sequence[Any]) -> list[str]:
    """Return a column of text.

    Raises:
        ValueError: If it holds anything else.
    """
    wrong = next((value for value in values if not isinstance(value, str)), None)
    if wrong is not None or None in values:
        raise ValueError(f"columns of text must hold text, got {wrong!r}")
    return list(values)
