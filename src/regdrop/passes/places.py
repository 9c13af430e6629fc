"""Where a tensor has its items: in which dimension, and how many rows each of them has there.

Its shape tells; its name does where two dimensions have the size of the batch, or another than the
one that was asked for.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regdrop.passes.items import find_dim
from regdrop.tracing import can_read

# The states of a recurrent network, (layers, batch, features) even where the batch comes first.
_STATES_OF_TORCH = re.compile(r"(^|_)[hc](_?[0n]|x)$")
_STATES = re.compile(r"(^|_)(hidden|states?|(hidden|cell)_state)$")
# Masks of nn.MultiheadAttention and of what holds it.
_MASKS_OF_ATTENTION = re.compile(r"(^|_)(attn|src|tgt|memory)_mask$")
_ADJACENCY = re.compile(r"(^|_)(adj(acency)?(_t|_mat(rix)?)?|laplacian)$")
# Time, height and width, and the place in the text before them.
_AXES = (3, 4)
# So few rows may be those of sentences of 1, 2 and 3 words.
_FEW = 4


class Place(NamedTuple):
    """Where a tensor has its items.

    Attributes:
        dim: Their dimension.
        rows: How many rows each of them has there.
    """

    dim: int
    rows: int = 1


def find_place(
    name: Any, value: Any, size: int, dim: int, is_whole: Callable[[], bool]
) -> Place | None:
    """Return where a tensor or an array has the items; None if it has none.

    Args:
        name: Its name, or that of the list or tuple that it is in; None if there is none.
        value: The tensor or array.
        size: Number of items.
        dim: Their dimension in most tensors.
        is_whole: Returns whether the items stay as they are, so that nothing can go wrong.

    Raises:
        ValueError: For a matrix between all items, which cannot be stacked, and for a mask of which
            nothing tells in which dimension its items are.
    """
    shape, known = value.shape, name if isinstance(name, str) else ""
    # Names come first: to compare sizes is to settle them, where they are symbols.
    if len(shape) == 3:
        if _is_mask_of_heads(known, shape, size):
            return Place(0, shape[0] // size)
        if are_shared_axes(known, shape, size):
            return None
        if dim == 0 and (
            _has_layers_first(known, shape, size) or _has_axes_first(known, shape, size)
        ):
            return Place(1)
    elif len(shape) == 2 and _may_be_between_items(known, value, dim) and size > 1:
        is_square = shape[0] == size and shape[1] == size
        if is_square:
            return _find_in_square(known, value, size, dim, is_whole)
    place = find_dim(value, size, dim)
    return None if place is None else Place(place)


def find_told_dim(names: Sequence[Any], num_dims: int, dim: int, dims: Mapping[str, int]) -> int:
    """Return in which dimension a tensor can tell how many items there are.

    Args:
        names: Those that lead to it, the outermost first.
        num_dims: Number of its dimensions.
        dim: Dimension of the items in most tensors.
        dims: That of tensors by their names.
    """
    told = [dims[name] for name in names if name in dims]
    if told:
        return told[-1]
    has_layers_first = (
        num_dims == 3
        and names
        and isinstance(names[-1], str)
        and _STATES_OF_TORCH.search(names[-1]) is not None
    )
    return 1 if has_layers_first else dim


def _is_mask_of_heads(name: str, shape: Any, size: int) -> bool:
    """Return whether a mask of three dimensions has a matrix for each head of each item."""
    is_named = _MASKS_OF_ATTENTION.search(name) is not None
    if not is_named and name == "mask":
        is_named = bool(shape[1] == shape[2] and shape[1] > 1)
    return is_named and bool(size and shape[0] and shape[0] % size == 0)


def _has_layers_first(name: str, shape: Any, size: int) -> bool:
    if _STATES_OF_TORCH.search(name):
        return bool(shape[1] == size)
    return _STATES.search(name) is not None and bool(shape[0] != size and shape[1] == size)


def _has_axes_first(name: str, shape: Any, size: int) -> bool:
    """Return whether positions in time, height and width (and in the text) are one behind another.

    They are so in the models of Qwen that see pictures.
    """
    return name == "position_ids" and bool(1 < size == shape[1] and shape[0] in _AXES)


def are_shared_axes(name: Any, shape: Any, size: int) -> bool:
    """Return whether positions of several axes are those of one row, of all rows alike."""
    is_named = name == "position_ids" and len(shape) == 3
    return is_named and bool(1 == shape[1] < size and shape[0] in _AXES)


def _may_be_between_items(name: str, value: Any, dim: int) -> bool:
    is_known = "mask" in name or _is_matrix(name, value)
    return is_known or (dim == 1 and _is_boolean(value))


def _is_matrix(name: str, value: Any) -> bool:
    is_sparse = isinstance(value, Tensor) and value.layout != torch.strided
    return is_sparse or _ADJACENCY.search(name) is not None


def _find_in_square(
    name: str, value: Any, size: int, dim: int, is_whole: Callable[[], bool]
) -> Place | None:
    """Return where something has the items of which it has as many rows as columns."""
    if _is_matrix(name, value) and not is_whole():
        raise ValueError(
            f"batch holds {name or 'a sparse tensor'} of shape {tuple(value.shape)}, a matrix "
            f"between all {size} items, as of the edges of a graph: stacked nodes would need one "
            'of all passes; use passes="sequential" with fraction=1.0, or a graph of PyTorch '
            "Geometric; name it in shared only if it is the same for all passes"
        )
    is_padding = "pad" in name
    if "mask" in name and not is_padding and is_causal(value):
        return None
    if dim != 1 or is_padding:  # which torch has there, also where the time comes first
        return Place(0)
    if not is_whole():
        raise ValueError(
            f"batch holds {name or 'a mask'} of shape {tuple(value.shape)}, whose items may be in "
            f"either dimension, since the batch has as many time steps as items, {size}: name the "
            'tensors that have the items second, by dim={"src": 1} and so on, and all others have '
            "them first; or name it in shared if it is the same for all items"
        )
    return Place(1)


def is_causal(mask: Any) -> bool:
    """Return whether a square mask hides from each step what comes later, by its values.

    It has one value above the diagonal and another one elsewhere. The masks of as many sentences,
    each a word longer than the last, look the same, but for those that are added to scores.
    """
    if not isinstance(mask, Tensor) or not can_wait(mask):
        return False
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False
    if len(mask) < _FEW and not bool(mask.isinf().any()):
        return False
    seen, hidden = mask[0, 0], mask[0, -1]
    is_later = torch.ones_like(mask, dtype=torch.bool).triu(1)
    return bool((seen != hidden) & (mask == torch.where(is_later, hidden, seen)).all())


def can_wait(tensor: Tensor) -> bool:
    """Return whether values may be read, on a device too, for which the run waits then."""
    if tensor.is_meta or not can_read(torch.device("cpu")):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_boolean(value: Any) -> bool:
    return bool(value.dtype == (torch.bool if isinstance(value, Tensor) else bool))
