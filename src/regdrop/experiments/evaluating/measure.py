"""The sub-models of a finished run beside its deployed model, on training and held-out items."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from regdrop.disagreement import Disagreement
from regdrop.experiments.arms import baseline_arm
from regdrop.experiments.evaluating.result_files import free_path, split_label
from regdrop.experiments.evaluating.saved_run import load_run, load_saved_model
from regdrop.experiments.recording.environment import describe_hardware, library_versions
from regdrop.experiments.recording.files import write_json
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.reporting.disagreement_plot import draw_disagreement
from regdrop.experiments.running.building import build_trainer
from regdrop.experiments.running.progress import quiet_libraries
from regdrop.experiments.running.run import MODEL_FOLDER
from regdrop.integrations.transformers.disagreement import measure_model
from regdrop.tasks.common.seq2seq import EXAMPLE_ID
from regdrop.tasks.configure import change_task

TRAIN = "train"
# Examples are drawn, and masks too, by a seed of their own: two runs are measured on the same ones.
_SEED = 0
# Words of so many examples at a time have two distributions over the vocabulary in memory.
_BATCH = 32


@dataclass(frozen=True)
class Measurement:
    """The disagreement of a run's sub-models on some splits.

    Attributes:
        record: The record of the run.
        splits: Disagreement by the name of the split, the training split first.
        path: The file that keeps it.
        figure: The figure beside it.
    """

    record: RunRecord
    splits: Mapping[str, Disagreement]
    path: Path
    figure: Path


def measure(
    folder: Path,
    split: str = "test",
    *,
    data: str | None = None,
    num_masks: int = 32,
    examples: int = 1000,
    output: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Measurement:
    """Measure the sub-models of a run on its training split and on another; keep table and figure.

    What another run or other options left in the folder is kept; the names then have a number.

    Args:
        folder: Folder of the run.
        split: Name of the held-out split.
        data: Folder or hub id of other data than the run's.
        num_masks: Number of dropout masks.
        examples: Most examples of each split, drawn by a fixed seed.
        output: Folder of the results; the run's if absent.
        progress: Called with the split, the batches that are done and all of them.

    Raises:
        ValueError: If there is no such run or split, or its items have no classes or words as
            labels, or a file of the same name cannot be read.
    """
    task, record = load_run(folder)
    made_with = _made_with(record, data, num_masks, examples)
    place = output or folder, f"measure-{split_label(split, data)}", made_with
    free_path(*place)  # a file that cannot be read is named before anything is measured
    changed = change_task(task, data=data)
    quiet_libraries()
    prepared = changed.prepare(folder / MODEL_FOLDER)
    model: Any = load_saved_model(prepared, folder)
    trainer = build_trainer(changed, baseline_arm(changed), record.seed, folder, prepared, model)
    trainer.args.per_device_eval_batch_size = min(_BATCH, trainer.args.per_device_eval_batch_size)
    held_out = prepared.splits[split]
    splits = {}
    # Other data may be a held-out split alone.
    for name in dict.fromkeys([TRAIN, split] if TRAIN in prepared.splits else [split]):
        chosen = held_out if name == split else prepared.splits[name]
        loader = trainer.get_test_dataloader(draw_examples(chosen, examples))
        torch.manual_seed(_SEED)
        splits[name] = measure_model(model, _batches(loader, name, progress), num_masks)
    found = {
        "splits": {name: asdict(found) for name, found in splits.items()},
        "versions": library_versions(),
        "hardware": describe_hardware(),
    }
    target = free_path(*place)  # another may have been measured meanwhile
    write_json(target, made_with | found)
    figure = draw_disagreement(splits, target.with_suffix(".png"))
    return Measurement(record, splits, target, figure)


def draw_examples(dataset: Dataset[Any], count: int) -> Dataset[Any]:
    """Return as many examples of a split, drawn by a fixed seed, in their order; a stream's first.

    Raises:
        ValueError: For a count below 1.
    """
    if count < 1:
        raise ValueError(f"examples must be at least 1, got {count}")
    if isinstance(dataset, IterableDataset):
        first: Any = list(islice(dataset, count))
        drawn: Dataset[Any] = first
        return drawn
    sized: Any = dataset
    generator = torch.Generator().manual_seed(_SEED)
    chosen = torch.randperm(len(sized), generator=generator)[:count].sort().values.tolist()
    select = getattr(sized, "select", None)  # a `datasets.Dataset` knows its columns then
    return Subset(sized, chosen) if select is None else select(chosen)


def _batches(
    loader: Iterable[Any], name: str, progress: Callable[[str, int, int], None] | None
) -> Iterator[dict[str, Any]]:
    sized: Any = loader
    for done, batch in enumerate(loader):
        if progress is not None:
            progress(name, done, len(sized))
        yield {key: value for key, value in batch.items() if key != EXAMPLE_ID}
    if progress is not None:
        progress(name, len(sized), len(sized))


def _made_with(
    record: RunRecord, data: str | None, num_masks: int, examples: int
) -> dict[str, Any]:
    return {
        "task": record.task,
        "arm": record.arm,
        "seed": record.seed,
        "best_step": record.best_step,
        "config": record.config,
        "data": data,
        "num_masks": num_masks,
        "examples": examples,
    }
