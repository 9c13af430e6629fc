"""Checks of single arguments, and the label that marks no item: shared by all floors."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

# What torch's cross entropy and the library of Hugging Face mark an item by that does not count.
IGNORE_INDEX = -100


def check_number(name: str, value: Any) -> None:
    """Raise TypeError unless the argument is a real number."""
    if type(value) is float:  # nearly always, and cheaper to see
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_range(name: str, value: float, *, low: float, high: float = math.inf) -> None:
    """Raise unless the argument is a finite number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and low <= value <= high):
        bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be finite and {bound}, got {value}")


def check_integer(name: str, value: Any, *, low: int | None = None, or_none: bool = False) -> None:
    """Raise unless the argument is an integer of at least `low`, or None where that is accepted."""
    if value is None and or_none:
        return
    none, of_none = (" or None", "None or ") if or_none else ("", "")
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer{none}, got {type(value).__name__}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be {of_none}at least {low}, got {value}")


def check_index(name: str, value: Any) -> None:
    """Raise TypeError unless the argument is an integer, of Python or of NumPy."""
    if type(value) is int:  # nearly always, and cheaper to see
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless the argument is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question after the known name that a misspelt one is like; empty if none is."""
    found = get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
