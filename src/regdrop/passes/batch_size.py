"""How many items a batch has, and which of its tensors tells."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from regdrop.arguments import check_integer
from regdrop.passes.containers import count_graphs, is_graph
from regdrop.passes.places import find_told_dim
from regdrop.passes.structures import find_named_leaves, named_children

# Tensors whose first dimension is the batch size in the Hugging Face libraries.
_MODEL_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features")


def find_batch_size(batch: Any, dim: int | Mapping[str, int] = 0) -> int:
    """Return the number of items of a batch by the rules of `repeat_batch`.

    Raises:
        ValueError: If there is no tensor with that dimension.
    """
    return _tell_size(batch, dim)[0]


def name_size(batch: Any) -> str:
    """Return what told `find_batch_size` the number of items, in words."""
    _, name, leaf = _tell_size(batch, 0)
    shape = getattr(leaf, "shape", None)
    of_shape = "" if shape is None else f" of shape {tuple(shape)}"
    return f"{name or 'the first ' + type(leaf).__name__}{of_shape}"


def _tell_size(batch: Any, dim: int | Mapping[str, int]) -> tuple[int, str, Any]:
    """Return the number of items, the name of what told it, and that itself."""
    most, by_name = split_dims(dim)
    named = named_children(batch)
    for name in _MODEL_INPUTS:
        value = named.get(name)
        place = by_name.get(name, most)
        if isinstance(value, Tensor) and value.dim() > place:
            return value.size(place), name, value  # a nested tensor has no shape
    of_arrays = None
    for names, leaf in find_named_leaves(batch):
        name = names[-1] if names and isinstance(names[-1], str) else ""
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0]), name, leaf
        if is_graph(leaf):
            return count_graphs(leaf), name, leaf
        place = find_told_dim(names, leaf.ndim, most, by_name)
        if leaf.ndim > place:
            if isinstance(leaf, Tensor):
                return leaf.size(place), name, leaf  # no int: it may be a symbol
            of_arrays = (int(leaf.shape[place]), name, leaf) if of_arrays is None else of_arrays
    if of_arrays is not None:
        return of_arrays
    raise ValueError(
        f"batch must hold a tensor with a batch dimension, or batch_size must be given; "
        f"got {type(batch).__name__} without one; tensors are seen in tuples, lists, mappings, "
        "dataclasses and their like"
    )


def split_dims(dim: int | Mapping[str, int]) -> tuple[int, Mapping[str, int]]:
    """Return the dimension of the items in most tensors, and those of tensors by their names."""
    if not isinstance(dim, Mapping):
        check_integer("dim", dim, low=0)
        return dim, {}
    for name, place in dim.items():
        check_integer(f"dim[{name!r}]", place, low=0)
    return 0, dim
