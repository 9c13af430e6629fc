"""What the fields of settings accept, said by their types and checked in one place."""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from regdrop.arguments import nearest

# Strict: 1 is no true, "1" no number, and nan and infinity are none either.
_CONFIG = ConfigDict(strict=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Part = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def _one_or_three(channels: int) -> int:
    if channels not in (1, 3):
        raise PydanticCustomError("channels", "1 for grey or 3 for RGB")
    return channels


Channels = Annotated[int, AfterValidator(_one_or_three)]
# A part of the names of files.
Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]

_MESSAGES = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "string_pattern_mismatch": "letters, digits, '-', '_', '+' and '.'",
    "mapping_type": "an object",
    "dict_type": "an object",
    "none_required": "null",
    "literal_error": "{expected}",
}


def check_fields(settings: Any) -> None:
    """Check every field of a dataclass by the type that it is declared with.

    Raises:
        ValueError: If one holds anything else, by its name, what it holds and what it accepts.
    """
    kind: Any = type(settings)
    for name, adapter in _adapters(kind).items():
        value = getattr(settings, name)
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            wanted = dict.fromkeys(_message(e) for e in error.errors(include_url=False))
            raise ValueError(f"{name} must be {' or '.join(wanted)}, got {value!r}") from None


def check_parts(settings: Any, parts: Iterable[tuple[str, Any]]) -> None:
    """Check that some fields are settings themselves, which have checked their own.

    Raises:
        ValueError: If one is anything else.
    """
    for name, kind in parts:
        value = getattr(settings, name)
        if not isinstance(value, kind):
            first = fields(kind)[0].name
            raise ValueError(f"{name} has parts, such as {name}.{first}, and cannot be {value!r}")


def check_choice(what: str, name: str, known: Iterable[str]) -> None:
    """Check that a name is one of those that there are.

    Raises:
        ValueError: If not, with all of them and the nearest.
    """
    names = list(known)
    if name not in names:
        raise ValueError(
            f"{what} must be one of {', '.join(names)}; got {name!r}{nearest(str(name), names)}"
        )


@cache
def _adapters(kind: Any) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(kind, include_extras=True)
    own = {field.name: hints[field.name] for field in fields(kind)}
    return {
        name: TypeAdapter(hint, config=_CONFIG)
        for name, hint in own.items()
        if not is_dataclass(hint)
    }


def _message(error: Any) -> str:
    message = _MESSAGES.get(error["type"])
    if message is None:
        return str(error["msg"])
    return message.format(**error.get("ctx", {}))
