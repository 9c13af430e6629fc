"""How several passes of a batch go through a model: in one forward or one after the other."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from regdrop.passes.stacking import find_batch_size, repeat_batch, take_items
from regdrop.passes.structures import as_names, copy_structure

Strategy = Literal["stacked", "sequential"]


class StackedRows(NamedTuple):
    """How the rows of a stacked forward repeat those of its first pass, which come first.

    Attributes:
        first: Rows of the first pass.
        total: Rows of all passes.
        origin: The row of the first pass that each row repeats, (total,); None where every pass
            repeats all of them in order.
    """

    first: int
    total: int
    origin: Tensor | None = None


_ROWS: ContextVar[StackedRows | None] = ContextVar("regdrop_stacked_rows", default=None)


def stacked_rows() -> StackedRows | None:
    """Return how the forward is stacked that `run_passes` runs now; None if it is not."""
    return _ROWS.get()


def run_passes(
    forward: Callable[[Any], Any],
    batch: Any,
    *,
    num_passes: int,
    strategy: Strategy = "stacked",
    backward_passes: int | None = None,
    items: Tensor | None = None,
    batch_size: int | None = None,
    shared: Iterable[str] = (),
    join: Callable[[Sequence[Any]], Any] | None = None,
) -> Any:
    """Run a batch several times through a model and return the stacked outputs.

    Args:
        forward: Maps a batch to the model's output, (items, ...): a tensor, or a tuple, list or
            mapping of tensors; or whatever `join` takes.
        batch: The original batch; never changed. Where no forward is stacked and `items` is None,
            it may be anything that `forward` takes; an object that is no structure is handed to
            every forward as it is.
        num_passes: Number of passes.
        strategy: "stacked" for one forward of the batch stacked in blocks, "sequential" for one
            forward a pass.
        backward_passes: Number of first passes with a gradient. The others run first and without
            one, so that their activations are never stored. None: all.
        items: Positions (n,) of the items that all passes but the first see. None: all items.
        batch_size: As in `repeat_batch`.
        shared: As in `repeat_batch`.
        join: Makes one of the outputs of several forwards, in the order of their passes;
            `concatenate_outputs` by default.

    Returns:
        The outputs of pass 0, of pass 1 and so on, along the first dimension.
    """
    selections: list[Tensor | None] = [None, *[items] * (num_passes - 1)]
    graded = num_passes if backward_passes is None else backward_passes
    join = concatenate_outputs if join is None else join
    options: dict[str, Any] = {
        "strategy": strategy,
        "batch_size": batch_size,
        "shared": as_names(shared),
        "join": join,
    }
    rest = None
    if graded < num_passes:
        with torch.no_grad():
            rest = _run(forward, batch, selections[graded:], **options)
    outputs = _run(forward, batch, selections[:graded], **options)
    return outputs if rest is None else join([outputs, rest])


def concatenate_outputs(outputs: Sequence[Any]) -> Any:
    """Return several outputs of one structure as one, along the first dimension.

    Numbers without a dimension, such as an auxiliary loss of each forward, become their mean.

    Raises:
        TypeError: For an output that is no tensor, None, or a tuple, list or mapping of them.
    """
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        is_number = first.dim() == 0 and first.is_floating_point()
        return torch.stack(list(outputs)).mean(0) if is_number else torch.cat(list(outputs))
    if isinstance(first, Mapping):
        names = list(first.keys())  # a TensorDict iterates over its rows
        return {name: concatenate_outputs([output[name] for output in outputs]) for name in names}
    if isinstance(first, (tuple, list)):
        parts = [concatenate_outputs(part) for part in zip(*outputs, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    raise TypeError(
        "forward must return a tensor, or a tuple, list or mapping of tensors, "
        f"got {type(first).__name__}"
    )


def _run(
    forward: Callable[[Any], Any],
    batch: Any,
    selections: list[Tensor | None],
    *,
    strategy: Strategy,
    batch_size: int | None,
    shared: tuple[str, ...],
    join: Callable[[Sequence[Any]], Any],
) -> Any:
    """Run one pass for each selection of items; None selects the whole batch."""
    if strategy == "stacked" and len(selections) > 1:
        size = find_batch_size(batch) if batch_size is None else batch_size
        stacked, rows = _stack(batch, selections, batch_size=size, shared=shared)
        token = _ROWS.set(rows)
        try:
            return forward(stacked)
        finally:
            _ROWS.reset(token)
    outputs = []
    for selection in selections:
        if selection is None:
            # A forward may change what it is given, for the next one or for the caller.
            items = copy_structure(batch, clones=True, shared=shared)
        else:
            items = take_items(batch, selection, batch_size=batch_size, shared=shared)
        outputs.append(forward(items))
    return outputs[0] if len(outputs) == 1 else join(outputs)


def _stack(
    batch: Any, selections: list[Tensor | None], *, batch_size: int, shared: tuple[str, ...]
) -> tuple[Any, StackedRows]:
    """Return the batch stacked in blocks, one for each selection, and what repeats what."""
    options: dict[str, Any] = {"batch_size": batch_size, "shared": shared}
    chosen = [s for s in selections if s is not None]
    if not chosen:
        stacked = repeat_batch(batch, len(selections), **options)
        return stacked, StackedRows(batch_size, len(selections) * batch_size)
    whole = torch.arange(batch_size, device=chosen[0].device)
    index = torch.cat([whole if s is None else s for s in selections])
    stacked = take_items(batch, index, **options)
    if selections[0] is None:
        return stacked, StackedRows(batch_size, len(index), index)
    return stacked, StackedRows(len(selections[0]), len(index))
