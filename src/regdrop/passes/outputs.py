"""What a model returns: its parts are joined or changed, its types are kept.

A part is a tensor, packed sequences, a number, a text or None. Structures are those that a batch
may be built of.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from regdrop.passes.containers import is_container, is_graph
from regdrop.passes.structures import SIMPLE, items_by_name, map_items


def concatenate_outputs(
    outputs: Sequence[Any],
    *,
    passes: Sequence[int] | None = None,
    backward_passes: int | None = None,
) -> Any:
    """Return several outputs of one structure as one, along the first dimension.

    Packed sequences follow each other as sequences. A number with a fraction and without a
    dimension, such as an auxiliary loss, becomes its mean over the passes; its gradient is that of
    the mean over the passes that have one. Other numbers and texts must be the same in all outputs.

    Args:
        outputs: Those of several forwards, in the order of their passes.
        passes: How many passes each holds, by default one.
        backward_passes: Number of first passes with a gradient; None: all.

    Raises:
        TypeError: For an object that is no part of an output, and parts of different types.
        ValueError: For outputs of different structures or shapes, and for what should be the same.
    """
    passes = [1] * len(outputs) if passes is None else passes
    graded = sum(passes) if backward_passes is None else backward_passes
    return _map_parts(partial(_join, passes, graded), outputs)


def map_rows(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Return an output whose tensors with rows are changed by a function, its types kept.

    The function is one of rows: it takes and gives tensors of any shape and dtype.

    Raises:
        TypeError: For an object that is no part of an output, and a sparse tensor.
    """

    def change(name: str, parts: Sequence[Any]) -> Any:
        part = parts[0]
        if isinstance(part, PackedSequence):
            padded, lengths = pad_packed_sequence(part, batch_first=True)
            # What chooses rows may lie where the data does.
            return _pack(function(padded), function(lengths.to(padded.device)))
        if is_container(part):
            rows = function(torch.arange(len(part), device=part.device))
            return part.apply(function, batch_size=[len(rows), *part.batch_size[1:]])
        if not isinstance(part, Tensor) or not part.dim():
            return part
        if part.layout != torch.strided:
            raise TypeError(
                f"forward must return {name} as a dense tensor, got {part.layout}; use its "
                "to_dense(), or leave it out"
            )
        return function(part)

    return _map_parts(change, [output])


def count_rows(output: Any) -> dict[str, int]:
    """Return the number of rows of every part of an output that has some, by its name.

    Raises:
        TypeError: For an object that is no part of an output.
    """
    found: dict[str, int] = {}

    def note(name: str, parts: Sequence[Any]) -> None:
        part = parts[0]
        if isinstance(part, PackedSequence):
            found[name] = int(part.batch_sizes[0])
        elif is_container(part) or (isinstance(part, Tensor) and part.dim()):
            found[name] = len(part)

    _map_parts(note, [output])
    return found


def _map_parts(
    function: Callable[[str, Sequence[Any]], Any], values: Sequence[Any], name: str = "output"
) -> Any:
    """Return the structure of values that are alike, made of what a function makes of their parts.

    Args:
        function: From a part's name and what each value has there to what becomes of it.
        values: One or several values.
        name: Their name in an error.
    """
    first = values[0]
    _require_same(f"{name} of one type", [_kind(value) for value in values], TypeError)
    if _is_part(first):
        return function(name, values)
    items = [items_by_name(value) for value in values]
    if items[0] is not None:
        names = [set(named or ()) for named in items]
        if isinstance(first, (tuple, list)):
            _require_same(f"{name} of one length", [len(some) for some in names])
        is_mapping = isinstance(first, Mapping)
        _require_same(f"{name} with the same {'names' if is_mapping else 'fields'}", names)

        def change(key: Any, item: Any) -> Any:
            is_field = isinstance(key, str) and not is_mapping
            place = f".{key}" if is_field else f"[{key!r}]"
            return _map_parts(function, [named[key] for named in items if named], f"{name}{place}")

        return map_items(change, first)
    way_out = "; leave it out of what forward returns"
    if "cache" in f"{name} {type(first).__name__}".lower():
        way_out += ", for a model of transformers by use_cache=False"
    raise TypeError(
        "forward must return a tensor, packed sequences, a number, a text or None, or a tuple, "
        f"list, mapping or dataclass of them, got {name}: {type(first).__name__}{way_out}"
    )


def _is_part(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_nested
    if isinstance(value, (*SIMPLE, PackedSequence)):
        return True
    return is_container(value) and not is_graph(value) and len(value.batch_size) > 0


def _kind(value: Any) -> str:
    return "Tensor" if isinstance(value, Tensor) else type(value).__name__


def _require_same(
    what: str, found: Sequence[Any], error: Callable[[str], Exception] = ValueError
) -> None:
    different = next((one for one in found if one != found[0]), None)
    if different is not None:
        raise error(
            f"forward must return {what} in every pass, got {found[0]} in one and {different} in "
            "another"
        )


def _join(passes: Sequence[int], graded: int, name: str, parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, PackedSequence):
        return _join_sequences(name, parts)
    if is_container(first):
        return torch.cat(list(parts))
    if isinstance(first, Tensor) and first.dim():
        shapes = [tuple(part.shape[1:]) for part in parts]
        _require_same(f"{name} with rows of one shape", shapes)
        return torch.cat(list(parts))
    if isinstance(first, Tensor) and (first.is_floating_point() or first.is_complex()):
        numbers = torch.stack(_repeat(parts, passes))
        mean, mean_graded = numbers.mean(), numbers[:graded].mean()
        # No pass without a gradient takes its share of it.
        return mean if graded == len(numbers) else mean_graded + (mean - mean_graded).detach()
    if isinstance(first, (float, complex)):
        return sum(_repeat(parts, passes)) / sum(passes)
    values = [part.item() if isinstance(part, Tensor) else part for part in parts]
    _require_same(f"{name} with one value (or as a float, whose mean is taken)", values)
    return first


def _repeat(parts: Sequence[Any], passes: Sequence[int]) -> list[Any]:
    """Return what each forward has, as often as it has passes."""
    return [part for part, times in zip(parts, passes, strict=True) for _ in range(times)]


def _join_sequences(name: str, parts: Sequence[PackedSequence]) -> PackedSequence:
    _require_same(f"{name} with rows of one shape", [tuple(p.data.shape[1:]) for p in parts])
    longest = max(len(part.batch_sizes) for part in parts)
    pairs = [pad_packed_sequence(part, batch_first=True, total_length=longest) for part in parts]
    return _pack(torch.cat([rows for rows, _ in pairs]), torch.cat([sizes for _, sizes in pairs]))


def _pack(padded: Tensor, lengths: Tensor) -> PackedSequence:
    return pack_padded_sequence(padded, lengths.cpu(), batch_first=True, enforce_sorted=False)
