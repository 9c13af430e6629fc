"""Arms over seeds, in parallel, continued where they stopped."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regdrop.experiments.arms import Arm
from regdrop.experiments.recording.processes import require_one_process
from regdrop.experiments.recording.record import (
    RunRecord,
    load_records,
    merge_records,
    record_path,
)
from regdrop.experiments.recording.settings import (
    ARM_SETTINGS,
    check_same_config,
    resolved_config,
    settings_digest,
)
from regdrop.experiments.running.cluster import open_cluster
from regdrop.experiments.running.engine import Engine
from regdrop.experiments.running.jobs import Job, JobRunner, run_jobs
from regdrop.experiments.running.leftovers import LEARNED, clean_up
from regdrop.experiments.running.local_engine import open_processes
from regdrop.experiments.running.optimisers import check_optimiser
from regdrop.experiments.running.progress import Display
from regdrop.experiments.running.run import UNFINISHED_FOLDER, RunPaths
from regdrop.tasks import Task


def run_arms(
    task: Task,
    arms: Sequence[Arm],
    *,
    seeds: Sequence[int],
    folder: Path,
    workers: int = 1,
    threads: int | None = None,
    executor: str | None = None,
    display: Display | None = None,
    skip_diverged: bool = False,
) -> list[RunRecord]:
    """Train several arms of a task over seeds and return their records.

    Finished runs are read, not run again; interrupted ones go on from their last checkpoint. What
    another command is at work on is waited for: several commands share the work. At the end what is
    long in the records is moved into one file of the folder.

    Args:
        task: The task.
        arms: Ways of training, of different names.
        seeds: Seeds, the same for every arm, so that differences are paired.
        folder: Where records are kept.
        workers: Runs at a time, each in a process of its own.
        threads: Threads a run; None leaves torch's own number.
        executor: "dask://HOST:PORT", a Dask cluster whose workers take the runs, instead of
            processes of this machine; they see the folder and the data under the same names.
        display: Shown the progress.
        skip_diverged: Whether a run whose loss diverges has no record, and is no failure.

    Raises:
        ValueError: For arms of one name, no seeds, a folder of other settings, several processes,
            a cluster that cannot be used, or runs whose processes were killed, once the others have
            ended.
        Exception: What the first run that failed raised, once the runs beside it have ended.
    """
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) != len(names):
        raise ValueError(f"arms must have different names, at least one, got {names}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}")
    require_one_process("a comparison")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    for arm in arms:
        check_optimiser(arm.training)
    configs = {arm.name: resolved_config(task, arm) for arm in arms}
    finished = _check_records(folder, configs)
    jobs = []
    for arm, seed in ((arm, seed) for seed in seeds for arm in arms):
        # What was stopped after its record was written still has its checkpoints to remove.
        has_work = RunPaths.compared(folder, arm.name, seed).work.exists()
        if (arm.name, seed) not in finished or has_work:
            jobs.append(Job(arm, seed))
        elif display is not None:
            display.finish(finished[arm.name, seed])
    # The longest runs first, so that no worker waits for one at the end.
    jobs.sort(key=lambda job: -job.arm.training.max_steps * job.arm.rdrop.num_passes)
    # Named by its settings, so that what an interrupted comparison learned is never another's.
    learned = folder / UNFINISHED_FOLDER / LEARNED
    if jobs:
        with _open_engine(
            executor, workers=min(workers, len(jobs)), threads=threads, folder=folder
        ) as engine:
            runner = JobRunner(
                task, folder, learned / settings_digest(task), engine.enter, engine.report
            )
            run_jobs(engine, runner, jobs, display, skip_diverged)
    clean_up(folder)
    merge_records(folder)
    wanted = {(name, seed) for name in names for seed in seeds}
    # Another command may have begun at the same moment.
    found = _check_records(folder, configs)
    return [record for run, record in found.items() if run in wanted]


@contextmanager
def _open_engine(
    executor: str | None, *, workers: int, threads: int | None, folder: Path
) -> Iterator[Engine]:
    """Open the engine of an address, or of this machine; close it at the end."""
    if executor is None:
        with open_processes(workers, threads) as engine:
            yield engine
    else:
        with open_cluster(executor, folder) as engine:
            yield engine


def _check_records(
    folder: Path, configs: Mapping[str, dict[str, Any]]
) -> dict[tuple[str, int], RunRecord]:
    """Return the records of a folder by arm and seed.

    Args:
        folder: Where records are kept.
        configs: Every setting of each arm, by its name.

    Raises:
        ValueError: If they are not of this task, or one of an arm not of its settings now.
    """
    first = next(iter(configs.values()))
    records = _load(folder)
    for record in records:
        path = record_path(folder, record.arm, record.seed)
        if record.arm in configs:
            check_same_config(path, record.config, configs[record.arm])
        else:
            check_same_config(path, _without_training(record.config), _without_training(first))
    return {(record.arm, record.seed): record for record in records}


def _load(folder: Path) -> list[RunRecord]:
    try:
        return load_records(folder)
    except FileNotFoundError:
        return []


def _without_training(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ARM_SETTINGS}
