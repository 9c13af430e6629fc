"""What was chosen for the arms of a study: kept in one file, and given to arms again."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from regdrop.config import RDropConfig
from regdrop.experiments.arms import Arm
from regdrop.experiments.recording.earlier_options import AUTO_BEFORE
from regdrop.experiments.recording.files import read_object, write_json
from regdrop.experiments.recording.ownership import PATIENCE_SECONDS, hold
from regdrop.experiments.studies.variations import (
    Setting,
    Variation,
    is_varied,
    with_settings,
)
from regdrop.tasks import Task

TUNED_NAME = "tuned.json"


def _auto_now() -> dict[str, float]:
    """Return between which numbers alpha="auto" rises."""
    options = RDropConfig(alpha="auto").to_dict()
    return {name: options[name] for name in AUTO_BEFORE}


@dataclass(frozen=True)
class TunedArm:
    """What was chosen for an arm.

    Attributes:
        settings: Value of each setting; none where nothing that was varied matters to the arm.
        validation: Mean over seeds of the selection metric on the validation split; None where
            nothing was tried.
        tried: Number of settings that were tried.
        seeds: Seeds of the runs that were compared; none in a file of an older version.
        auto: Between which numbers alpha="auto" rose then.
    """

    settings: dict[str, Setting] = field(default_factory=dict)
    validation: float | None = None
    tried: int = 0
    seeds: tuple[int, ...] = ()
    auto: dict[str, float] = field(default_factory=_auto_now)


def check_tuned(
    folder: Path,
    study: str,
    arms: Sequence[Arm],
    variations: Sequence[Variation],
    seeds: Sequence[int] = (),
) -> None:
    """Check, before a search, that its choice can stand beside what was chosen before.

    Raises:
        ValueError: If a setting was chosen for one of the arms that is not varied now, or by other
            seeds, whose figures cannot be compared.
    """
    path = folder / TUNED_NAME
    before = load_tuned(path, study) if path.exists() else {}
    for arm in arms:
        varied = {variation.name for variation in variations if is_varied(arm, variation)}
        _check_beside(path, arm.name, before.get(arm.name, TunedArm()), varied, seeds)


def _check_beside(
    path: Path, arm: str, earlier: TunedArm, varied: Set[str], seeds: Sequence[int]
) -> None:
    """Check that a choice of some settings of an arm, by some seeds, can take the earlier's place.

    Raises:
        ValueError: If not.
    """
    if varied and earlier.seeds and tuple(seeds) != earlier.seeds:
        raise ValueError(
            f"{path} holds a choice for {arm} by the seeds {_listed(earlier.seeds)}, got "
            f"{_listed(seeds)}; choose by the same seeds, or choose another output folder"
        )
    if lost := sorted(earlier.settings.keys() - varied):
        raise ValueError(
            f"{path} holds a choice of {', '.join(lost)} for {arm}, which this search "
            "would drop; vary that too, or choose another output folder"
        )


def save_tuned(folder: Path, study: str, task: Task, tuned: Mapping[str, TunedArm]) -> Path:
    """Write what was chosen for the arms of a study, beside what was chosen for others before.

    What was chosen for an arm before stays where it is better by the same seeds.

    Raises:
        ValueError: If another command has meanwhile chosen a setting that was not varied, or by
            other seeds.
    """
    path = folder / TUNED_NAME
    greater_is_better = task.metrics[task.selection_metric].greater_is_better
    with hold(folder / "tuned.lock", f"{path}", seconds=PATIENCE_SECONDS):
        arms = load_tuned(path, study) if path.exists() else {}
        for name, now in tuned.items():
            before = arms.get(name, TunedArm())
            _check_beside(path, name, before, now.settings.keys(), now.seeds)
            is_kept = _is_better(before, now, greater_is_better)
            tried = max(before.tried if is_kept else 0, now.tried, _count_tried(folder, name))
            arms[name] = replace(before if is_kept else now, tried=tried if now.tried else 0)
        content = {
            "study": study,
            "task": task.name,
            "steps": task.training.max_steps,
            "arms": {name: asdict(own) for name, own in arms.items()},
        }
        write_json(path, content)
    return path


def load_tuned(path: Path, study: str) -> dict[str, TunedArm]:
    """Return what was chosen for the arms of a study.

    Raises:
        ValueError: If the file holds no such choice.
    """
    arms = _read_tuned(path, study)["arms"]
    return {
        name: TunedArm(
            own["settings"], own.get("validation"), own.get("tried", 0), own["seeds"], own["auto"]
        )
        for name, own in arms.items()
    }


def differing_choice(
    path: Path, study: str, task: Task, arms: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    """Return what is to be said of a choice that was made for something else than it is used for.

    Args:
        path: The file that holds it.
        study: Name of the study.
        task: The task of the comparison.
        arms: Names of its arms.
        seeds: Its seeds.
    """
    content, lines = _read_tuned(path, study), []
    chosen = load_tuned(path, study)
    found, steps = content.get("task", task.name), task.training.max_steps
    if found != task.name:
        lines.append(f"{path} was chosen for the task {found}, not for {task.name}.")
    elif (other := content.get("steps", steps)) != steps:
        lines.append(f"{path} was chosen for runs of {other} steps, not of {steps}.")
    for name in arms:
        lines += _differing_auto(path, name, chosen[name]) if name in chosen else []
    used = {seed for name in arms if name in chosen for seed in chosen[name].seeds}
    if common := sorted(used & set(seeds)):
        are = "The seed {} is" if len(common) == 1 else "The seeds {} are"
        lines.append(
            f"{are.format(_listed(common))} among those by which {path} was chosen: take others, "
            "by --first-seed."
        )
    return lines


def _differing_auto(path: Path, arm: str, chosen: TunedArm) -> list[str]:
    """Return what is to be said where alpha="auto" was chosen and was another ramp then."""
    own = {name.removeprefix("rdrop."): value for name, value in chosen.settings.items()}
    if own.get("alpha") != "auto" or own.get("alpha_rule", "ramp") != "ramp":
        return []
    now = _auto_now()
    changed = [end for end in now if end not in own and chosen.auto.get(end) != now[end]]
    if not changed:
        return []
    before, after = (
        ", ".join(f"{end}={ends.get(end)}" for end in changed) for ends in (chosen.auto, now)
    )
    return [f'{path} was chosen for {arm} where alpha="auto" had {before}. It has {after} now.']


def _is_better(before: TunedArm, now: TunedArm, greater_is_better: bool) -> bool:
    """Return whether an earlier choice is better than one by the same seeds."""
    if before.validation is None or now.validation is None or before.seeds != now.seeds:
        return False
    if not before.seeds:  # of an older version, which did not tell
        return False
    if greater_is_better:
        return before.validation > now.validation
    return before.validation < now.validation


def _count_tried(folder: Path, arm: str) -> int:
    """Return how many settings of an arm have records."""
    names = (path.name for path in (folder / "records").glob("*.json"))
    return len({name.rpartition("-seed")[0] for name in names if name.startswith(f"{arm}@")})


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def apply_tuned(arms: Sequence[Arm], study: str, path: Path) -> list[Arm]:
    """Return the arms of a study with the settings that were chosen for each.

    Raises:
        ValueError: If the file holds no such choice, or not one for every arm.
    """
    chosen = load_tuned(path, study)
    if missing := [arm.name for arm in arms if arm.name not in chosen]:
        raise ValueError(
            f"{path} must hold a choice for every arm, lest some be tuned and others not; it "
            f"lacks {', '.join(missing)}: `regdrop tune` takes them too, and trains none for which "
            "nothing of what is varied matters"
        )
    try:
        return [with_settings(arm, chosen[arm.name].settings) for arm in arms]
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def _read_tuned(path: Path, study: str) -> dict[str, Any]:
    what = "a file of `regdrop tune`"
    content = read_object(path, what)
    try:
        found, arms = content["study"], content["arms"]
        arms = {name: {**own, "settings": dict(**own["settings"])} for name, own in arms.items()}
        for own in arms.values():
            own["seeds"] = tuple(own.get("seeds", ()))
            own["auto"] = dict(**own.get("auto", AUTO_BEFORE))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not {what}: {error}") from error
    if found != study:
        raise ValueError(f"{path} holds a choice for the arms of {found!r}, not of {study!r}")
    return {**content, "arms": arms}
