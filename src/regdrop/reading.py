"""What the loss of a step reads of its forwards, and the terms that it computes of that."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regdrop.heads import Head
from regdrop.kernels import Implementation, Projection
from regdrop.loss import ItemTerms, TermsFunction, is_counted
from regdrop.step_terms import cut_outputs_of

# Backward nodes that do not need what they returned, and views, which are asked further.
_NEED_NOTHING = frozenset(
    f"{name}Backward0"
    for name in ("Add", "Addmm", "Bmm", "Cat", "Clone", "Index", "Mm", "Mul", "Stack", "ToCopy")
)
_VIEWS = frozenset({"UnsafeViewBackward0", "ViewBackward0"})
# Packages whose own forward hooks keep nothing that a module returns.
_LIBRARIES = frozenset({"accelerate", "deepspeed", "peft", "regdrop", "torch", "transformers"})


class Reading(NamedTuple):
    """What one forward gave the loss to read, or several, one after the other.

    Attributes:
        scores: What the loss compares, (items, ...), the rows of pass 0 first: logits, or with
            `projection` the states before them.
        output: The model's output of the forward with pass 0.
        losses: A loss that each forward with a gradient returned beside the scores: the model's
            own, or that of its experts.
        projection: The last layer, where it is left to the loss.
    """

    scores: Tensor
    output: Any
    losses: tuple[Tensor, ...] = ()
    projection: Projection | None = None


def join_readings(readings: Sequence[Reading]) -> Reading:
    """Return the readings of several forwards as one; `run_passes` takes this as `join`."""
    scores = torch.cat([reading.scores for reading in readings])
    losses = tuple(loss for reading in readings for loss in reading.losses)
    return readings[0]._replace(scores=scores, losses=losses)


def check_implementation(head: Head, impl: Implementation) -> None:
    """Refuse a choice of kernels beside a loss that has none.

    Raises:
        ValueError: For an `impl` beside a head of another loss than a cross entropy.
    """
    if impl != "auto" and not head.takes_kernel:
        raise ValueError(
            f"impl={impl!r} chooses how a cross entropy is computed, and the terms of this "
            "head are not those of cross_entropy_terms; use impl='auto'"
        )


def head_terms(head: Head, impl: Implementation, overwrites: bool) -> TermsFunction:
    """Return a head's terms with the options of its kernel bound.

    Args:
        head: The head of a micro-batch.
        impl: How a cross entropy is computed.
        overwrites: Whether the gradient overwrites the logits, as `may_overwrite` tells.
    """
    bound: TermsFunction = head.terms
    if head.takes_kernel:
        unbound: Any = head.terms
        bound = partial(unbound, impl=impl, inplace=overwrites)
    if is_counted(head.terms):
        return bound
    own_terms = cut_outputs_of(bound)

    def terms(
        outputs: Tensor,
        target: Tensor,
        /,
        *,
        num_passes: int,
        backward_passes: int | None = None,
    ) -> ItemTerms:
        found = own_terms(outputs, target, num_passes=num_passes, backward_passes=backward_passes)
        if target is head.target:
            require_counts(head, found)
        return found

    return terms


def require_counts(head: Head, terms: ItemTerms) -> None:
    """Refuse a head that counts other items than its terms do.

    On a GPU it is an assertion on the device, for which nobody waits.

    Raises:
        ValueError: If they differ.
    """
    counts = head.counts()
    same = (counts.kl == terms.kl_count) & torch.isclose(
        counts.nll.to(terms.nll), terms.nll_count.to(terms.nll)
    )
    message = (
        "count of rdrop_head's Head must give what its terms count: the loss of a window would be "
        "divided by another number of items. Give Head(count=...) a function from the target to "
        "regdrop.loss.ItemCounts"
    )
    if same.device.type == "cuda":
        torch._assert_async(same, message)
    elif not bool(same):
        raise ValueError(
            f"{message}; it gave {counts.nll.item():g} and {counts.kl.item():g}, the terms "
            f"{terms.nll_count.item():g} and {terms.kl_count.item():g}"
        )


def may_overwrite(model: nn.Module, head: Head, impl: Implementation, logits: Tensor) -> bool:
    """Return whether the gradient may overwrite logits: none but the loss reads them.

    Args:
        model: Whose logits they are.
        head: The head of a micro-batch.
        impl: How a cross entropy is computed.
        logits: What the head read of the model.
    """
    if not head.takes_kernel or impl == "eager" or not is_free_to_overwrite(logits):
        return False
    return not _has_watchers(model) and not _keeps(model, logits)


def _has_watchers(model: nn.Module) -> bool:
    """Return whether somebody's forward hooks may keep what a module returns."""
    tables = (module._forward_hooks for module in model.modules())
    everywhere = nn.modules.module._global_forward_hooks
    hooks = (hook for table in (everywhere, *tables) for hook in table.values())
    return any(_home(hook) not in _LIBRARIES for hook in hooks)


def _home(hook: Any) -> str:
    """Return the package of a hook's function, whatever is bound to it."""
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", None)).split(".")[0]


def _keeps(model: nn.Module, logits: Tensor) -> bool:
    """Return whether a model, or a part of it, keeps its last logits as an attribute."""
    place = logits.untyped_storage().data_ptr()
    held = (value for module in (model, *model.children()) for value in vars(module).values())
    plain = (x for x in held if type(x) is Tensor and x.layout is torch.strided and not x.is_nested)
    return any(x.untyped_storage().data_ptr() == place for x in plain)


def refuse_second_gradient(loss: Tensor) -> None:
    """Let a second gradient of a loss say what it cannot have: the first overwrote the logits."""
    taken: list[bool] = []

    def check(_: Any) -> None:
        if taken:
            raise RuntimeError(
                "the gradient of this loss was asked for twice, and the first one overwrote the "
                "logits: set impl='eager' in the RDropConfig, or call compute_loss with "
                "return_outputs=True"
            )
        taken.append(True)

    if loss.grad_fn is not None:
        loss.grad_fn.register_prehook(check)


def is_free_to_overwrite(logits: Tensor) -> bool:
    """Return whether nothing in the backward needs the values of these logits.

    True behind a linear layer, a copy, a concatenation or a sum, as in nearly all heads; False
    where that cannot be told, as behind a tanh or in a compiled model.
    """
    node = logits.grad_fn
    while node is not None and type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and type(node).__name__ in _NEED_NOTHING
