"""Arms over seeds, in parallel, continued where they stopped."""

import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from regdrop.experiments.arms import Arm
from regdrop.experiments.engines import Engine, open_engine
from regdrop.experiments.processes import require_one_process
from regdrop.experiments.progress import Display, Update
from regdrop.experiments.record import (
    ARM_SETTINGS,
    RunRecord,
    load_records,
    merge_records,
    record_path,
    resolved_config,
    settings_digest,
)
from regdrop.experiments.run import UNFINISHED, RunPaths, check_same_config, run_arm
from regdrop.tasks import Task

_POLL_SECONDS = 0.2


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
) -> list[RunRecord]:
    """Train several arms of a task over seeds and return their records.

    Finished runs are read, not run again; interrupted ones go on from their last checkpoint. At the
    end what is long in the records is moved into one file of the folder.

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

    Raises:
        ValueError: For arms of one name, no seeds, a folder of other settings, several processes,
            or a cluster that cannot be used.
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
    finished = _check_records(task, arms, folder)
    jobs = []
    for arm, seed in ((arm, seed) for seed in seeds for arm in arms):
        # What was stopped after its record was written still has its checkpoints to remove.
        if (arm.name, seed) not in finished or RunPaths.compared(
            folder, arm.name, seed
        ).work.exists():
            jobs.append((arm, seed))
        elif display is not None:
            display.finish(finished[arm.name, seed])
    # The longest runs first, so that no worker waits for one at the end.
    jobs.sort(key=lambda job: -job[0].training.max_steps * job[0].rdrop.num_passes)
    # Named by its settings, so that what an interrupted comparison learned is never another's.
    learned = folder / UNFINISHED / "learned"
    if jobs:
        with open_engine(
            executor, workers=min(workers, len(jobs)), threads=threads, folder=folder
        ) as engine:
            _run_jobs(engine, task, jobs, folder, learned / settings_digest(task), display)
    if learned.exists() and list(learned.parent.iterdir()) == [learned]:  # nobody else's runs
        shutil.rmtree(learned.parent)
    merge_records(folder)
    wanted = {(name, seed) for name in names for seed in seeds}
    return [record for record in load_records(folder) if (record.arm, record.seed) in wanted]


def _check_records(
    task: Task, arms: Sequence[Arm], folder: Path
) -> dict[tuple[str, int], RunRecord]:
    """Return the records of a folder by arm and seed.

    Raises:
        ValueError: If they are not of this task, or one of an arm not of its settings now.
    """
    wanted = {arm.name: resolved_config(task, arm) for arm in arms}
    first = next(iter(wanted.values()))
    try:
        records = load_records(folder)
    except FileNotFoundError:
        return {}
    for record in records:
        path = record_path(folder, record.arm, record.seed)
        if record.arm in wanted:
            check_same_config(path, record.config, wanted[record.arm])
        else:
            check_same_config(path, _without_training(record.config), _without_training(first))
    return {(record.arm, record.seed): record for record in records}


def _without_training(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ARM_SETTINGS}


def _run_jobs(
    engine: Engine,
    task: Task,
    jobs: Sequence[tuple[Arm, int]],
    folder: Path,
    learned: Path,
    display: Display | None,
) -> None:
    runs: dict[Future[RunRecord], tuple[str, int]] = {
        engine.pool.submit(_work, task, arm, seed, folder, learned, engine.enter, engine.tell): (
            arm.name,
            seed,
        )
        for arm, seed in jobs
    }
    pending = set(runs)
    begun: set[tuple[str, int]] = set()
    failure: BaseException | None = None
    try:
        while pending:
            done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
            begun |= _show(engine, display)
            for future in done:
                error = _error(future)
                failure = failure or error
                if error is None and display is not None:
                    display.finish(future.result())
            if failure is not None:
                # What runs beside it is brought to its end, nothing else is begun.
                pending = {run for run in pending if runs[run] in begun or not run.cancel()}
    except BaseException:
        # Ctrl-C: what has not begun is not begun, what runs has its checkpoint.
        engine.stop()
        raise
    if failure is not None:
        raise failure


def _error(future: Future[RunRecord]) -> BaseException | None:
    if future.cancelled():
        return ConnectionError(
            "the connection to the cluster was lost; the same command goes on from here"
        )
    return future.exception()


def _show(engine: Engine, display: Display | None) -> set[tuple[str, int]]:
    """Show the news that have come, and return of which runs they are."""
    news = engine.read_news()
    if display is not None:
        for update in news:
            display.update(update)
    return {(update.arm, update.seed) for update in news}


def _work(
    task: Task,
    arm: Arm,
    seed: int,
    folder: Path,
    learned: Path,
    enter: Callable[[], None],
    tell: Callable[[Update], None],
) -> RunRecord:
    def progress(step: int, figures: dict[str, float]) -> None:
        tell(Update(arm.name, seed, step, figures))

    enter()
    progress(0, {})
    with warnings.catch_warnings():
        # transformers looks for pinned memory on machines without an accelerator.
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        return run_arm(task, arm, seed, folder, learned=learned, progress=progress)
