"""Settings of every arm chosen on the validation split, by a grid or by Optuna's search."""

import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from regdrop.experiments.arms import Arm
from regdrop.experiments.recording.files import write_json
from regdrop.experiments.recording.ownership import hold
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.recording.settings import resolved_config
from regdrop.experiments.running.parallel import run_arms
from regdrop.experiments.running.progress import Display
from regdrop.tasks import Task
from regdrop.tasks.common.accepted import nearest
from regdrop.tasks.configure import parse_value

TUNED_NAME = "tuned.json"
STORAGE_NAME = "optuna.db"
_HEARTBEAT_SECONDS = 60
# Others hold the file of choices for a moment.
_PATIENCE_SECONDS = 60.0
Setting = float | int | str


@dataclass(frozen=True)
class Variation:
    """A setting of an arm that is chosen: from values, or from a range.

    Attributes:
        name: "rdrop.NAME" or "training.NAME".
        values: The values; empty for a range.
        low: Lower end of a range; of whole numbers where both ends are.
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
        settings: Value of each setting; none where nothing that was varied matters to the arm.
        figure: Mean over seeds of the selection metric on the validation split; None where nothing
            was tried.
        tried: Number of settings that were tried.
    """

    settings: dict[str, Setting] = field(default_factory=dict)
    figure: float | None = None
    tried: int = 0


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
        if len(set(map(str, values))) != len(values):
            raise ValueError(f"the values of a variation must differ, got {text!r}")
        return Variation(name, values=values)
    numbers = [parse_value(part) for part in parts[:2]]
    log = parts[2:] == ["log"]
    is_range = all(_is_number(x) and math.isfinite(x) for x in numbers) and (log or len(parts) == 2)
    if not is_range or not numbers[0] < numbers[1] or (log and numbers[0] <= 0):
        raise ValueError(f"a range must be LOW:HIGH or LOW:HIGH:log with LOW < HIGH, got {text!r}")
    return Variation(name, low=numbers[0], high=numbers[1], log=log)


def with_settings(arm: Arm, settings: Mapping[str, Setting]) -> Arm:
    """Return an arm with other settings of R-Drop and of its training.

    Args:
        arm: The arm.
        settings: Values by "rdrop.NAME" and "training.NAME".

    Raises:
        ValueError: For a setting that there is not, or a value that it refuses.
    """
    for name, value in settings.items():
        if name == "rdrop.alpha" and arm.dropout_odds != 1:
            # The penalty that R-Drop has by this alpha.
            arm = replace(arm, dropout_odds=1 + float(value))
            continue
        part, _, own = name.partition(".")
        holder: Any = getattr(arm, part)
        known = [known.name for known in fields(holder)]
        if own not in known:
            raise ValueError(
                f"{part} has no setting {own!r}; it has {', '.join(known)}{nearest(own, known)}"
            )
        if _is_number(getattr(holder, own)) and not _is_number(value):
            raise ValueError(f"{name} must be a number, got {value!r}")
        try:
            arm = replace(arm, **{part: replace(holder, **{own: value})})
        except TypeError as error:
            raise ValueError(f"{name} cannot be {value!r}: {error}") from error
    return arm


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
    executor: str | None = None,
    display: Display | None = None,
) -> dict[str, Tuned]:
    """Choose settings of every arm by their mean selection metric on the validation split.

    Values are tried all, in parallel; where there is a range, Optuna searches. Finished runs are
    read, not run again. R-Drop's settings are not varied for arms of one pass, nor alpha where it
    is 0.

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
        executor: Address of a cluster; None for this machine.
        display: Shown the progress.

    Raises:
        ValueError: For a setting or a value that an arm refuses, for a range without Optuna, where
            nothing varied matters to any arm or no run ends with a finite figure, or as `run_arms`
            does.
    """
    if any(not v.values for v in variations) and find_spec("optuna") is None:
        raise ValueError(
            "a range is searched by optuna, which is not installed: pip install 'regdrop[search]'"
        )
    options: dict[str, Any] = {
        "workers": workers,
        "threads": threads,
        "executor": executor,
        "display": display,
        "skip_diverged": True,
    }
    grids: dict[str, list[dict[str, Setting]]] = {}
    searched = []
    for arm in arms:
        own = [v for v in variations if _matters(v, arm)]
        if not own:
            continue
        for variation in own:
            for value in variation.values or (variation.low, variation.high):
                with_settings(arm, {variation.name: value})
        if all(v.values for v in own):
            names = [v.name for v in own]
            combinations = itertools.product(*(v.values for v in own))
            grids[arm.name] = [dict(zip(names, chosen, strict=True)) for chosen in combinations]
        else:
            searched.append((arm, own))
    if not grids and not searched:
        varied = ", ".join(v.name for v in variations)
        raise ValueError(f"nothing of what is varied ({varied}) matters to any arm")
    result = {arm.name: Tuned() for arm in arms}
    result.update(_try_all(task, arms, grids, seeds, folder, options))
    for arm, own in searched:
        address = storage or f"sqlite:///{folder / STORAGE_NAME}"
        result[arm.name] = _search(task, arm, own, seeds, folder, trials, address, options)
    return result


