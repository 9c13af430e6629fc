"""Other arms' results and runs in a folder, against what these arms are by the settings of now."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from regdrop.experiments.arms import Arm, build_arms, optional_arms
from regdrop.experiments.recording.record import read_configs
from regdrop.experiments.recording.settings import differing_arm
from regdrop.experiments.running.leftovers import begun_configs
from regdrop.experiments.studies.definitions import STUDIES, study_arms
from regdrop.tasks import Task

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")
# The numbers of a grid, which names of arms hold rounded.
_IN_NAMES = ("rdrop.alpha", "rdrop.dropout_rates")


def check_earlier(
    folder: Path, study: str, task: Task, names: Collection[str], chosen: Collection[str] = ()
) -> None:
    """Check that results and begun runs of other arms in a folder are of the settings of now.

    An arm that cannot be made from its name is left unchecked.

    Args:
        folder: Folder of results.
        study: Whose arms they are.
        task: The task as it is now.
        names: Arms that are asked for, whose records and runs `run_arms` checks.
        chosen: Settings that are chosen for each arm, which are left out.

    Raises:
        ValueError: If they are of other settings.
    """
    found = read_configs(folder) + begun_configs(folder)
    others = [(name, config) for name, config in found if name not in names]
    known = _study_arms(study, task, None) if others else {}
    wrong = set()
    for name, config in others:
        own, _, tried = name.partition("@")
        left_out = {*chosen, *(part.partition("=")[0] for part in tried.split(",") if tried)}
        arm = known.get(own)
        if arm is None:
            grid = [float(number) for number in dict.fromkeys(_NUMBER.findall(own))]
            arm = _study_arms(study, task, grid).get(own)
            left_out |= set(_IN_NAMES)
        if "rdrop.alpha" in left_out:  # what it is to an arm with more dropout
            left_out.add("dropout_odds")
        if arm is not None:
            differing = set(differing_arm(config, arm)) - left_out
            wrong |= {f"{setting} of {own}" for setting in differing}
    if wrong:
        raise ValueError(
            f"{folder} holds results of other settings ({', '.join(sorted(wrong))}), which are not "
            "to be compared with those of now; give the same settings, or choose another output "
            "folder"
        )


def _study_arms(study: str, task: Task, grid: Sequence[float] | None) -> dict[str, Arm]:
    """Return the arms of a comparison or a study by name; none where it cannot have them."""
    try:
        if study not in STUDIES:
            return {**build_arms(task), **optional_arms(task)}
        return {arm.name: arm for arm in study_arms(study, task, grid)}
    except ValueError:
        return {}
