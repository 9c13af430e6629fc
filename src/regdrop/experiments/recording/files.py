"""JSON files that appear whole or not at all, and reading them with errors that name them."""

import json
import re
from pathlib import Path
from typing import Any

from regdrop.whole_files import FULL, write_text

# What errors of torch's and of safetensors' writers hold.
_UNWRITTEN = ("PytorchStreamWriter", "inline_container", "os error ")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    write_text(path, _dump(content))


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Return the object of a JSON file.

    Args:
        path: The file.
        what: What it should be, for the error.

    Raises:
        ValueError: If it cannot be read, or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not {what}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {what}: it holds {type(content).__name__}")
    return content


def disk_error(error: Exception, folder: Path) -> OSError | None:
    """Return what is said of a file in a folder that could not be written, as the system's error.

    torch and safetensors have errors of their own for it; the system's names the file where it is
    opened, and not where it is written to.
    """
    text = " ".join(str(error).split())
    is_unnamed = isinstance(error, OSError) and error.errno in FULL and error.filename is None
    if is_unnamed or any(sign in text for sign in _UNWRITTEN):
        return OSError(f"a file in {folder} could not be written, is the disk full? {text}")
    return None


def _dump(content: Any) -> str:
    """Return indented JSON in which a list of numbers takes one line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[[\s\d.,e+-]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text) + "\n"
