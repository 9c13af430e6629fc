"""Runs given to an engine, followed to their ends, and begun again where others held them."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import NamedTuple

from regdrop.experiments.arms import Arm
from regdrop.experiments.recording.history import DivergedError
from regdrop.experiments.recording.ownership import HeldError
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.running.engine import Engine, WorkerLostError
from regdrop.experiments.running.progress import Display, Update
from regdrop.experiments.running.run import run_arm
from regdrop.tasks import Task

_POLL_SECONDS = 0.2
# Between two looks at runs that another command is at work on.
_HELD_SECONDS = 2.0


class Job(NamedTuple):
    """A run that is wanted."""

    arm: Arm
    seed: int

    def __str__(self) -> str:
        return f"{self.arm.name} seed {self.seed}"


class JobRunner(NamedTuple):
    """What makes the runs of a comparison where they are computed; it can be pickled.

    Attributes:
        task: The task.
        folder: Where records are kept.
        learned: Folder of what the runs learn from data before their models.
        enter: Called where a run is, before it.
        report: Called where a run is, with its progress.
    """

    task: Task
    folder: Path
    learned: Path
    enter: Callable[[], None]
    report: Callable[[Update], None]

    def run(self, job: Job) -> RunRecord:
        """Train a run, or return its record if that was done before."""
        arm, seed = job

        def progress(step: int, metrics: dict[str, float]) -> None:
            self.report(Update(arm.name, seed, step, metrics))

        self.enter()
        progress(0, {})
        return run_arm(self.task, arm, seed, self.folder, learned=self.learned, progress=progress)


def run_jobs(
    engine: Engine,
    runner: JobRunner,
    jobs: Sequence[Job],
    display: Display | None,
    skip_diverged: bool,
) -> None:
    """Compute runs on an engine, and wait for those that other commands are at work on.

    Args:
        engine: Where they are computed.
        runner: What makes them.
        jobs: The runs, in the order in which they are begun.
        display: Shown the progress.
        skip_diverged: Whether a run whose loss diverges is no failure.

    Raises:
        ValueError: For runs whose processes were killed, once the others have ended.
        Exception: What the first run that failed raised, once the runs beside it have ended.
    """
    runs: dict[Future[RunRecord], Job] = {}

    def submit(job: Job) -> Future[RunRecord]:
        future: Future[RunRecord] = engine.pool.submit(runner.run, job)
        runs[future] = job
        return future

    pending = {submit(job) for job in jobs}
    begun: set[tuple[str, int]] = set()
    ends = _Ends(display, skip_diverged)
    try:
        while pending or ends.held.jobs:
            if not pending:
                time.sleep(_POLL_SECONDS)
            done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
            begun |= _show_updates(engine, display)
            for future in done:
                ends.settle(runs[future], future)
            if ends.failure is not None:
                # What runs beside it is brought to its end, nothing else is begun.
                ends.held.jobs.clear()
                pending = {
                    run
                    for run in pending
                    if (runs[run].arm.name, runs[run].seed) in begun or not run.cancel()
                }
            elif ends.held.is_due():
                pending |= {submit(job) for job in ends.held.take()}
    except BaseException:
        # Ctrl-C: what has not begun is not begun, what runs has its checkpoint.
        engine.stop()
        raise
    _show_updates(engine, display)
    if ends.failure is not None:
        raise ends.failure
    if ends.lost:
        raise ValueError(f"{'; '.join(ends.lost)}; the same command goes on from here")


class _Ends:
    """How runs have ended: what is to be tried again, what was lost, and the first failure.

    Args:
        display: Told of each.
        skip_diverged: Whether a run whose loss diverges is no failure.
    """

    def __init__(self, display: Display | None, skip_diverged: bool) -> None:
        self.held = _HeldRuns(display)
        self.lost: list[str] = []
        self.failure: BaseException | None = None
        self._display, self._skip_diverged = display, skip_diverged

    def settle(self, job: Job, future: Future[RunRecord]) -> None:
        """Take note of a run that has ended."""
        error = _error(future)
        if error is None:
            if self._display is not None:
                self._display.finish(future.result())
        elif isinstance(error, HeldError):
            self.held.add(job, error)
        elif isinstance(error, WorkerLostError):
            self.lost.append(f"{job}: {error}")
            _say(self._display, self.lost[-1])
        elif not (self._skip_diverged and isinstance(error, DivergedError)):
            self.failure = self.failure or _named(error, job)


class _HeldRuns:
    """Runs that other commands are at work on, to be tried again."""

    def __init__(self, display: Display | None) -> None:
        self.jobs: list[Job] = []
        self._display = display
        self._told: set[str] = set()
        self._last = time.monotonic()

    def add(self, job: Job, error: HeldError) -> None:
        """Keep a run for later, and say once where it is at work."""
        self.jobs.append(job)
        if str(error) not in self._told:
            self._told.add(str(error))
            _say(self._display, f"{error}: waiting for it")

    def is_due(self) -> bool:
        """Return whether it is time to look again."""
        return bool(self.jobs) and time.monotonic() - self._last > _HELD_SECONDS

    def take(self) -> list[Job]:
        """Return the runs, which are no longer kept."""
        self._last = time.monotonic()
        jobs, self.jobs = self.jobs, []
        return jobs


def _say(display: Display | None, text: str) -> None:
    if display is not None:
        display.say(text)


def _named(error: BaseException, job: Job) -> BaseException:
    """Return an error that says in which run it was, where it says what was wrong with it."""
    if isinstance(error, DivergedError):
        return DivergedError(f"{job}: {error}")
    return error


def _error(future: Future[RunRecord]) -> BaseException | None:
    if future.cancelled():
        return ConnectionError(
            "the connection to the cluster was lost; the same command goes on from here"
        )
    return future.exception()


def _show_updates(engine: Engine, display: Display | None) -> set[tuple[str, int]]:
    """Show the progress that has come, and return of which runs it is."""
    updates = engine.read_updates()
    if display is not None:
        for update in updates:
            display.update(update)
    return {(update.arm, update.seed) for update in updates}
