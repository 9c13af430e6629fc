"""How many items count: the denominators of both terms, from the target alone.

A trainer needs them before the model has run, for a whole accumulation window. Each terms function
names the function that counts for it, and uses it itself, so that there is one truth. It also names
its options that belong to items, so that a part of the items can be taken of them.
"""

import inspect
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

Terms = TypeVar("Terms", bound=Callable[..., Any])


class ItemCounts(NamedTuple):
    """The denominators of the means of both terms.

    Attributes:
        nll: Number (or class weight) of the items whose NLL counts, a scalar.
        kl: Number of the items whose divergence counts, a scalar.
    """

    nll: Tensor
    kl: Tensor


class _Rules(NamedTuple):
    """What `counted_by` was told of a terms function."""

    counting: Callable[..., ItemCounts]
    of_items: Sequence[str]
    of_elements: Sequence[str]


_RULES: dict[Any, _Rules] = {}


def counted_by(
    count: Callable[..., ItemCounts],
    *,
    of_items: Sequence[str] = (),
    of_elements: Sequence[str] = (),
) -> Callable[[Terms], Terms]:
    """Name the function that counts the items of a terms function, and options that are of items.

    Args:
        count: From the target, and those of the terms' options that it has too, to the counts.
        of_items: Options that are a tensor (batch,).
        of_elements: Options that are a tensor which is broadcast to the target.
    """

    def register(terms: Terms) -> Terms:
        _RULES[terms] = _Rules(count, of_items, of_elements)
        return terms

    return register


def is_counted(terms: Callable[..., Any]) -> bool:
    """Return whether a terms function, its options bound or not, is of this library."""
    return _find(terms)[0] is not None


def count_items(terms: Callable[..., Any], target: Any) -> ItemCounts | None:
    """Return the denominators of a target's terms without any output of a model.

    Args:
        terms: A terms function of this library, its options bound by `functools.partial` or not.
        target: The original, unstacked target.

    Returns:
        The counts; None where the terms are not of this library, so that nobody can know.
    """
    rules, options = _find(terms)
    if rules is None:
        return None
    accepted = inspect.signature(rules.counting).parameters
    bound = {name: value for name, value in options.items() if name in accepted}
    return rules.counting(target, **bound)


def terms_of_items(terms: Callable[..., Any], target: Tensor, items: Tensor) -> Callable[..., Any]:
    """Return terms for some items of a target: what is bound to them is that of these items.

    Args:
        terms: A terms function, its options bound by `functools.partial` or not; one that is not of
            this library is returned as it is.
        target: The target of all items, which the options fit.
        items: Positions (n,) of the items.
    """
    rules, options = _find(terms)
    if rules is None:
        return terms
    part = {}
    for name in (*rules.of_items, *rules.of_elements):
        option = options.get(name)
        if option is not None:
            whole = option if name in rules.of_items else option.expand(target.shape)
            part[name] = whole.to(items.device)[items]
    return partial(terms, **part)


def _find(terms: Callable[..., Any]) -> tuple[_Rules | None, dict[str, Any]]:
    """Return what is known of a terms function, and the options that are bound to it."""
    options: dict[str, Any] = {}
    while isinstance(terms, partial):
        options = {**terms.keywords, **options}
        terms = terms.func
    return (_RULES.get(terms) if isinstance(terms, Hashable) else None), options
