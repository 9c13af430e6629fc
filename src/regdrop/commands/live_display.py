"""The progress of runs on the terminal: bars while they train, or a line for each at its end."""

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from regdrop.experiments.arms import Arm
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.running.progress import Update


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
