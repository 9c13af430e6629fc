"""Checks of single arguments, and the label that marks no item: shared by all floors."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

# What torch's cross entropy and the library of Hugging Face mark an item by that does not count.
IGNORE_INDEX = -100


def check_number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float = math.inf,
    above: float | None = None,
) -> None:
    """Raise unless the argument is a real number, of Python or of NumPy.

    With a bound it must be finite too, from `low` to `high`, or above `above`.
    """
    # First what it nearly always is, which is cheaper to see.
    if type(value) is not float and not _is_a(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # Comparisons alone: torch.compile follows them for a number that changes from call to call.
    if low is not None and not (low <= value <= high and value < math.inf):
        bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be finite and {bound}, got {value}")
    if above is not None and not above < value < math.inf:
        raise ValueError(f"{name} must be finite and above {above}, got {value}")


def check_alpha(alpha: Any) -> None:
    """Raise unless the argument is a weight of the divergence: a number of at least 0."""
    if isinstance(alpha, str) and alpha == "auto":
        raise TypeError(
            "alpha must be a number, got 'auto', which RDropConfig takes, for rdrop_step and the "
            "trainers; here give regdrop.AlphaController(total_steps).alpha_at(step), its number "
            "at a step"
        )
    check_number("alpha", alpha, low=0)


def check_integer(name: str, value: Any, *, low: int | None = None, or_none: bool = False) -> None:
    """Raise unless the argument is an integer, of Python or of NumPy, of at least `low`.

    With `or_none` it may be None too.
    """
    if value is None and or_none:
        return
    none, of_none = (" or None", "None or ") if or_none else ("", "")
    # First what it nearly always is, which is cheaper to see.
    if type(value) is not int and not _is_a(value, Integral):
        raise TypeError(f"{name} must be an integer{none}, got {type(value).__name__}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be {of_none}at least {low}, got {value}")


def _is_a(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless the argument is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question after the known name that a misspelt one is like; empty if none is."""
    found = get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
