"""Arms over seeds, in parallel, continued where they stopped."""

import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any, NamedTuple

from regdrop.experiments.arms import Arm
from regdrop.experiments.recording.history import DivergedError
from regdrop.experiments.recording.ownership import HeldError
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
from regdrop.experiments.running.engines import Engine, WorkerLostError, open_engine
from regdrop.experiments.running.leftovers import LEARNED, clean_up
from regdrop.experiments.running.optimisers import check_optimiser
from regdrop.experiments.running.progress import Display, Update
from regdrop.experiments.running.run import UNFINISHED, RunPaths, run_arm
from regdrop.tasks import Task

_POLL_SECONDS = 0.2
# Between two looks at runs that another command is at work on.
_HELD_SECONDS = 2.0


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
    learned = folder / UNFINISHED / LEARNED
    if jobs:
        with open_engine(
            executor, workers=min(workers, len(jobs)), threads=threads, folder=folder
        ) as engine:
            work = _Work(task, folder, learned / settings_digest(task), engine.enter, engine.tell)
            _run_jobs(engine, work, jobs, display, skip_diverged)
    clean_up(folder)
    merge_records(folder)
    wanted = {(name, seed) for name in names for seed in seeds}
    return [record for record in _load(folder) if (record.arm, record.seed) in wanted]


def _check_records(
    task: Task, arms: Sequence[Arm], folder: Path
) -> dict[tuple[str, int], RunRecord]:
    """Return the records of a folder by arm and seed.

    Raises:
        ValueError: If they are not of this task, or one of an arm not of its settings now.
    """
    wanted = {arm.name: resolved_config(task, arm) for arm in arms}
    first = next(iter(wanted.values()))
    records = _load(folder)
    for record in records:
        path = record_path(folder, record.arm, record.seed)
        if record.arm in wanted:
            check_same_config(path, record.config, wanted[record.arm])
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


class _Work(NamedTuple):
    """What all runs of a comparison share; it can be pickled.

    Attributes:
        task: The task.
        folder: Where records are kept.
        learned: Folder of what the runs learn from data before their models.
        enter: Called where a run is, before it.
        tell: Called where a run is, with its news.
    """

    task: Task
    folder: Path
    learned: Path
    enter: Callable[[], None]
    tell: Callable[[Update], None]

    def train(self, arm: Arm, seed: int) -> RunRecord:
        """Train a run where it is computed."""

        def progress(step: int, figures: dict[str, float]) -> None:
            self.tell(Update(arm.name, seed, step, figures))

        self.enter()
        progress(0, {})
        with warnings.catch_warnings():
            # transformers looks for pinned memory on machines without an accelerator.
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            return run_arm(
                self.task, arm, seed, self.folder, learned=self.learned, progress=progress
            )


def _run_jobs(
    engine: Engine,
    work: _Work,
    jobs: Sequence[tuple[Arm, int]],
    display: Display | None,
    skip_diverged: bool,
) -> None:
    runs: dict[Future[RunRecord], tuple[Arm, int]] = {}

    def submit(job: tuple[Arm, int]) -> Future[RunRecord]:
        future: Future[RunRecord] = engine.pool.submit(work.train, *job)
        runs[future] = job
        return future

    pending = {submit(job) for job in jobs}
    begun: set[tuple[str, int]] = set()
    held = _HeldRuns(display)
    lost: list[str] = []
    failure: BaseException | None = None
    try:
        while pending or held.jobs:
            if not pending:
                time.sleep(_POLL_SECONDS)
            done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
            begun |= _show(engine, display)
            for future in done:
                arm, seed = runs[future]
                error = _error(future)
                if error is None:
                    if display is not None:
                        display.finish(future.result())
                elif isinstance(error, HeldError):
                    held.add((arm, seed), error)
                elif isinstance(error, WorkerLostError):
                    lost.append(f"{arm.name} seed {seed}: {error}")
                    _say(display, lost[-1])
                elif not (skip_diverged and isinstance(error, DivergedError)):
                    failure = failure or _named(error, arm, seed)
            if failure is not None:
                # What runs beside it is brought to its end, nothing else is begun.
                held.jobs.clear()
                pending = {run for run in pending if _name(runs[run]) in begun or not run.cancel()}
            elif held.is_due():
                pending |= {submit(job) for job in held.take()}
    except BaseException:
        # Ctrl-C: what has not begun is not begun, what runs has its checkpoint.
        engine.stop()
        raise
    _show(engine, display)
    if failure is not None:
        raise failure
    if lost:
        raise ValueError(f"{'; '.join(lost)}; the same command goes on from here")


class _HeldRuns:
    """Runs that other commands are at work on, to be tried again."""

    def __init__(self, display: Display | None) -> None:
        self.jobs: list[tuple[Arm, int]] = []
        self._display = display
        self._told: set[str] = set()
        self._last = time.monotonic()

    def add(self, job: tuple[Arm, int], error: HeldError) -> None:
        """Keep a run for later, and say once where it is at work."""
        self.jobs.append(job)
        if str(error) not in self._told:
            self._told.add(str(error))
            _say(self._display, f"{error}: waiting for it")

    def is_due(self) -> bool:
        """Return whether it is time to look again."""
        return bool(self.jobs) and time.monotonic() - self._last > _HELD_SECONDS

    def take(self) -> list[tuple[Arm, int]]:
        """Return the runs, which are no longer kept."""
        self._last = time.monotonic()
        jobs, self.jobs = self.jobs, []
        return jobs


def _name(job: tuple[Arm, int]) -> tuple[str, int]:
    return job[0].name, job[1]


def _say(display: Display | None, text: str) -> None:
    if display is not None:
        display.say(text)


def _named(error: BaseException, arm: Arm, seed: int) -> BaseException:
    """Return an error that says in which run it was, where it says what was wrong with it."""
    if isinstance(error, DivergedError):
        return DivergedError(f"{arm.name} seed {seed}: {error}")
    return error


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
