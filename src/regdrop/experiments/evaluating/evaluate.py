"""The model of a finished run on a split of its data, or of other data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regdrop.experiments.arms import baseline_arm
from regdrop.experiments.bootstrap import Interval, interval, resample
from regdrop.experiments.evaluating.changes import apply_decoding, check_changes
from regdrop.experiments.evaluating.result_files import free_path, split_label
from regdrop.experiments.evaluating.saved_run import load_run, load_saved_model
from regdrop.experiments.recording.files import write_json
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.recording.settings import differing_data
from regdrop.experiments.running.building import build_trainer
from regdrop.experiments.running.progress import quiet_libraries
from regdrop.experiments.running.run import MODEL_FOLDER
from regdrop.tasks import PreparedTask, Task
from regdrop.tasks.configure import change_task
from regdrop.tasks.data_sets.digests import data_digests
from regdrop.tasks.notices import say_once


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
