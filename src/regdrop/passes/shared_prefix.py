"""The part of a model before its first dropout, computed once for all passes of a stacked batch."""

from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regdrop.arguments import check_integer
from regdrop.passes.batch_size import find_batch_size
from regdrop.passes.obstacles import find_experts, list_obstacles
from regdrop.passes.preserved_state import (
    forget_converted_weights,
    preserve_buffers,
    preserve_random_state,
)
from regdrop.passes.stacking import (
    find_tensors,
    first_items,
    repeat_items,
    take_items,
)
from regdrop.passes.strategies import StackedRows, stacked_rows
from regdrop.passes.structures import as_names

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def share_prefix(
    model: nn.Module,
    until: str,
    *,
    num_passes: int | None = None,
    check_every: int | None = 1000,
    shared: Iterable[str] = (),
) -> "SharedPrefix":
    """Compute a part of a model that has no dropout once for all passes of a stacked batch.

    In a stacked forward the part runs on the rows of the first pass alone and its output is
    repeated for the others: the same outputs and gradients, up to rounding, at less cost. It acts
    while `model` is in training mode, in the stacked forwards of the trainers and, with
    `num_passes`, of a loop of your own. Evaluation, steps of one pass, sequential passes and the
    passes that `backward_passes` runs one by one are left as they are, and so are copies of the
    model, such as averages of its weights, which no handle would reach.

    Wherever it acts, all passes must enter the part alike, which is checked (on a GPU by an
    assertion on the device). In the first such forward, and in every `check_every`-th, the part
    also runs plainly, without gradient, and must give the same.

    Args:
        model: The model; its mode decides.
        until: Name of the submodule that is the part, as in `model.get_submodule`. What runs
            before it runs stacked.
        num_passes: For a loop of your own: every forward in training mode is one of
            `repeat_batch(batch, num_passes)`. Set it to 1 on the handle for forwards of one pass.
        check_every: Forwards from one check to the next; None or 0 checks the first alone.
        shared: Names of the part's keyword arguments without a batch dimension, as in
            `repeat_batch`.

    Returns:
        A handle. `remove()` ends the sharing, as does leaving it as a context manager.

    Raises:
        TypeError: If `model` is no module, or an option of the wrong type.
        ValueError: If `until` names no submodule, or one with an active source of dropout,
            BatchNorm in training mode, a mixture of experts or gradient checkpointing. In a
            forward: if one of these was switched on, the passes differ before or in the part,
            their number does not divide its rows, or it changes its input in place.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_integer("num_passes", num_passes, low=1, or_none=True)
    check_integer("check_every", check_every, low=0, or_none=True)
    if reason := why_not_shared(model, until):
        raise ValueError(f"until={until!r} cannot be shared: {reason}")
    return SharedPrefix(model, until, num_passes, check_every, shared)


def why_not_shared(model: nn.Module, until: str) -> str | None:
    """Return the reason why a part of a model cannot be shared as it is now, or None.

    Raises:
        TypeError: If `until` is no string.
        ValueError: If it names no submodule.
    """
    if not isinstance(until, str):
        raise TypeError(f"until must be the name of a submodule, got {type(until).__name__}")
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if until not in names:
        raise ValueError(
            f"until must name a submodule of {type(model).__name__}, got {until!r}; the first are "
            f"{names[:5]}"
        )
    on = next((o.reason for o in list_obstacles(model, until) if o.is_on()), None)
    return on or find_experts(model, until)


class _Call(NamedTuple):
    """A call of the part that runs now.

    Attributes:
        rows: How its rows are stacked.
        versions: The tensors that it was given less rows of, and their versions then.
        expected: What it gives for all rows; None where that is not looked at.
    """

    rows: StackedRows
    versions: list[tuple[Tensor, int]]
    expected: Any


class SharedPrefix:
    """What `share_prefix` returns.

    Attributes:
        num_passes: Passes of every forward that is not the trainers'; None or 1 leaves it alone.
    """

    def __init__(
        self,
        model: nn.Module,
        until: str,
        num_passes: int | None,
        check_every: int | None,
        shared: Iterable[str],
    ) -> None:
        self.num_passes = num_passes
        self._model, self._until, self._check_every = model, until, check_every
        self._shared = frozenset(as_names(shared))
        self._obstacles = list_obstacles(model, until)
        self._calls = 0
        self._is_copy = False
        self._running: _Call | None = None
        # How the latest forward with a graph was stacked, for its recomputation.
        self._recorded: StackedRows | None = None
        part = model.get_submodule(until)
        # Other hooks of the part see the output that they see without sharing, and pre-hooks that
        # were there before also the input; later ones and forward hooks get that of one pass.
        self._hooks = [
            part.register_forward_pre_hook(self._before, with_kwargs=True),
            part.register_forward_hook(self._after, prepend=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_is_copy": True, "_running": None, "_recorded": None}

    def remove(self) -> None:
        """End the sharing."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> "SharedPrefix":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _before(self, part: nn.Module, args: Any, kwargs: dict[str, Any]) -> Inputs | None:
        """Cut the inputs to the rows of the first pass."""
        self._running = None
        is_on = self._model.training and not self._is_copy
        if not is_on:
            return None
        stacked, is_recomputed = self._find_stacked()
        rows = self._find_rows(stacked, (args, kwargs))
        if rows is None:
            return None
        self._refuse_obstacles()
        is_checked = not is_recomputed and self._is_to_be_checked()
        inputs: Inputs = args, kwargs
        first = first_items(inputs, rows.first, batch_size=rows.total, shared=self._shared)
        cut = _tensors_that_differ(first, inputs)
        # Of several forwards before one backward the latest alone is known: ask, and wait.
        self._require_same_passes(cut, rows, wait=is_checked or is_recomputed)
        expected = self._run_plainly(part, inputs, rows.total) if is_checked else None
        # A recomputation may stop in the middle, and would leave them here.
        kept = [] if is_recomputed else cut
        versions = [(some, some._version) for some, _ in kept if not some.is_inference()]
        self._running = _Call(rows, versions, expected)
        return first

    def _after(self, part: nn.Module, args: Any, output: Any) -> Any:
        """Repeat the output for all passes."""
        call, self._running = self._running, None
        if call is None:
            return None
        # No generator: a compiled model leaves its graph here, which dynamo cannot do inside one
        # where a module's globals hold themselves (torch 2.13).
        for tensor, version in call.versions:
            if tensor._version != version:
                raise self._error(
                    "it changes its input in place, of which the other passes would know nothing; "
                    "set inplace=False or choose another part"
                )
        if any(map(_is_masked_share, find_tensors(output))):
            raise self._error(
                "its output is not summed over the processes yet, as that of an embedding whose "
                "words are split among them; share a module around it"
            )
        repeated = self._repeat(output, call.rows)
        if call.expected is not None:
            _require_same(
                repeated,
                call.expected,
                self._error(
                    "it gives something else than in a plain stacked forward. Dropout or other "
                    "randomness in it makes passes differ, its rows depend on each other, or its "
                    "output has no batch dimension; choose an earlier part"
                ),
                wait=True,
            )
        return repeated

    def _refuse_obstacles(self) -> None:
        for obstacle in self._obstacles:
            if obstacle.is_on():
                raise self._error(obstacle.reason)

    def _is_to_be_checked(self) -> bool:
        """Count a call, and return whether it is compared with a plain one."""
        number, every = self._calls, self._check_every
        self._calls += 1
        return number == 0 or (bool(every) and number % (every or 1) == 0)

    def _require_same_passes(
        self, cut: list[tuple[Tensor, Tensor]], rows: StackedRows, *, wait: bool
    ) -> None:
        """Refuse inputs of which another pass has other values than the first."""
        _require_same(
            self._repeat([some for some, _ in cut], rows),
            [whole for _, whole in cut],
            self._error(
                "the passes enter it with different values. Either dropout acts before it, or the "
                "batch is not stacked in whole blocks by repeat_batch (set num_passes of the "
                "handle to 1 for forwards of one pass), or an input has no batch dimension (name "
                "it in shared)"
            ),
            wait=wait,
        )

    def _find_stacked(self) -> tuple[StackedRows | None, bool]:
        """Return how the forward is stacked, and whether gradient checkpointing recomputes it.

        Then it is stacked as its forward was. Reentrant checkpointing ran that without a graph,
        and may recompute all rows.
        """
        stacked, is_graded = stacked_rows(), torch.is_grad_enabled()
        # With a graph inside a backward.
        if stacked is None and is_graded and torch._C._current_graph_task_id() != -1:
            return self._recorded, True
        self._recorded = stacked if is_graded else None
        return stacked, False

    def _find_rows(self, stacked: StackedRows | None, inputs: Inputs) -> StackedRows | None:
        """Return how the rows of the part are stacked, of which an item may have several."""
        passes = self.num_passes or 1
        if stacked is None and passes == 1:
            return None
        args, kwargs = inputs
        named = {name: value for name, value in kwargs.items() if name not in self._shared}
        try:
            rows = find_batch_size((args, named))
        except ValueError as error:
            raise self._error(str(error)) from error
        total = passes if stacked is None else stacked.total
        if stacked is not None and not rows and not total:
            return None  # an empty batch, as one process of several may have
        if not rows or not total or rows % total:
            what = "num_passes" if stacked is None else "the rows of the stacked batch"
            raise self._error(
                f"its first input has {rows} rows, which must be a positive multiple of {total}, "
                f"{what}"
            )
        if stacked is None:
            return StackedRows(rows // passes, rows)
        each = rows // total
        origin = stacked.origin
        if origin is not None and each > 1:
            offsets = torch.arange(each, device=origin.device)
            origin = (origin[:, None] * each + offsets).flatten()
        return StackedRows(stacked.first * each, rows, origin)

    def _error(self, reason: str) -> ValueError:
        return ValueError(f"until={self._until!r} cannot be shared: {reason}")

    def _repeat(self, first: Any, rows: StackedRows) -> Any:
        """Return what belongs to the first pass repeated for all of them."""
        options: dict[str, Any] = {"batch_size": rows.first, "shared": self._shared}
        if rows.origin is None:
            return repeat_items(first, rows.total // rows.first, **options)
        return take_items(first, rows.origin, **options)

    def _run_plainly(self, part: nn.Module, inputs: Inputs, rows: int) -> Any:
        """Return the part's output of all rows, and leave the run as it was."""
        # It may change its inputs.
        args, kwargs = repeat_items(inputs, 1, batch_size=rows, shared=self._shared)
        with torch.no_grad(), preserve_random_state(), preserve_buffers(part):
            # Without the part's own hooks, which come after `_after`.
            output = part.forward(*args, **kwargs)
        forget_converted_weights()
        return output


def _is_masked_share(tensor: Tensor) -> bool:
    """Return whether a DTensor is a share whose rows are masked by a buffer of its own."""
    return any(hasattr(kind, "mask_buffer") for kind in getattr(tensor, "placements", ()))


def _tensors_that_differ(some: Any, others: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of two structures of one kind that are not the same objects."""
    pairs = zip(find_tensors(some), find_tensors(others), strict=True)
    return [(a, b) for a, b in pairs if a is not b]


@torch.no_grad()
def _require_same(found: Any, expected: Any, error: ValueError, *, wait: bool) -> None:
    """Raise the error where tensors differ beyond rounding.

    On a GPU it is an assertion on the device, for which nobody waits, unless `wait` is set.
    """
    ours, theirs = list(find_tensors(found)), list(find_tensors(expected))
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise error
    for a, b in zip(ours, theirs, strict=True):
        if a.device.type == "cpu" or wait:
            if not (torch.equal(a, b) or bool(_are_close(a, b))):
                raise error
        elif a.device.type == "cuda":
            torch._assert_async(_are_close(a, b), str(error))


def _are_close(a: Tensor, b: Tensor) -> Tensor:
    """Return whether two tensors are the same in every row but for rounding.

    A product with other rows beside it may sum in another order. Rows are compared in the mean:
    the difference must be below the square root of the precision, relative to their values.
    """
    same = (a == b) | (a.isnan() & b.isnan())
    if not (a.is_floating_point() or a.is_complex()) or not a.numel():
        return same.all()
    wide = torch.promote_types(a.dtype, torch.float32)
    difference = torch.where(same, 0, (a.to(wide) - b.to(wide)).abs())
    size = torch.where(a.isfinite(), a, 0).to(wide).abs()
    if a.dim() > 1:
        difference, size = difference.flatten(1).mean(1), size.flatten(1).mean(1)
    bound: Tensor = _precision(a) ** 0.5 * (size + size.mean())
    return (difference <= bound).all()


def _precision(tensor: Tensor) -> float:
    """Return the relative precision with which a tensor was computed."""
    precision = torch.finfo(tensor.dtype).eps
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        precision = max(precision, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    # TensorFloat-32 has the mantissa of half precision.
    return max(precision, 2.0**-10) if kind == "cuda" and precision > 1e-12 else precision
