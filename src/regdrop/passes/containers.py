"""Objects of other libraries that hold the items of a batch and can select some of them.

The classes of tensordict select items by themselves. The graphs of PyTorch Geometric are joined to
one, whose edges count its nodes, so that they are taken apart and joined again.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


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
        return _take_graphs(value, index) if count_graphs(value) == size and not dim else value
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
    if hasattr(value, "to_data_list"):
        graphs = value.to_data_list()
    else:
        for name, meaning in (
            ("batch", "joins several graphs by itself: give a Batch, as PyG's DataLoader does"),
            ("batch_size", "is a sampled neighbourhood, of whose nodes only the first count"),
        ):
            if name in value:
                raise ValueError(
                    f"batch holds a {type(value).__name__} with {name}, so that it {meaning}; or "
                    'use passes="sequential" with fraction=1.0'
                )
        graphs = [value]
    # The core imports torch alone; whoever made the graph has loaded its library.
    library = sys.modules["torch_geometric.data"]
    return library.Batch.from_data_list([graphs[position] for position in index])


def _is_tensordict(value: Any) -> bool:
    is_like_a_tensor = hasattr(type(value), "__torch_function__")
    return is_like_a_tensor and isinstance(getattr(value, "batch_size", None), torch.Size)


def _is_plain_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and not value.batch_size  # type: ignore[attr-defined]
