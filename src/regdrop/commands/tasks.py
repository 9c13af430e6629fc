"""Commands about tasks: which there are, and the preparation of their data."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from regdrop.commands.app import app, console, usage_errors
from regdrop.commands.tables import print_uncut
from regdrop.experiments.recording.processes import require_one_process
from regdrop.tasks import PRESETS
from regdrop.tasks.translation.iwslt import prepare_iwslt


@app.command()
def tasks() -> None:
    """List the tasks and their presets."""
    table = Table("task", "preset", "what", "steps", "alpha")
    for name, task in PRESETS.items():
        steps, alpha = task.training.max_steps, task.rdrop.alpha
        shown = alpha if alpha == "auto" else f"{alpha:g}"
        table.add_row(task.family, name, task.description, f"{steps:,}", shown)
    if console.is_terminal:
        console.print(table)
    else:  # no width to keep to: names are whole, and each row is a line
        print_uncut(table, console)


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(metavar="SET", help="iwslt14 (and IWSLT17's pairs).")],
    archive: Annotated[Path, typer.Argument(help="The official archive, as downloaded.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Turn a downloaded archive into a folder of data, with the paper's cleaning and splits."""
    with usage_errors():
        require_one_process("prepare")
        if name != "iwslt14":
            raise ValueError(f"SET must be iwslt14, got {name!r}")
        sizes = prepare_iwslt(archive, output)
    counts = ", ".join(f"{split} {size:,}" for split, size in sizes.items())
    console.print(f"{counts} pairs in {output}")
