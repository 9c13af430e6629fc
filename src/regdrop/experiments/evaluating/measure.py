"""The sub-models of a finished run beside its deployed model, on training and held-out items."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.utils.data import Dataset, IterableDataset, Subset

from regdrop.disagreement import Disagreement, Predictions
from regdrop.experiments.arms import baseline_arm
from regdrop.experiments.evaluating.evaluate import load_run, load_saved_model
from regdrop.experiments.recording.environment import describe_hardware, library_versions
from regdrop.experiments.recording.files import write_json
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.reporting.plots import COLOURS, new_figure, save_figure
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

# What is between two of the predictors, by the field of `Disagreement`.
DISTANCES = {
    "epkl": "two sub-models: E KL(P || P')",
    "kl_submodel_mean": "sub-model to mean: E KL(P || M), mutual information",
    "kl_mean_submodel": "mean to sub-model: E KL(M || P)",
    "kl_submodel_geometric": "sub-model to geometric mean: E KL(P || G)",
    "kl_geometric_submodel": "geometric mean to sub-model: E KL(G || P)",
    "kl_geometric_deployed": "geometric mean to deployed: KL(G || D)",
    "kl_mean_deployed": "mean to deployed: KL(M || D)",
}
PREDICTORS = {
    "submodel": "a sub-model",
    "mean": "their mean (MC dropout)",
    "geometric": "their geometric mean",
    "deployed": "deployed, dropout off",
}


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
            labels.
    """
    task, record = load_run(folder)
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
    label = split if data is None else f"{split}-{Path(data).name}"
    target = (output or folder) / f"measure-{label}.json"
    write_json(target, _content(record, data, num_masks, examples, splits))
    drawn = _draw(splits, target.with_suffix(".png"))
    return Measurement(record, splits, target, drawn)


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


def tables(measurement: Measurement) -> Sequence[Table]:
    """Return what is apart and who predicts how well, as tables for a reader."""
    record, splits = measurement.record, measurement.splits
    masks = next(iter(splits.values())).num_masks
    items = ", ".join(f"{found.items:,} {name} items" for name, found in splits.items())
    distances = Table(
        "apart, in nats an item",
        *splits,
        title=f"{record.task}, {record.arm}, seed {record.seed}: {masks} masks, {items}",
    )
    for name, title in DISTANCES.items():
        distances.add_row(title, *(f"{getattr(found, name):.4f}" for found in splits.values()))
    gaps = (f"{found.gap:+.4f}" for found in splits.values())
    distances.add_row("NLL of a sub-model above the deployed model's", *gaps)
    return distances, *(_quality(name, found) for name, found in splits.items())


def _quality(name: str, found: Disagreement) -> Table:
    table = Table(f"who predicts {name} items", "NLL", "accuracy (%)", "calibration error (%)")
    for field, title in PREDICTORS.items():
        of: Predictions = getattr(found, field)
        percentages = (f"{value * 100:.2f}" for value in (of.accuracy, of.calibration_error))
        table.add_row(title, f"{of.nll:.4f}", *percentages)
    return table


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


def _content(
    record: RunRecord,
    data: str | None,
    num_masks: int,
    examples: int,
    splits: Mapping[str, Disagreement],
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
        "splits": {name: asdict(found) for name, found in splits.items()},
        "versions": library_versions(),
        "hardware": describe_hardware(),
    }


def _draw(splits: Mapping[str, Disagreement], path: Path) -> Path:
    """Draw the distances and the predictions of each split, as bars side by side."""
    figure, panels = new_figure(4)
    distances = {
        "P, P'": "epkl",
        "P, M": "kl_submodel_mean",
        "M, P": "kl_mean_submodel",
        "P, G": "kl_submodel_geometric",
        "G, P": "kl_geometric_submodel",
        "G, D": "kl_geometric_deployed",
        "M, D": "kl_mean_deployed",
    }
    names = {"P": "submodel", "M": "mean", "G": "geometric", "D": "deployed"}
    kinds = (
        ("NLL", "nll", 1),
        ("accuracy (%)", "accuracy", 100),
        ("calibration error (%)", "calibration_error", 100),
    )
    panel = next(panels)
    _bars(panel, splits, list(distances), lambda s: [getattr(s, d) for d in distances.values()])
    panel.set_title("KL in nats: sub-models P, mean M, geometric mean G, deployed D")
    for (title, field, factor), panel in zip(kinds, panels, strict=True):

        def values(s: Disagreement, field: str = field, factor: int = factor) -> list[float]:
            return [getattr(getattr(s, name), field) * factor for name in names.values()]

        _bars(panel, splits, list(names), values)
        panel.set_title(title)
    return save_figure(figure, path)


def _bars(
    panel: Any,
    splits: Mapping[str, Disagreement],
    labels: Sequence[str],
    values: Callable[[Disagreement], Sequence[float]],
) -> None:
    width = 0.8 / len(splits)
    colours = (COLOURS[3], COLOURS[2])
    for i, (name, found) in enumerate(splits.items()):
        places = [x + (i - (len(splits) - 1) / 2) * width for x in range(len(labels))]
        panel.bar(places, values(found), width, label=name, color=colours[i])
    panel.set_xticks(range(len(labels)), labels)
    panel.grid(alpha=0.3, axis="y")
