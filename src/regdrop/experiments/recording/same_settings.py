"""Whether what is found was made with the settings that are wanted now."""

from pathlib import Path
from typing import Any

from regdrop.config import RDropConfig


def check_same_config(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Check that what was found in a file was made with the settings that are wanted.

    Raises:
        ValueError: If not, with the names of the settings that differ.
    """
    if "rdrop" in found:  # what was not an option then had the value that is its default now
        found = {**found, "rdrop": {**RDropConfig().to_dict(), **found["rdrop"]}}
    if names := _differences(found, wanted):
        raise ValueError(
            f"{path} was made with other settings ({', '.join(names)}); "
            "choose another output folder, or remove it to train again"
        )


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return the names of settings that differ; what did not exist then cannot differ."""
    names = []
    for name in sorted(found.keys() | wanted.keys()):
        if name in found and name not in wanted:
            names.append(name)
        elif isinstance(found.get(name), dict) and isinstance(wanted.get(name), dict):
            names += [f"{name}.{inner}" for inner in _differences(found[name], wanted[name])]
        elif name in found and found[name] != wanted[name]:
            names.append(name)
    return names
