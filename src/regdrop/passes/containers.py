"""Objects of other libraries that hold the items of a batch and can select some of them.

The classes of tensordict select items by themselves. The graphs of PyTorch Geometric are joined to
one, whose edges count its nodes, so that they are taken apart and joined again.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# What a batch of graphs writes down about them.
_RECORDED = re.compile(r"(^|_)(batch|ptr)$")
_CHANGED = (
    "batch holds a {} that was changed after its graphs were joined ({}): transform the graphs "
    'before, or use passes="sequential" with fraction=1.0'
)


def is_container(value: Any) -> bool:
    """Return whether a value is a graph, a batch of graphs, or of a class of tensordict.

    A TensorDict without a batch size is a mapping like any other.
    """
    return is_graph(value) or (_is_tensordict(value) and not _is_plain_mapping(value))


def is_graph(value: Any) -> bool:
    """Return whether a value is a graph, or a batch of graphs, of PyTorch Geometric."""
    return hasattr(type(value), "__cat_dim__") and hasattr(type(value), "__inc__")


def count_graphs(value: Any) -> int:
    """Return the number of graphs in a batch of them; 1 for a graph."""
    return int(value.num_graphs) if hasattr(value, "to_data_list") else 1


def find_graph_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a graph or of a batch of graphs."""
    for store in value.stores:
        yield from (item for item in store.values() if isinstance(item, Tensor))


def take_from_container(value: Any, index: list[int], size: int, dim: int) -> Any:
    """Return the items of a container at some positions, in order.

    A container of another number of items passes through.

    Args:
        value: A graph, a batch of graphs, a TensorDict or an object of a tensorclass.
        index: The positions, which may repeat.
        size: Number of items of the batch that the container is part of.
        dim: Dimension of the items; graphs have only the first.

    Raises:
        ValueError: For a graph that was sampled, or joined by other means than a `Batch`; for
            tensors of the items whose container has no such dimension.
    """
    if is_graph(value):
        if dim:
            raise ValueError(f"dim must be 0 for graphs, got {dim}")
        return _take_graphs(value, index) if count_graphs(value) == size else value
    if len(value.batch_size) <= dim:
        for item in value.values():
            if isinstance(item, Tensor) and item.dim() > dim and item.shape[dim] == size:
                raise ValueError(
                    f"batch holds a {type(value).__name__} whose batch_size, "
                    f"{list(value.batch_size)}, has no dimension {dim}, where its tensors have the "
                    f"{size} items; give it that batch_size, or name it in shared"
                )
        return value
    if value.batch_size[dim] != size:
        return value
    positions = torch.tensor(index, device=value.device)
    return value[(slice(None),) * dim + (positions,)]


def _take_graphs(value: Any, index: list[int]) -> Any:
    # The core imports torch alone; whoever made the graph has loaded its library.
    library = sys.modules["torch_geometric.data"]
    if not hasattr(value, "to_data_list"):
        _refuse_joined(value)
        return library.Batch.from_data_list([value] * len(index))
    try:
        graphs = value.to_data_list()
    except (IndexError, RuntimeError) as error:
        raise ValueError(_CHANGED.format(type(value).__name__, error)) from error
    _refuse_changed(value, graphs)
    followed = [
        name.removesuffix("_batch")
        for store in value.stores
        for name in store
        if name.endswith("_batch") and name.removesuffix("_batch") in store
    ]
    return library.Batch.from_data_list([graphs[i] for i in index], follow_batch=followed)


def _refuse_joined(value: Any) -> None:
    """Raise for one graph that is several, or a part of one."""
    for name, meaning in (
        ("batch", "joins several graphs by itself: give a Batch, as PyG's DataLoader does"),
        ("batch_size", "is a sampled neighbourhood, of whose nodes only the first count"),
    ):
        if name in value:
            raise ValueError(
                f"batch holds a {type(value).__name__} with {name}, so that it {meaning}; or use "
                'passes="sequential" with fraction=1.0'
            )


def _refuse_changed(value: Any, graphs: list[Any]) -> None:
    """Raise where the graphs of a batch, taken apart, hold less than the batch does.

    Their places are those of the time when they were joined.
    """
    for number, store in enumerate(value.stores):
        for name, item in store.items():
            if not isinstance(item, Tensor) or _RECORDED.search(name):
                continue
            dim = value.__cat_dim__(name, item, store)
            if dim is not None and not isinstance(dim, int):
                continue
            parts = [g.stores[number][name] for g in graphs if name in g.stores[number]]
            found = len(parts) if dim is None else sum(part.size(dim) for part in parts)
            if found != item.size(dim or 0):
                reason = f"{found} of the {item.size(dim or 0)} rows of {name} belong to its graphs"
                raise ValueError(_CHANGED.format(type(value).__name__, reason))


def _is_tensordict(value: Any) -> bool:
    is_like_a_tensor = hasattr(type(value), "__torch_function__")
    return is_like_a_tensor and isinstance(getattr(value, "batch_size", None), torch.Size)


def _is_plain_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and not value.batch_size  # type: ignore[attr-defined]
