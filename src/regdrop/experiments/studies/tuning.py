"""Settings of every arm chosen on the validation split: values all tried, ranges searched."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

from regdrop.experiments.arms import Arm
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.recording.settings import resolved_config
from regdrop.experiments.running.progress import Display
from regdrop.experiments.running.runner import run_arms
from regdrop.experiments.studies.choices import TunedArm
from regdrop.experiments.studies.search import STORAGE_NAME, search
from regdrop.experiments.studies.variations import (
    Variation,
    check_variations,
    is_varied,
    tried_arm,
    with_settings,
)
from regdrop.tasks import Task


class NoFiniteFigureError(ValueError):
    """Some arm has no setting whose runs end with a finite figure.

    Attributes:
        chosen: What was chosen for the other arms.
    """

    def __init__(self, arms: Sequence[str], chosen: dict[str, TunedArm]) -> None:
        super().__init__(
            f"no setting of {', '.join(arms)} that was varied ends with a finite figure"
        )
        self.chosen = chosen


# From arms to the mean over seeds of each one's validation metric, by its name.
Measure = Callable[[Sequence[Arm]], Mapping[str, float]]


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
) -> dict[str, TunedArm]:
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
        ValueError: As `varied_settings` or `run_arms` does.
        NoFiniteFigureError: Where no run of an arm ends with a finite figure, once the settings of
            the others are chosen.
    """
    varied = varied_settings(task, arms, variations)

    def measure(tried: Sequence[Arm]) -> dict[str, float]:
        records = run_arms(
            task,
            tried,
            seeds=seeds,
            folder=folder,
            workers=workers,
            threads=threads,
            executor=executor,
            display=display,
            skip_diverged=True,
        )
        return {arm.name: _mean_metric(task, arm, records, len(seeds)) for arm in tried}

    in_grids = [arm for arm in arms if _has_grid(varied.get(arm.name))]
    searched = [arm for arm in arms if arm.name in varied and arm not in in_grids]
    chosen = {arm.name: TunedArm() for arm in arms}
    greater_is_better = task.metrics[task.selection_metric].greater_is_better
    if in_grids:
        chosen |= _best_of_grids(in_grids, varied, measure, greater_is_better)
    for arm in searched:
        own = varied[arm.name]
        folder.mkdir(parents=True, exist_ok=True)
        chosen[arm.name] = search(
            arm,
            own,
            measure,
            name=f"{task.name}/{arm.name}/{_search_digest(task, arm, own, seeds)}",
            storage=storage or f"sqlite:///{folder / STORAGE_NAME}",
            trials=trials,
            greater_is_better=greater_is_better,
        )
    chosen = {
        name: replace(own, seeds=tuple(seeds)) if own.tried else own for name, own in chosen.items()
    }
    diverged = [name for name, own in chosen.items() if own.tried and not _is_finite(own)]
    if diverged:
        others = {name: own for name, own in chosen.items() if name not in diverged}
        raise NoFiniteFigureError(diverged, others)
    return chosen


def varied_settings(
    task: Task, arms: Sequence[Arm], variations: Sequence[Variation], study: Sequence[Arm] = ()
) -> dict[str, list[Variation]]:
    """Return what is varied of each arm, and check that it takes all of the values.

    Args:
        task: The task.
        arms: The arms.
        variations: What is varied.
        study: All arms of the study: what makes one of them is varied for none.

    Raises:
        ValueError: If it does not, if nothing is varied, or something twice or by which an arm is
            what it is, or for a range without Optuna.
    """
    check_variations(task, arms, variations, study)
    if any(not v.values for v in variations) and find_spec("optuna") is None:
        raise ValueError(
            "a range is searched by optuna, which is not installed: pip install 'regdrop[search]'"
        )
    varied = {}
    for arm in arms:
        own = [v for v in variations if is_varied(arm, v)]
        for variation in own:
            for value in variation.values or (variation.low, variation.high):
                with_settings(arm, {variation.name: value})
        if own:
            varied[arm.name] = own
    if not varied:
        names = ", ".join(v.name for v in variations)
        raise ValueError(f"nothing of what is varied ({names}) matters to any arm")
    return varied


def _has_grid(variations: Sequence[Variation] | None) -> bool:
    return bool(variations) and all(v.values for v in variations or ())


def _best_of_grids(
    arms: Sequence[Arm],
    varied: Mapping[str, Sequence[Variation]],
    measure: Measure,
    greater_is_better: bool,
) -> dict[str, TunedArm]:
    """Try all combinations of values of all arms, and return the best of each."""
    grids = {}
    for arm in arms:
        names = [v.name for v in varied[arm.name]]
        combinations = itertools.product(*(v.values for v in varied[arm.name]))
        grids[arm.name] = [dict(zip(names, values, strict=True)) for values in combinations]
    tried = {
        arm.name: {tried_arm(arm, settings): settings for settings in grids[arm.name]}
        for arm in arms
    }
    metrics = measure([run for runs in tried.values() for run in runs])
    choose = max if greater_is_better else min
    chosen = {}
    for name, runs in tried.items():
        best = choose(runs, key=lambda run: metrics[run.name])
        chosen[name] = TunedArm(runs[best], metrics[best.name], len(runs))
    return chosen


def _is_finite(tuned: TunedArm) -> bool:
    return tuned.validation is not None and math.isfinite(tuned.validation)


def _search_digest(
    task: Task, arm: Arm, variations: Sequence[Variation], seeds: Sequence[int]
) -> str:
    """Return a short name for all on which the trials of a search depend."""
    content = [resolved_config(task, arm), [asdict(v) for v in variations], list(seeds)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _mean_metric(task: Task, arm: Arm, records: Sequence[RunRecord], seeds: int) -> float:
    """Return the mean selection metric of an arm's runs; the worst there is where one diverged."""
    own = [record for record in records if record.arm == arm.name]
    if len(own) == seeds:
        mean = sum(record.validation[task.selection_metric] for record in own) / seeds
        if math.isfinite(mean):
            return mean
    return -math.inf if task.metrics[task.selection_metric].greater_is_better else math.inf
