"""From what a user writes on the command line to a task: family, preset and changed settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal

from regdrop.arguments import nearest
from regdrop.config import RDropConfig
from regdrop.tasks import DEFAULT_PRESETS, FAMILIES, PRESETS, Task, TrainingSettings
from regdrop.tasks.common.accepted import check_choice
from regdrop.tasks.data_sets.folders import DIGITS_NAME
from regdrop.tasks.notices import say_once


def find_task(name: str, preset: str | None = None) -> Task:
    """Return a preset by the name of its family and its own, or by its own alone.

    Raises:
        ValueError: If there is none, with the names that there are.
    """
    if name in FAMILIES:
        own = [key for key, task in PRESETS.items() if task.family == name]
        chosen = DEFAULT_PRESETS[name] if preset is None else preset
        check_choice(f"preset of {name!r}", chosen, own)
        return PRESETS[chosen]
    known = [*FAMILIES, *(key for key in PRESETS if key not in FAMILIES)]
    check_choice("TASK", name, known)
    if preset not in (None, name):
        raise ValueError(f"TASK {name!r} is a preset itself; it takes no preset {preset!r}")
    return PRESETS[name]


def change_task(
    task: Task,
    *,
    data: str | None = None,
    model: str | None = None,
    alpha: float | Literal["auto"] | None = None,
    steps: int | None = None,
    settings: Sequence[str] = (),
) -> Task:
    """Return a task with changed settings.

    Args:
        task: The preset.
        data: Folder or hub id of other data.
        model: Checkpoint to fine-tune, in place of the preset's `model_config`.
        alpha: Weight of the KL; "auto" for one that rises in the run.
        steps: Optimiser steps.
        settings: Further ones, each "name=value" with a JSON value; "training.NAME" and
            "rdrop.NAME" for the fields of those.

    Raises:
        ValueError: For a setting that the task has not, or a value that it refuses.
    """
    if data is not None and task.dataset == DIGITS_NAME:
        raise ValueError(
            f"{task.name} is of scikit-learn's digits and takes no other data, got {data!r}; "
            "choose a preset for images in a folder: see `regdrop tasks`"
        )
    changes: list[tuple[str, Any]] = [
        ("dataset", data),
        ("model", model),
        ("rdrop.alpha", alpha),
        ("training.max_steps", steps),
    ]
    changes = [(name, value) for name, value in changes if value is not None]
    takes_checkpoints = "model" in task.__dataclass_fields__
    if model is not None and takes_checkpoints and getattr(task, "model_config", None):
        say_once(f"--model {model} takes the place of the preset's model_config")
        changes.append(("model_config", {}))
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"a setting must be name=value, got {setting!r}")
        changes.append((name.strip(), parse_value(text)))
    # All at once, so that settings which hold together alone can be changed one beside the other.
    own: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in changes:
        holder, dot, field = name.partition(".")
        if dot:
            parts.setdefault(holder, {})[field] = value
        else:
            own[name] = value
    for holder, values in parts.items():
        inner = own.get(holder, getattr(task, holder, None))
        if holder in task.__dataclass_fields__ and not is_dataclass(inner):
            raise ValueError(f"setting {holder!r} has no parts, got {', '.join(values)}")
        own[holder] = _change(inner, values) if is_dataclass(inner) else values
    result: Task = _change(task, own)
    return result


def task_from_config(config: dict[str, Any]) -> Task:
    """Return the task of a run from the resolved settings in its record.

    Raises:
        ValueError: If they are of no known task, or not its settings.
    """
    family = config.get("family")
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {sorted(FAMILIES)}, got {family!r}")
    cls: Any = FAMILIES[family]
    options = {f.name: config[f.name] for f in fields(cls) if f.name in config}
    try:
        options["training"] = TrainingSettings(**config["training"])
        options["rdrop"] = RDropConfig.from_dict(config["rdrop"])
        task: Task = cls(**options)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the settings of a run of {family!r} cannot be read: {error}") from error
    return task


def parse_value(text: str) -> Any:
    """Return a JSON value, or the text itself where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _change(holder: Any, values: Mapping[str, Any]) -> Any:
    known = [field.name for field in fields(holder)]
    for name in values:
        if name not in known:
            raise ValueError(
                f"{getattr(holder, 'name', type(holder).__name__)} has no setting {name!r}; "
                f"it has {', '.join(known)}{nearest(name, known)}"
            )
    try:
        return replace(holder, **values)
    except TypeError as error:
        given = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ValueError(f"settings {given} cannot be: {error}") from error
