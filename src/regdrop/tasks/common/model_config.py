"""A user's settings of a Hugging Face configuration: checked, and named where no model can be."""

import inspect
import math
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regdrop.arguments import nearest
from regdrop.tasks.notices import say_once

# What follows from the vocabulary, by which a task sets it.
OF_VOCABULARY = dict.fromkeys(
    ("vocab_size", "decoder_vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"),
    "what the vocabulary has",
)


def find_config_class(options: Mapping[str, Any], kind: str, known: Container[Any]) -> Any:
    """Return the class of the configuration of a new model, by its `model_type`.

    Args:
        options: The user's settings.
        kind: What the task needs, for the error.
        known: The configuration classes that fit.

    Raises:
        ValueError: If there is no such type, or it is of another kind.
    """
    from transformers import CONFIG_MAPPING

    name = options.get("model_type")
    if name not in CONFIG_MAPPING.keys():  # noqa: SIM118 - it has no __contains__ for what was added
        raise ValueError(
            f"model_config.model_type must be a type of model that transformers has, got {name!r}"
            f"{nearest(str(name), CONFIG_MAPPING.keys())}"
        )
    found = CONFIG_MAPPING[name]
    if found not in known:
        raise ValueError(f"model_config.model_type must be {kind}, got {name!r}")
    return found


def check_model_config(
    options: Mapping[str, Any], standard: Any, fixed: Mapping[str, str] | None = None
) -> None:
    """Check the names and the numbers of a user's settings.

    transformers leaves names that it does not know in a configuration, where nothing reads them.

    Args:
        options: The user's settings.
        standard: The configuration that they change, or its class.
        fixed: What the task sets itself, with what it is, in words.

    Raises:
        ValueError: For a name that there is not or that the task sets, a number that is infinite
            or negative where the standard one is not, or a dropout rate outside 0 to 1.
    """
    with named_model_config(options):
        own = standard() if isinstance(standard, type) else standard
        known = _known_names(own)
    for name, value in options.items():
        if fixed and name in fixed:
            raise ValueError(f"model_config cannot have {name!r}: it is {fixed[name]}")
        if name not in known and not _is_read(type(own), name, value):
            raise ValueError(
                f"model_config has no {name!r}: {type(own).__name__} does not know it "
                f"and ignores it{nearest(name, known)}"
            )
        standard_value = vars(own).get(own.attribute_map.get(name, name))
        numbers, usual = (list(_numbers_in(each)) for each in (value, standard_value))
        wanted = None
        if not all(math.isfinite(number) or number in usual for number in numbers):
            wanted = "finite"
        elif "drop" in name and not all(0 <= number <= 1 for number in numbers):
            wanted = "from 0 to 1"
        elif usual and min(usual) >= 0 and min(numbers, default=0) < 0:
            wanted = "at least 0"
        if wanted is not None:
            raise ValueError(f"model_config.{name} must be {wanted}, got {value!r}")


def holds_model(folder: Path | None) -> bool:
    """Return whether a folder holds a model that was trained, whose settings are its own."""
    return folder is not None and (folder / "config.json").exists()


@contextmanager
def refused_if_new(folder: Path | None, *, begun: bool) -> Iterator[None]:
    """Let wrong settings pass where a run was begun, or a model trained, with them.

    An older version took what the block refuses. A run that goes on with it says so in one line.

    Args:
        folder: May hold a model that was trained.
        begun: Whether the run was begun.
    """
    try:
        yield
    except ValueError as error:
        if holds_model(folder):
            return
        if not begun:
            raise
        say_once(f"{error}. The run was begun with this, and goes on as it was")


@contextmanager
def named_model_config(options: Mapping[str, Any]) -> Iterator[None]:
    """Turn whatever a model class says of settings that it cannot have into one line.

    Raises:
        ValueError: With the settings, and what the class says.
    """
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(
            f"model_config={dict(options)} cannot be: {kind}{' '.join(str(error).split())}"
        ) from error


def _known_names(config: Any) -> set[str]:
    kind = type(config)
    names = {*vars(config), *kind.attribute_map, "model_type", "attn_implementation"}
    names |= {name for name, value in inspect.getmembers(kind) if isinstance(value, property)}
    names |= {name for each in kind.__mro__ for name in inspect.signature(each).parameters}
    return {name for name in names if not name.startswith("_")} - {"args", "kwargs"}


def _is_read(kind: Any, name: str, value: Any) -> bool:
    """Return whether a class makes another configuration of an argument that none of its names is.

    Such are old names, like those of rotary embeddings, which it moves to where they are now.
    """
    try:
        before, after = kind().to_dict(), kind(**{name: value}).to_dict()
    except Exception:  # whatever it says of the value is said where the model is made
        return True
    after.pop(name, None)
    return bool(before != after)


def _numbers_in(value: Any) -> Iterator[float]:
    """Yield the numbers of a value, or of a list."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _numbers_in(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _numbers_in(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
