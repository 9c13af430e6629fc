"""How several passes of a batch go through a model: in one forward or one after the other."""

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from regdrop.passes.batch_size import find_batch_size
from regdrop.passes.containers import is_graph
from regdrop.passes.outputs import concatenate_outputs, count_rows
from regdrop.passes.preserved_state import forget_converted_weights
from regdrop.passes.stacking import repeat_batch, take_items
from regdrop.passes.structures import as_names, copy_structure, find_leaves

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


class _Running(threading.local):
    """The forward that a thread runs now; torch.compile follows it, and no context variable."""

    def __init__(self) -> None:
        self.rows: StackedRows | None = None
        self.number: int | None = None


_RUNNING = _Running()


def stacked_rows() -> StackedRows | None:
    """Return how the forward is stacked that `run_passes` runs now; None if it is not."""
    return _RUNNING.rows


def running_pass() -> int | None:
    """Return the number of the (first) pass that `run_passes` runs now; None if it runs none."""
    return _RUNNING.number


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
    rows: Iterable[int] = (),
    join: Callable[[Sequence[Any]], Any] | None = None,
) -> Any:
    """Run a batch several times through a model and return the stacked outputs.

    Args:
        forward: Maps a batch to the model's output, (items, ...): a tensor, or what
            `concatenate_outputs` takes besides; or whatever `join` takes. Of one forward alone it
            may be anything.
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
        rows: Numbers of rows of a pass that an output may have besides those of the items, such as
            those of the target.
        join: Makes one of the outputs of several forwards, in the order of their passes; by default
            `concatenate_outputs` of what `refuse_other_rows` lets through.

    Returns:
        The outputs of pass 0, of pass 1 and so on, along the first dimension; of one forward alone
        they are as it returned them.

    Raises:
        TypeError, ValueError: For what is refused where outputs are joined.
    """
    selections: list[Tensor | None] = [None, *[items] * (num_passes - 1)]
    graded = num_passes if backward_passes is None else backward_passes
    # One pass alone may be a part of a pass that runs already.
    begin = 0 if num_passes > 1 else running_pass() or 0
    run = partial(_run, forward, batch, batch_size=batch_size, shared=as_names(shared))
    first, others = _group(selections[:graded], strategy), _group(selections[graded:], strategy)
    with torch.no_grad():
        rest = [run(group, graded + n) for n, group in enumerate(others)]
    if others:
        forget_converted_weights()
    outputs = [run(group, begin + n) for n, group in enumerate(first)] + rest
    if len(outputs) == 1:
        return outputs[0]
    if join is not None:
        return join(outputs)
    groups = [*first, *others]
    refuse_other_rows(outputs, groups, batch, batch_size=batch_size, rows=rows)
    passes = [len(group) for group in groups]
    return concatenate_outputs(outputs, passes=passes, backward_passes=graded)


def refuse_other_rows(
    outputs: Sequence[Any],
    groups: Sequence[Sequence[Tensor | None]],
    batch: Any,
    *,
    batch_size: int | None = None,
    rows: Iterable[int] = (),
) -> None:
    """Raise for a tensor in outputs that are to be joined whose rows are not those of a pass.

    It must have one row an item, or several, or a number of rows that is named, or that of packed
    tokens. Where the batch does not tell its items, or holds graphs or nested tensors, whose nodes
    and tokens are rows too, all passes must only have as many as each other.

    Args:
        outputs: Those of several forwards.
        groups: For each forward, what each of its passes saw: positions of items, or None for all.
        batch: The original batch.
        batch_size: As in `repeat_batch`.
        rows: Numbers of rows that a pass of all items may have, such as those of the target.

    Raises:
        ValueError: For such a tensor, by its name.
        TypeError: For what `concatenate_outputs` refuses.
    """
    passes = [len(group) for group in groups]
    leaves = list(find_leaves(batch))
    size = _tell_batch_size(batch, leaves) if batch_size is None else batch_size
    scales = [passes]
    if size is not None:
        seen = [sum(size if s is None else len(s) for s in group) for group in groups]
        tokens = [len(leaf.data) for leaf in leaves if isinstance(leaf, PackedSequence)]
        scales = [seen, *([times * count for times in passes] for count in (*rows, *tokens))]
    counts = [count_rows(output) for output in outputs]
    for name in counts[0]:
        found = [count[name] for count in counts if name in count]
        if len(found) < len(counts):
            continue  # outputs of different structures are refused where they are joined
        if not any(_are_multiples(found, scale) for scale in scales):
            raise ValueError(
                f"forward must return {name} with one row an item (or several), or as a number, "
                "since the outputs of several forwards are joined along the first dimension: got "
                f"{found} rows for {scales[0]} {'passes' if size is None else 'items'}; leave it "
                "out, repeat it for every item, or give batch_size if these are not the items"
            )


def _are_multiples(found: Sequence[int], scale: Sequence[int]) -> bool:
    times = found[0] // scale[0] if scale[0] else 0
    return all(rows == times * unit for rows, unit in zip(found, scale, strict=True))


def _tell_batch_size(batch: Any, leaves: Iterable[Any]) -> int | None:
    if any(is_graph(leaf) or getattr(leaf, "is_nested", False) for leaf in leaves):
        return None
    try:
        return find_batch_size(batch)
    except ValueError:
        return None


def _group(selections: list[Tensor | None], strategy: Strategy) -> list[list[Tensor | None]]:
    """Return what the passes of each forward see."""
    if strategy == "stacked" and selections:
        return [selections]
    return [[selection] for selection in selections]


def _run(
    forward: Callable[[Any], Any],
    batch: Any,
    selections: Sequence[Tensor | None],
    number: int,
    *,
    batch_size: int | None,
    shared: tuple[str, ...],
) -> Any:
    """Run one forward, of a pass for each selection of items; None selects the whole batch.

    Its first pass has the number.
    """
    rows = _RUNNING.rows
    if len(selections) > 1:
        size = find_batch_size(batch) if batch_size is None else batch_size
        given, rows = _stack(batch, selections, batch_size=size, shared=shared)
    elif selections[0] is None:
        # A forward may change what it is given, for the next one or for the caller.
        given = copy_structure(batch, clones=True, shared=shared)
    else:
        given = take_items(batch, selections[0], batch_size=batch_size, shared=shared)
    return _run_as(forward, given, number, rows)


def run_as_pass(forward: Callable[[Any], Any], number: int, batch: Any) -> Any:
    """Run a forward beside a step's own as the pass of a number, whose dropout rate it then has."""
    return _run_as(forward, batch, number, None)


def _run_as(
    forward: Callable[[Any], Any], batch: Any, number: int, rows: StackedRows | None
) -> Any:
    outer = _RUNNING.rows, _RUNNING.number
    _RUNNING.rows, _RUNNING.number = rows, number
    try:
        return forward(batch)
    finally:
        _RUNNING.rows, _RUNNING.number = outer


def _stack(
    batch: Any, selections: Sequence[Tensor | None], *, batch_size: int, shared: tuple[str, ...]
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
