"""Results as tables on the terminal: of a comparison, of one run, of a choice, of sub-models."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from regdrop.disagreement import Disagreement, Predictions
from regdrop.experiments.evaluating.evaluate import Evaluation
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.reporting.tables import caption, find_metrics, table_cells
from regdrop.experiments.studies.choices import TunedArm
from regdrop.experiments.studies.variations import describe_settings
from regdrop.tasks import Task

_WIDEST = 10_000  # columns
# What is between two of the predictors, by the field of `Disagreement`.
_DISTANCES = {
    "epkl": "two sub-models: E KL(P || P')",
    "kl_submodel_mean": "sub-model to mean: E KL(P || M), mutual information",
    "kl_mean_submodel": "mean to sub-model: E KL(M || P)",
    "kl_submodel_geometric": "sub-model to geometric mean: E KL(P || G)",
    "kl_geometric_submodel": "geometric mean to sub-model: E KL(G || P)",
    "kl_geometric_deployed": "geometric mean to deployed: KL(G || D)",
    "kl_mean_deployed": "mean to deployed: KL(M || D)",
}
_PREDICTORS = {
    "submodel": "a sub-model",
    "mean": "their mean (MC dropout)",
    "geometric": "their geometric mean",
    "deployed": "deployed, dropout off",
}


def print_tuned(task: Task, tuned: Mapping[str, TunedArm], console: Console) -> None:
    """Print what was chosen for every arm."""
    metric = task.metrics[task.selection_metric]
    table = Table("arm", "chosen", f"validation {metric.title}", "tried")
    for name, choice in tuned.items():
        shown = "" if choice.validation is None else metric.format(choice.validation)
        table.add_row(name, describe_settings(choice.settings), shown, str(choice.tried))
    console.print(table)


def print_metrics(result: RunRecord | Evaluation, console: Console) -> None:
    """Print the metrics of one run on its test splits, or of one evaluation with intervals."""
    if isinstance(result, RunRecord):
        title, values = f"{result.task}: {result.arm}, seed {result.seed}", result.test
        read, intervals = find_metrics([result]), {}
        heading = "test"
    else:
        title, values = f"{result.task.name}: {result.examples} examples", result.metrics
        read, intervals = result.task.metrics, result.intervals
        heading = result.split
    table = Table("metric", heading, title=title)
    if intervals:
        table.add_column("95 % interval over examples")
    for name, value in values.items():
        row = [read[name].title, read[name].format(value)]
        if intervals:
            row.append(" to ".join(read[name].format(x) for x in intervals[name]))
        table.add_row(*row)
    console.print(table)
    for name, signature in result.signatures.items():
        console.print(f"{read[name].title}: {signature}", style="dim", highlight=False)


def print_table(records: Sequence[RunRecord], console: Console) -> None:
    """Print the table of a comparison."""
    header, rows = table_cells(records)
    table = Table(title=f"{records[0].task}: {len(rows)} arms")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print_uncut(table, console)
    console.print(caption(records), style="dim")


def print_uncut(table: Table, console: Console) -> None:
    """Print a table at its full width: one wider than the terminal is better scrolled than cut."""
    width = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    Console(file=console.file, width=max(console.width, width), markup=False).print(table)


def print_disagreement(
    record: RunRecord, splits: Mapping[str, Disagreement], console: Console
) -> None:
    """Print what is apart and who predicts how well, on some splits of a run."""
    masks = next(iter(splits.values())).num_masks
    items = ", ".join(f"{found.items:,} {name} items" for name, found in splits.items())
    distances = Table(
        "apart, in nats an item",
        *splits,
        title=f"{record.task}, {record.arm}, seed {record.seed}: {masks} masks, {items}",
    )
    for name, title in _DISTANCES.items():
        distances.add_row(title, *(f"{getattr(found, name):.4f}" for found in splits.values()))
    gaps = (f"{found.gap:+.4f}" for found in splits.values())
    distances.add_row("NLL of a sub-model above the deployed model's", *gaps)
    for table in (distances, *(_quality(name, found) for name, found in splits.items())):
        console.print(table)


def _quality(name: str, found: Disagreement) -> Table:
    table = Table(f"who predicts {name} items", "NLL", "accuracy (%)", "calibration error (%)")
    for field, title in _PREDICTORS.items():
        of: Predictions = getattr(found, field)
        percentages = (f"{value * 100:.2f}" for value in (of.accuracy, of.calibration_error))
        table.add_row(title, f"{of.nll:.4f}", *percentages)
    return table
