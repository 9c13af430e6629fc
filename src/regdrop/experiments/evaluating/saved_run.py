"""A finished run of `regdrop train`: its task, its record and its model."""

from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from torch import nn

from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.running.run import MODEL_FOLDER, RECORD_NAME
from regdrop.tasks import PreparedTask, Task
from regdrop.tasks.common.pretrained import PACKAGE_PREFIX
from regdrop.tasks.configure import task_from_config
from regdrop.tasks.images.models import EFFICIENTNET_LITE0

# What a kept model reads its input with.
_PROCESSING = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def load_run(folder: Path) -> tuple[Task, RunRecord]:
    """Return the task and the record of a finished run of `regdrop train`.

    The task reads tokenizer, processor and configuration from the run's own model: the checkpoint
    that the run began from may have changed since, or be gone.

    Raises:
        ValueError: If the folder holds none.
    """
    path, saved = folder / RECORD_NAME, folder / MODEL_FOLDER
    if not path.exists() or not saved.exists():
        raise ValueError(
            f"{folder} must be the folder of a finished run of `regdrop train`, with "
            f"{RECORD_NAME} and {MODEL_FOLDER}/"
        )
    record = RunRecord.load(path)
    task: Any = task_from_config(record.config)
    model = getattr(task, "model", None)
    if model is not None and _is_of_the_run(model, saved):
        task = replace(task, model=str(saved))
    return task, record


def _is_of_the_run(model: str, saved: Path) -> bool:
    """Return whether a run's own model stands for the checkpoint that it began from."""
    if model.startswith(PACKAGE_PREFIX) or model == EFFICIENTNET_LITE0:  # as it was installed
        return False
    is_gone = model.startswith((".", "/", "~")) and not Path(model).expanduser().exists()
    return is_gone or any((saved / name).exists() for name in _PROCESSING)


def load_saved_model(prepared: PreparedTask, folder: Path) -> nn.Module:
    """Return the model of a finished run.

    Raises:
        ValueError: If its weights cannot be read.
    """
    saved = folder / MODEL_FOLDER
    try:
        return prepared.load_model(saved)
    except (SafetensorError, UnpicklingError, RuntimeError) as error:
        raise ValueError(f"the model in {saved} cannot be read: {error}") from error
