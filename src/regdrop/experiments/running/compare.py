"""The main job: the five arms of a task over several seeds."""

from collections.abc import Sequence
from pathlib import Path

from regdrop.experiments.arms import compared_arms
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.running.parallel import run_arms
from regdrop.experiments.running.progress import Display
from regdrop.tasks import Task


def compare(
    task: Task,
    *,
    seeds: Sequence[int],
    folder: Path,
    workers: int = 1,
    threads: int | None = None,
    executor: str | None = None,
    arms: Sequence[str] | None = None,
    display: Display | None = None,
) -> list[RunRecord]:
    """Train the arms of a task over seeds and return their records; see `run_arms`.

    Args:
        task: The task.
        seeds: Seeds.
        folder: Where records are kept.
        workers: Runs at a time.
        threads: Threads a run.
        executor: Address of a cluster; None for this machine.
        arms: Names of the arms to train; all by default.
        display: Shown the progress.

    Raises:
        ValueError: For an unknown arm, or as `run_arms` does.
    """
    return run_arms(
        task,
        compared_arms(task, arms),
        seeds=seeds,
        folder=folder,
        workers=workers,
        threads=threads,
        executor=executor,
        display=display,
    )
