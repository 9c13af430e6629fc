"""The live display of a comparison and its table, on the terminal."""

from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from regdrop.disagreement import Disagreement, Predictions
from regdrop.experiments.arms import Arm
from regdrop.experiments.evaluating.evaluate import Evaluation
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.reporting.tables import caption, find_metrics, table_cells
from regdrop.experiments.running.progress import Update
from regdrop.experiments.studies.choices import TunedArm
from regdrop.experiments.studies.variations import describe_settings
from regdrop.tasks import Task

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


class LiveDisplay:
    """One bar an arm, over the steps of all its seeds, with the last metrics of each."""

    def __init__(self, arms: Sequence[Arm], seeds: Sequence[int], console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description:<20}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {
            arm.name: self.progress.add_task(
                arm.name, total=arm.training.max_steps * len(seeds), figures=""
            )
            for arm in arms
        }
        self._steps: dict[tuple[str, int], int] = {}

    def __enter__(self) -> "LiveDisplay":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def update(self, update: Update) -> None:
        """Show the progress of a run."""
        shown = {
            name.removeprefix("eval_"): value
            for name, value in update.metrics.items()
            if name.startswith("eval_") and name != "eval_loss"
        }
        text = " ".join(f"{name} {value:.3f}" for name, value in shown.items())
        shown_text = f"seed {update.seed}: {text}" if text else None
        self._move(update.arm, update.seed, update.step, shown_text)

    def finish(self, record: RunRecord) -> None:
        """Show that a run is done; on a terminal without live display, say so in a line."""
        self._move(record.arm, record.seed, record.steps, None)
        if not self.console.is_terminal:
            self.say(_finished(record))

    def say(self, text: str) -> None:
        """Show a line above the bars."""
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _move(self, arm: str, seed: int, step: int, figures: str | None) -> None:
        before = self._steps.get((arm, seed), 0)
        self._steps[arm, seed] = max(before, step)
        bar = self._bars[arm]
        self.progress.advance(bar, max(0, step - before))
        if figures is not None:
            self.progress.update(bar, figures=figures)


class FinishedRuns:
    """A line for every run that is done; for work whose runs are not known beforehand."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def update(self, update: Update) -> None:
        """Show nothing of a run that is not done."""

    def finish(self, record: RunRecord) -> None:
        """Show that a run is done."""
        self.say(_finished(record))

    def say(self, text: str) -> None:
        """Show a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _finished(record: RunRecord) -> str:
    figures = " ".join(f"{name} {value:.3f}" for name, value in record.validation.items())
    return f"{record.arm} seed {record.seed}: validation {figures}"


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
    # A table wider than the terminal is better scrolled than cut.
    width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    Console(file=console.file, width=max(console.width, width), markup=False).print(table)
    console.print(caption(records), style="dim")


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
