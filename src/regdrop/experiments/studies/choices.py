"""What was chosen for the arms of a study: kept in one file, and given to arms again."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regdrop.experiments.arms import Arm
from regdrop.experiments.recording.files import read_object, write_json
from regdrop.experiments.recording.ownership import PATIENCE_SECONDS, hold
from regdrop.experiments.studies.variations import (
    Setting,
    Variation,
    is_varied,
    with_settings,
)

TUNED_NAME = "tuned.json"


@dataclass(frozen=True)
class TunedArm:
    """What was chosen for an arm.

    Attributes:
        settings: Value of each setting; none where nothing that was varied matters to the arm.
        validation: Mean over seeds of the selection metric on the validation split; None where
            nothing was tried.
        tried: Number of settings that were tried.
    """

    settings: dict[str, Setting] = field(default_factory=dict)
    validation: float | None = None
    tried: int = 0


def check_tuned(
    folder: Path, study: str, arms: Sequence[Arm], variations: Sequence[Variation]
) -> None:
    """Check, before a search, that its choice keeps every setting that was chosen before.

    Raises:
        ValueError: If a setting was chosen for one of the arms that is not varied now.
    """
    path = folder / TUNED_NAME
    before = _load_tuned(path, study) if path.exists() else {}
    for arm in arms:
        varied = {variation.name for variation in variations if is_varied(arm, variation)}
        if lost := sorted(before.get(arm.name, {"settings": {}})["settings"].keys() - varied):
            raise ValueError(
                f"{path} holds a choice of {', '.join(lost)} for {arm.name}, which this search "
                "would drop; vary that too, or choose another output folder"
            )


def save_tuned(folder: Path, study: str, tuned: Mapping[str, TunedArm]) -> Path:
    """Write what was chosen for the arms of a study, beside what was chosen for others before."""
    path = folder / TUNED_NAME
    with hold(folder / "tuned.lock", f"{path}", seconds=PATIENCE_SECONDS):
        arms = _load_tuned(path, study) if path.exists() else {}
        arms |= {name: asdict(own) for name, own in tuned.items()}
        write_json(path, {"study": study, "arms": arms})
    return path


def apply_tuned(arms: Sequence[Arm], study: str, path: Path) -> list[Arm]:
    """Return the arms of a study with the settings that were chosen for each.

    Raises:
        ValueError: If the file holds no such choice, or not one for every arm.
    """
    chosen = _load_tuned(path, study)
    if missing := [arm.name for arm in arms if arm.name not in chosen]:
        raise ValueError(
            f"{path} must hold a choice for every arm, lest some be tuned and others not; it "
            f"lacks {', '.join(missing)}: `regdrop tune` takes them too, and trains none for which "
            "nothing of what is varied matters"
        )
    try:
        return [with_settings(arm, chosen[arm.name]["settings"]) for arm in arms]
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def _load_tuned(path: Path, study: str) -> dict[str, dict[str, Any]]:
    what = "a file of `regdrop tune`"
    content = read_object(path, what)
    try:
        found, arms = content["study"], content["arms"]
        result = {name: {**own, "settings": dict(**own["settings"])} for name, own in arms.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not {what}: {error}") from error
    if found != study:
        raise ValueError(f"{path} holds a choice for the arms of {found!r}, not of {study!r}")
    return result
