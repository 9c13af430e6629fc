"""How many items count: the denominators of both terms, from the target alone.

A trainer needs them before the model has run, for a whole accumulation window. Each terms function
names the function that counts for it, and uses it itself, so that there is one truth.
"""

import inspect
from collections.abc import Callable, Hashable
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


_COUNTS: dict[Any, Callable[..., ItemCounts]] = {}


def counted_by(count: Callable[..., ItemCounts]) -> Callable[[Terms], Terms]:
    """Name the function that counts the items of a terms function.

    Args:
        count: From the target, and those of the terms' options that it has too, to the counts.
    """

    def register(terms: Terms) -> Terms:
        _COUNTS[terms] = count
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
    count, options = _find(terms)
    if count is None:
        return None
    accepted = inspect.signature(count).parameters
    return count(target, **{name: value for name, value in options.items() if name in accepted})


def _find(terms: Callable[..., Any]) -> tuple[Callable[..., ItemCounts] | None, dict[str, Any]]:
    """Return what counts the items of a terms function, and the options that are bound to it."""
    options: dict[str, Any] = {}
    while isinstance(terms, partial):
        options = {**terms.keywords, **options}
        terms = terms.func
    return (_COUNTS.get(terms) if isinstance(terms, Hashable) else None), options
