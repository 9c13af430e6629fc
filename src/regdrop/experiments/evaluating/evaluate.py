"""The model of a finished run on a split of its data, or of other data."""

from collections.abc import Mapping, Sequence
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
from regdrop.experiments.recording.settings import differing_data
from regdrop.experiments.running.building import build_trainer
from regdrop.experiments.running.progress import quiet_libraries
from regdrop.experiments.running.run import MODEL_FOLDER, RECORD_NAME
from regdrop.tasks import PreparedTask, Task
from regdrop.tasks.common.pretrained import PACKAGE_PREFIX
from regdrop.tasks.configure import change_task, task_from_config
from regdrop.tasks.data_sets.digests import data_digests
from regdrop.tasks.images.models import EFFICIENTNET_LITE0
from regdrop.tasks.notices import say_once

# What a kept model reads its input with.
_PROCESSING = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


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
    if data is None:
        _say_changed_data(record)
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
        path=free_path(
            folder,
            f"evaluation-{split_label(split, data)}",
            {"data": data, "settings": list(settings)},
        ),
        unknown_words=0.0 if data is None else _unknown_words(prepared, dataset),
    )
    write_json(result.path, _content(result, data, settings))
    return result


def _say_changed_data(record: RunRecord) -> None:
    """Say if the data of a run is not what it was when the run was trained."""
    dataset = record.config["dataset"]
    found, now = record.config.get("data"), data_digests(dataset)
    if found and now and (names := differing_data(found, now)):
        say_once(
            f"data {dataset!r} has changed since the run was trained ({', '.join(names)}): its "
            "metrics are of the data of now"
        )


def split_label(split: str, data: str | None) -> str:
    """Return what the files of a split are called, with the name of other data than the run's."""
    return split if data is None else f"{split}-{Path(data).name}"


def free_path(folder: Path, name: str, made_with: Mapping[str, Any]) -> Path:
    """Return where a result is written: not over one that was made with anything else.

    Args:
        folder: Its folder.
        name: Its name, without ending; a number is added where that is taken.
        made_with: What the file holds of how it was made.

    Raises:
        ValueError: If a file of that name cannot be read.
    """
    path, further = folder / f"{name}.json", count(2)
    while path.exists():
        found = read_object(path, "a result of regdrop")
        if all(key in found and found[key] == value for key, value in made_with.items()):
            break
        path = folder / f"{name}-{next(further)}.json"
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
