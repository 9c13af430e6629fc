"""The command that measures how far the sub-models of a run's dropout are apart."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID

from regdrop.commands.app import app, console, usage_errors
from regdrop.commands.options import Data, RunFolder, output_option
from regdrop.commands.tables import print_disagreement
from regdrop.experiments.evaluating.measure import measure as run_measurement
from regdrop.experiments.recording.processes import require_one_process


@app.command()
def measure(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="The held-out split: test, validation, ...")] = "test",
    data: Data = None,
    num_masks: Annotated[int, typer.Option(min=2, help="Dropout masks, sub-models each.")] = 32,
    examples: Annotated[
        int, typer.Option(min=1, help="Most examples of each split, drawn by a fixed seed.")
    ] = 1000,
    output: Annotated[
        Path | None, output_option("Folder of the results; the run's if absent.")
    ] = None,
) -> None:
    """Show how far dropout's sub-models are apart, on training and on held-out items.

    Compared are sub-models, their means, and the deployed model: distances, NLL, accuracy
    and calibration (docs/theory.md). Items are examples of a class, or words.
    """
    with usage_errors(), Progress(console=console, transient=True) as progress:
        require_one_process("measure")
        bars: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(f"{name} items")
            progress.update(bars[name], completed=done, total=total)

        result = run_measurement(
            run,
            split,
            data=data,
            num_masks=num_masks,
            examples=examples,
            output=output,
            progress=show,
        )
    print_disagreement(result.record, result.splits, console)
    console.print(f"Kept in {result.path}; figure: {result.figure}")
