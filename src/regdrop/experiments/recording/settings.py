"""Every setting of a run, and whether what is found was made with those that are wanted now."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regdrop.experiments.arms import Arm
from regdrop.experiments.recording.earlier_options import with_later_options
from regdrop.tasks import Task
from regdrop.tasks.common.pretrained import checkpoint_digest
from regdrop.tasks.data_sets.digests import data_digests, is_of_split

# The settings of a run that the arms of a task may have of their own.
ARM_SETTINGS = ("training", "rdrop", "dropout_odds", "dropout_rises")
# The settings that have fields themselves.
_PARTS = ("training", "rdrop")


def resolved_config(task: Task, arm: Arm) -> dict[str, Any]:
    """Return every setting of a run as JSON holds it, and what tells its data from changed data."""
    settings: dict[str, Any] = {
        **asdict(task),
        "family": task.family,
        **_arm_settings(arm),
    }
    if digests := data_digests(task.dataset):
        settings["data"] = digests
    model = getattr(task, "model", None)
    if model is not None and (digest := checkpoint_digest(model)):
        settings["checkpoint"] = digest
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _arm_settings(arm: Arm) -> dict[str, Any]:
    settings = {
        "training": asdict(arm.training),
        "rdrop": arm.rdrop.to_dict(),
        "dropout_odds": arm.dropout_odds,
        "dropout_rises": arm.dropout_rises,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def settings_digest(task: Task) -> str:
    """Return a short name for the settings of a task beside those of its optimisation."""
    settings = {k: v for k, v in asdict(task).items() if k not in ("training", "rdrop")}
    settings["data"] = data_digests(task.dataset)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def check_same_config(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Check that what was found in a file was made with the settings that are wanted.

    Raises:
        ValueError: If not, with the names of the settings that differ.
    """
    found, wanted = with_later_options(found), with_later_options(wanted)
    if "data" not in wanted:  # it cannot be looked at now
        found = {name: value for name, value in found.items() if name != "data"}
    elif isinstance(found.get("data"), Mapping):
        found = {**found, "data": _split_files(found["data"], wanted["data"])}
        if found["data"] == wanted["data"]:  # the same files, wherever they lie
            wanted = {**wanted, "dataset": found.get("dataset")}
    if "checkpoint" not in wanted:
        found = {name: value for name, value in found.items() if name != "checkpoint"}
    if names := _differences(found, wanted):
        raise ValueError(
            f"{path} was made with other settings ({', '.join(names)}); "
            "choose another output folder, or remove it to train again"
        )


def differing_arm(found: Mapping[str, Any], arm: Arm) -> list[str]:
    """Return the names of what differs between settings of a run and an arm, of those it has."""
    own = {name: value for name, value in found.items() if name in ARM_SETTINGS}
    return _differences(with_later_options(own), with_later_options(_arm_settings(arm)))


def differing_data(found: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of what differs between two digests of data."""
    return _differences(_split_files(found, now), now, are_fields=False)


def _split_files(found: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Return digests of data without those of files beside it, which earlier records hold."""
    if not all(map(is_of_split, now)):  # all of it is data
        return dict(found)
    return {name: x for name, x in found.items() if is_of_split(name)}


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], *, are_fields: bool = True
) -> list[str]:
    """Return the names of settings that differ.

    Args:
        found: Settings of a file.
        wanted: Those of now.
        are_fields: Whether the names are fields of settings, of which one that did not exist then
            cannot differ; else they are values themselves: files of data, settings of a model.
    """
    names = []
    for name in sorted(found.keys() | wanted.keys()):
        if are_fields and name not in found:
            continue
        before, now = found.get(name), wanted.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            inner = _differences(before, now, are_fields=name in _PARTS)
            names += [f"{name}.{each}" for each in inner]
        elif name not in found or name not in wanted or before != now:
            names.append(name)
    return names
