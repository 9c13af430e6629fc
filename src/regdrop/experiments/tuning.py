"""Settings of every arm chosen on the validation split, by a grid or by Optuna's search."""

import itertools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from regdrop.experiments.arms import Arm
from regdrop.experiments.parallel import run_arms
from regdrop.experiments.progress import Display
from regdrop.experiments.record import RunRecord, write_json
from regdrop.tasks import Task
from regdrop.tasks.options import parse_value

TUNED_NAME = "tuned.json"
STORAGE_NAME = "optuna.db"
_HEARTBEAT_SECONDS = 60
Setting = float | int | str


@dataclass(frozen=True)
class Variation:
    """A setting of an arm that is chosen: from values, or from a range.

    Attributes:
        name: "rdrop.NAME" or "training.NAME".
        values: The values; empty for a range.
        low: Lower end of a range.
        high: Upper end of a range.
        log: Whether a range is searched by its logarithm.
    """

    name: str
    values: tuple[Setting, ...] = ()
    low: float = math.nan
    high: float = math.nan
    log: bool = False


@dataclass(frozen=True)
class Tuned:
    """What was chosen for an arm.

    Attributes:
        settings: Value of each setting.
        figure: Mean over seeds of the selection metric on the validation split.
        tried: Number of settings that were tried.
    """

    settings: dict[str, Setting]
    figure: float
    tried: int


def parse_variation(text: str) -> Variation:
    """Return the variation of "name=value,value,..." or "name=low:high" or "name=low:high:log".

    Raises:
        ValueError: If it is neither.
    """
    name, _, right = text.partition("=")
    parts = right.split(":")
    if not right or name.split(".")[0] not in ("rdrop", "training") or "." not in name:
        raise ValueError(
            f"a variation must be rdrop.NAME=... or training.NAME=... with values by commas or "
            f"LOW:HIGH[:log], got {text!r}"
        )
    if len(parts) == 1:
        values = tuple(parse_value(part) for part in right.split(","))
        return Variation(name, values=values)
    numbers = [parse_value(part) for part in parts[:2]]
    log = parts[2:] == ["log"]
    is_range = all(isinstance(x, (int, float)) for x in numbers) and (log or len(parts) == 2)
    if not is_range or not numbers[0] < numbers[1] or (log and numbers[0] <= 0):
        raise ValueError(f"a range must be LOW:HIGH or LOW:HIGH:log with LOW < HIGH, got {text!r}")
    return Variation(name, low=float(numbers[0]), high=float(numbers[1]), log=log)


def with_settings(arm: Arm, settings: Mapping[str, Setting]) -> Arm:
    """Return an arm with other settings of R-Drop and of its training.

    Args:
        arm: The arm.
        settings: Values by "rdrop.NAME" and "training.NAME".

    Raises:
        ValueError: For a setting that there is not, or a value that it refuses.
    """
    for name, value in settings.items():
        part, _, own = name.partition(".")
        holder: Any = getattr(arm, part)
        known = [field.name for field in fields(holder)]
        if own not in known:
            raise ValueError(f"{part} has no setting {own!r}; it has {', '.join(known)}")
        arm = replace(arm, **{part: replace(holder, **{own: value})})
    return arm


def tune(
    task: Task,
    arms: Sequence[Arm],
    variations: Sequence[Variation],
    *,
    seeds: Sequence[int],
    folder: Path,
    trials: int = 20,
    storage: str | None = None,
    workers: int = 1,
    threads: int | None = None,
    display: Display | None = None,
) -> dict[str, Tuned]:
    """Choose settings of every arm by their mean selection metric on the validation split.

    Values are tried all, in parallel; where there is a range, Optuna searches. Finished runs are
    read, not run again. Alpha is not varied for arms without divergence.

    Args:
        task: The task.
        arms: The arms.
        variations: What is chosen.
        seeds: Seeds, other ones than those of the comparison that the choice is for.
        folder: Where runs, the search and the choice are kept.
        trials: Settings that a search tries for each arm.
        storage: Optuna's storage, shared by all machines that search; None for a SQLite file in
            the folder.
        workers: Runs at a time.
        threads: Threads a run.
        display: Shown the progress.

    Raises:
        ValueError: For a setting or a value that an arm refuses, or as `run_arms` does.
    """
    options: dict[str, Any] = {"workers": workers, "threads": threads, "display": display}
    grids: dict[str, list[dict[str, Setting]]] = {}
    searched = []
    for arm in arms:
        own = [v for v in variations if v.name != "rdrop.alpha" or arm.rdrop.alpha > 0]
        if not own:
            continue
        with_settings(arm, {v.name: v.values[0] if v.values else v.low for v in own})
        if all(v.values for v in own):
            names = [v.name for v in own]
            combinations = itertools.product(*(v.values for v in own))
            grids[arm.name] = [dict(zip(names, chosen, strict=True)) for chosen in combinations]
        else:
            searched.append((arm, own))
    result = _try_all(task, arms, grids, seeds, folder, options)
    for arm, own in searched:
        address = storage or f"sqlite:///{folder / STORAGE_NAME}"
        result[arm.name] = _search(task, arm, own, seeds, folder, trials, address, options)
    return result


