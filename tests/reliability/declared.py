"""What the fields of settings take, read from the types that they are declared with."""

import math
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def holders(task):
    """Return what holds the settings of a task, by the prefix of their names."""
    return {"": task, "training.": task.training, "rdrop.": task.rdrop}


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a declared type as it stands; no number is infinite."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, inner[0])
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and all(fits(x, inner[0]) for x in value)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return isinstance(value, dict)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return value is None if hint in (None, NoneType) else hint is Any or type(value) is hint
