"""One run in this process, with a folder of its own that keeps its model."""

from pathlib import Path

from regdrop.experiments.arms import Arm
from regdrop.experiments.recording.processes import leave_process_group
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.running.progress import Display, Update, quiet_libraries
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.tasks import Task


def run_single(
    task: Task, arm: Arm, seed: int, folder: Path, *, display: Display | None = None
) -> RunRecord:
    """Train once, or return the record if that was done before; keep the model in `model/`.

    Args:
        task: The task.
        arm: The way of training.
        seed: Seed of weights, order of the data and dropout masks.
        folder: Folder of the run.
        display: Shown the progress.

    Raises:
        ValueError: As `train_run` does.
    """
    quiet_libraries()

    def progress(step: int, metrics: dict[str, float]) -> None:
        if display is not None:
            display.update(Update(arm.name, seed, step, metrics))

    try:
        record = train_run(task, arm, seed, RunPaths.alone(folder), progress=progress)
    finally:
        leave_process_group()
    if display is not None:
        display.finish(record)
    return record
