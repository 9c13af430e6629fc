"""What tasks share whose text is generated from text: splits, references and outputs.

Splits stay where `datasets` keeps them, in Arrow files on disk, so that a training split may be
larger than memory; small ones are encoded in memory.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from regdrop.arguments import IGNORE_INDEX
from regdrop.tasks.data_sets.columns import check_texts
from regdrop.tasks.notices import say_once

# The column that tells which example an output is of; the model does not see it.
EXAMPLE_ID = "example_id"
# That of the tokens of an example's longer side, by which batches are made.
LENGTH = "longer_side"
# Examples up to which an encoded split is kept in memory, not in the library's cache on disk.
_IN_MEMORY_EXAMPLES = 300_000
_ROWS = 10_000
# A list of texts as Python, NumPy and JSON print it.
_WRITTEN_LIST = re.compile(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", re.DOTALL)


class Outputs(NamedTuple):
    """What a model gives for the examples of a split.

    Attributes:
        texts: Its output for each.
        references: What they are compared with.
        nll: Summed NLL of the labels and their number, (examples, 2).
    """

    texts: list[str]
    references: list[Any]
    nll: np.ndarray


class References:
    """The references of all splits in a row, read from their splits when they are asked for."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._columns: list[Sequence[Any]] = []
        self._size = 0

    def add(self, column: Sequence[Any]) -> int:
        """Add those of a split, one an example, and return the place of its first."""
        first = self._size
        self._starts.append(first)
        self._columns.append(column)
        self._size += len(column)
        return first

    def __getitem__(self, place: int) -> Any:
        split = bisect_right(self._starts, place) - 1
        return self._columns[split][place - self._starts[split]]


def column_values(split: Any, column: str) -> Iterator[Any]:
    """Yield the values of a column, some rows at a time."""
    for start in range(0, len(split), _ROWS):
        yield from split[start : start + _ROWS][column]


def check_references(dataset: str, splits: Mapping[str, Any], column: str) -> None:
    """Check that each row of a column holds a text, or a list of them; say where they are empty.

    Args:
        dataset: Folder or hub id, for the error.
        splits: Splits as they were loaded.
        column: What texts are compared with, and trained to become.

    Raises:
        ValueError: If one holds anything else, by split, column and row.
    """
    from datasets import Value

    for name, split in splits.items():
        if isinstance(split.features[column], Value):
            check_texts(dataset, {name: split}, [column])
        where = f"column {column!r} of split {name!r} of data {dataset!r}"
        empty, written_lists = [], 0
        for row, value in enumerate(column_values(split, column)):
            written_lists += isinstance(value, str) and bool(_WRITTEN_LIST.fullmatch(value))
            texts = [value] if isinstance(value, str) else value
            is_list = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
            if not (is_list and texts):
                raise ValueError(
                    f"{where} must hold a text or a list of at least one, got {value!r} in row "
                    f"{row}"
                )
            if not any(text.strip() for text in texts):
                empty.append(row)
        if written_lists == len(split):
            raise ValueError(
                f"{where} must hold texts or lists of texts, got lists that are written as text, "
                f"{split[0][column][:40]!r} in row 0; JSON lines and parquet hold lists"
            )
        if empty:
            say_once(f"{where} is empty in {len(empty):,} rows, the first of them row {empty[0]}")


def fits_memory(split: Any) -> bool:
    """Return whether a split is small enough to be encoded in memory."""
    return len(split) <= _IN_MEMORY_EXAMPLES


def by_length(split: Any, column: str) -> Any:
    """Return a split ordered by a column's length, so that outputs of a batch end together."""
    lengths = [len(text) for text in split[column][:]]
    return split.select(np.argsort(lengths, kind="stable"))


def encode_split(
    split: Any,
    encode: Callable[[Mapping[str, list[Any]]], dict[str, Any]],
    references: References,
    own: Sequence[Any],
    *,
    with_length: bool = False,
) -> Any:
    """Return a split's model inputs; the id of an example is its place among all references.

    Args:
        split: A `datasets.Dataset`.
        encode: From columns of a batch to inputs and labels.
        references: References of all splits so far, to which these are added.
        own: References of this split, one an example.
        with_length: Whether the tokens of an example's longer side are a column too, by which
            batches are made in training.
    """
    first = references.add(own)

    def numbered(rows: Mapping[str, list[Any]], positions: list[int]) -> dict[str, Any]:
        encoded = {**encode(rows), EXAMPLE_ID: [first + i for i in positions]}
        if with_length:
            sides = zip(encoded["input_ids"], encoded["labels"], strict=True)
            encoded[LENGTH] = [max(len(source), len(target)) for source, target in sides]
        return encoded

    return split.map(
        numbered,
        batched=True,
        with_indices=True,
        remove_columns=split.column_names,
        keep_in_memory=fits_memory(split),
    )


def read_outputs(tokenizer: Any, references: References, prediction: Any) -> Outputs:
    """Return the texts that `GenerationTrainer` predicted, with their references."""
    tokens, nll = prediction.predictions
    labels, example_ids = prediction.label_ids
    tokens = np.where(tokens < 0, tokenizer.pad_token_id, tokens)
    counts = np.asarray(labels != IGNORE_INDEX).sum(1)
    return Outputs(
        texts=tokenizer.batch_decode(tokens, skip_special_tokens=True),
        references=[references[int(i)] for i in example_ids],
        nll=np.stack([np.asarray(nll, dtype=np.float64).reshape(-1), counts], axis=1),
    )