def _matters(variation: Variation, arm: Arm) -> bool:
    if variation.name == "rdrop.alpha":
        return arm.rdrop.alpha not in (0, "auto") or arm.dropout_odds != 1
    return not variation.name.startswith("rdrop.") or arm.rdrop.num_passes > 1


def save_tuned(folder: Path, study: str, tuned: Mapping[str, Tuned]) -> Path:
    """Write what was chosen for the arms of a study, beside what was chosen for others before."""
    path = folder / TUNED_NAME
    with hold(folder / "tuned.lock", f"{path}", seconds=_PATIENCE_SECONDS):
        arms = _load_tuned(path, study) if path.exists() else {}
        arms |= {
            name: {"settings": t.settings, "validation": t.figure, "tried": t.tried}
            for name, t in tuned.items()
        }
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
    return [with_settings(arm, chosen[arm.name]["settings"]) for arm in arms]


def _load_tuned(path: Path, study: str) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, arms = content["study"], content["arms"]
        result = {name: {**own, "settings": dict(own["settings"])} for name, own in arms.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a file of `regdrop tune`: {error}") from error
    if found != study:
        raise ValueError(f"{path} holds a choice for the arms of {found!r}, not of {study!r}")
    return result


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
    figures: dict[str, list[tuple[float, dict[str, Setting]]]] = {}
    for name, (arm_name, settings, _) in varied.items():
        own = [record for record in records if record.arm == name]
        figure = _mean_figure(task, own, len(seeds))
        figures.setdefault(arm_name, []).append((figure, settings))
    sign = _sign(task)
    result = {}
    for arm_name, tried in figures.items():
        figure, settings = max(tried, key=lambda pair: sign * pair[0])
        result[arm_name] = _finite(Tuned(settings, figure, len(tried)), arm_name)
    return result


def _finite(tuned: Tuned, arm: str) -> Tuned:
    if tuned.figure is None or not math.isfinite(tuned.figure):
        raise ValueError(f"no setting of {arm} that was varied ends with a finite figure")
    return tuned


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
        try:
            records = run_arms(task, [run], seeds=seeds, folder=folder, **options)
        except KeyboardInterrupt:  # whoever repeats the command goes on with this trial's runs
            study.enqueue_trial(trial.params)
            raise
        return _mean_figure(task, records, len(seeds))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=f"{task.name}/{arm.name}/{_search_digest(task, arm, variations, seeds)}",
        storage=_open_storage(storage),
        direction="maximize" if _sign(task) > 0 else "minimize",
        # Without a seed, lest two machines, or a search that goes on, try the same again.
        sampler=optuna.samplers.TPESampler(),
        load_if_exists=True,
    )
    done = (optuna.trial.TrialState.COMPLETE,)
    if len(study.get_trials(deepcopy=False, states=done)) < trials:
        enough = optuna.study.MaxTrialsCallback(trials, states=done)
        study.optimize(objective, callbacks=[enough])
    finished = study.get_trials(deepcopy=False, states=done)
    best = Tuned(_rounded(study.best_params), float(study.best_value), len(finished))
    return _finite(best, arm.name)


def _search_digest(
    task: Task, arm: Arm, variations: Sequence[Variation], seeds: Sequence[int]
) -> str:
    """Return a short name for all on which the trials of a search depend."""
    content = [resolved_config(task, arm), [asdict(v) for v in variations], list(seeds)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _open_storage(address: str) -> Any:
    """Open Optuna's storage so that a trial whose process was killed is begun again."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import SQLAlchemyError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            return RDBStorage(
                address,
                heartbeat_interval=_HEARTBEAT_SECONDS,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
            )
        except (ImportError, SQLAlchemyError) as error:
            raise ValueError(
                f"the storage of a search cannot be opened: {address!r}, "
                f"{str(error).splitlines()[0]}"
            ) from error


def _rounded(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Return settings as a person writes them."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in settings.items()}


def _suggest(trial: Any, variation: Variation) -> Setting:
    if variation.values:
        value: Setting = trial.suggest_categorical(variation.name, list(variation.values))
        return value
    low, high = variation.low, variation.high
    if isinstance(low, int) and isinstance(high, int):
        return int(trial.suggest_int(variation.name, low, high, log=variation.log))
    return float(trial.suggest_float(variation.name, low, high, log=variation.log))


def _mean_figure(task: Task, records: Sequence[RunRecord], seeds: int) -> float:
    """Return the mean selection metric of runs; the worst there is where one diverged."""
    if len(records) == seeds:
        mean = float(np.mean([record.validation[task.selection_metric] for record in records]))
        if math.isfinite(mean):
            return mean
    return -_sign(task) * math.inf


def _sign(task: Task) -> int:
    return 1 if task.metrics[task.selection_metric].greater_is_better else -1
