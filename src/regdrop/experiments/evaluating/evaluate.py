"""The model of a finished run on a split of its data, or of other data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import nn

from regdrop.experiments.arms import baseline_arm
from regdrop.experiments.bootstrap import Interval, interval, resample
from regdrop.experiments.evaluating.changes import apply_decoding, check_changes
from regdrop.experiments.recording.files import read_object, write_json
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.running.building import build_trainer
from regdrop.experiments.running.progress import quiet_libraries
from regdrop.experiments.running.run import MODEL_FOLDER, RECORD_NAME
from regdrop.tasks import PreparedTask, Task
from regdrop.tasks.configure import change_task, task_from_config


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a saved model on a split.

    Attributes:
        task: The task.
        split: Name of the split.
        examples: Number of its examples.
        metrics: The task's metrics.
        intervals: Their 95 % intervals over the examples.
        signatures: What a metric's own library says of how it was computed.
        path: The file that keeps them.
        unknown_words: Share of the words of other data than the run's that the model does not know.
    """

    task: Task
    split: str
    examples: int
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    signatures: dict[str, str]
    path: Path
    unknown_words: float = 0.0


def load_run(folder: Path) -> tuple[Task, RunRecord]:
    """Return the task and the record of a finished run of `regdrop train`.

    Where the folder of the checkpoint that the run began from is gone, the task reads tokenizer,
    processor and configuration from the run's own model.

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
    if _is_gone(getattr(task, "model", None)):
        task = replace(task, model=str(saved))
    return task, record


def _is_gone(model: str | None) -> bool:
    """Return whether a checkpoint was in a folder that is no longer there."""
    is_folder = model is not None and model.startswith((".", "/", "~"))
    return is_folder and not Path(str(model)).expanduser().exists()


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


def evaluate(
    folder: Path, split: str, *, data: str | None = None, settings: Sequence[str] = ()
) -> Evaluation:
    """Evaluate the model of a run and keep the metrics beside it.

    Args:
        folder: Folder of the run.
        split: Name of the split: "train", "validation", "test" or a further one of the task.
        data: Folder or hub id of other data than the run's.
        settings: Changed settings of the task, each "name=value": of what is read and how text
            is generated.

    Raises:
        ValueError: If there is no such run or split, or a setting has no effect on a saved model.
    """
    task, record = load_run(folder)
    changed = change_task(task, data=data, settings=settings)
    check_changes(folder, changed, settings)
    quiet_libraries()
    prepared = changed.prepare(folder / MODEL_FOLDER)
    dataset: Any = prepared.splits[split]
    model = load_saved_model(prepared, folder)
    apply_decoding(model, changed, settings)
    trainer = build_trainer(changed, baseline_arm(changed), record.seed, folder, prepared, model)
    statistics: np.ndarray = prepared.example_statistics(trainer.predict(dataset))
    result = Evaluation(
        task=changed,
        split=split,
        examples=len(statistics),
        metrics=changed.compute_metrics(statistics),
        intervals={
            name: interval(values)
            for name, values in resample(changed.compute_metrics, [statistics]).items()
        },
        signatures=prepared.signatures,
        path=_free_path(folder, split, data, settings),
        unknown_words=0.0 if data is None else _unknown_words(prepared, dataset),
    )
    write_json(result.path, _content(result, data, settings))
    return result


def _free_path(folder: Path, split: str, data: str | None, settings: Sequence[str]) -> Path:
    """Return where an evaluation is written: not over that of other data of the same name."""
    name = split if data is None else f"{split}-{Path(data).name}"
    made_with = {"data": data, "settings": list(settings)}
    path, further = folder / f"evaluation-{name}.json", count(2)
    while path.exists() and not made_with.items() <= read_object(path, "an evaluation").items():
        path = folder / f"evaluation-{name}-{next(further)}.json"
    return path


def _unknown_words(prepared: PreparedTask, dataset: Any) -> float:
    """Return the share of a split's words that the tokenizer does not know; 0 for images."""
    unknown = getattr(prepared.processing_class, "unk_token_id", None)
    if unknown is None:
        return 0.0
    counts = [(row.count(unknown), len(row)) for row in (x["input_ids"] for x in dataset)]
    found, words = (sum(column) for column in zip(*counts, strict=True))
    return float(found / max(1, words))


def _content(result: Evaluation, data: str | None, settings: Sequence[str]) -> dict[str, Any]:
    return {
        "split": result.split,
        "data": data,
        "settings": list(settings),
        "examples": result.examples,
        "figures": result.metrics,
        "intervals": {name: list(interval) for name, interval in result.intervals.items()},
        "signatures": result.signatures,
        "unknown_words": result.unknown_words,
    }