def save_tuned(folder: Path, tuned: Mapping[str, Tuned]) -> Path:
    """Write what was chosen, and beside it what it was chosen by."""
    content = {
        name: {"settings": t.settings, "validation": t.figure, "tried": t.tried}
        for name, t in tuned.items()
    }
    write_json(folder / TUNED_NAME, content)
    return folder / TUNED_NAME


def apply_tuned(arms: Sequence[Arm], path: Path) -> list[Arm]:
    """Return arms with the settings that were chosen for those of their names.

    Raises:
        ValueError: If the file holds no such choice.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        chosen = {name: dict(entry["settings"]) for name, entry in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--tuned {path} must be a file of `regdrop tune`: {error}") from error
    return [with_settings(arm, chosen.get(arm.name, {})) for arm in arms]


def describe(settings: Mapping[str, Setting]) -> str:
    """Return settings as one line."""
    return ",".join(f"{name}={value}" for name, value in settings.items())


def _try_all(
    task: Task,
    arms: Sequence[Arm],
    grids: Mapping[str, Sequence[dict[str, Setting]]],
    seeds: Sequence[int],
    folder: Path,
    options: Mapping[str, Any],
) -> dict[str, Tuned]:
    varied = {
        f"{arm.name}@{describe(settings)}": (arm.name, settings, with_settings(arm, settings))
        for arm in arms
        for settings in grids.get(arm.name, ())
    }
    if not varied:
        return {}
    runs = [replace(arm, name=name) for name, (_, _, arm) in varied.items()]
    records = run_arms(task, runs, seeds=seeds, folder=folder, **options)
    sign = _sign(task)
    result: dict[str, Tuned] = {}
    for name, (arm_name, settings, _) in varied.items():
        figure = _mean_figure(task, [record for record in records if record.arm == name])
        best = result.get(arm_name)
        tried = 1 if best is None else best.tried + 1
        if best is None or sign * figure > sign * best.figure:
            best = Tuned(settings, figure, tried)
        result[arm_name] = replace(best, tried=tried)
    return result


def _search(
    task: Task,
    arm: Arm,
    variations: Sequence[Variation],
    seeds: Sequence[int],
    folder: Path,
    trials: int,
    storage: str,
    options: Mapping[str, Any],
) -> Tuned:
    import optuna

    def objective(trial: optuna.Trial) -> float:
        settings = _rounded({v.name: _suggest(trial, v) for v in variations})
        run = replace(with_settings(arm, settings), name=f"{arm.name}@{describe(settings)}")
        return _mean_figure(task, run_arms(task, [run], seeds=seeds, folder=folder, **options))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=f"{task.name}/{arm.name}",
        storage=_open_storage(storage),
        direction="maximize" if _sign(task) > 0 else "minimize",
        load_if_exists=True,
    )
    # Of its own for whoever goes on with the search or joins it, lest they try the same again.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.get_trials(deepcopy=False)))
    done = (optuna.trial.TrialState.COMPLETE,)
    missing = trials - len(study.get_trials(deepcopy=False, states=done))
    if missing > 0:
        study.optimize(objective, n_trials=missing)
    finished = study.get_trials(deepcopy=False, states=done)
    return Tuned(_rounded(study.best_params), float(study.best_value), len(finished))


def _open_storage(address: str) -> Any:
    """Open Optuna's storage so that a trial whose process was killed is begun again."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RDBStorage(
            address,
            heartbeat_interval=_HEARTBEAT_SECONDS,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )


def _rounded(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Return settings as a person writes them."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in settings.items()}


def _suggest(trial: Any, variation: Variation) -> Setting:
    if variation.values:
        value: Setting = trial.suggest_categorical(variation.name, list(variation.values))
        return value
    number = trial.suggest_float(variation.name, variation.low, variation.high, log=variation.log)
    return float(number)


def _mean_figure(task: Task, records: Sequence[RunRecord]) -> float:
    return float(np.mean([record.validation[task.selection_metric] for record in records]))


def _sign(task: Task) -> int:
    return 1 if task.metrics[task.selection_metric].greater_is_better else -1
