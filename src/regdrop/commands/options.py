"""The options of the commands that train, and the task that they choose."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

from regdrop.tasks import Task
from regdrop.tasks.configure import change_task, find_task

TaskName = Annotated[
    str, typer.Argument(help="A task or one of its presets: see `regdrop tasks`.", metavar="TASK")
]
Preset = Annotated[str | None, typer.Option(help="A preset of the task; its first if absent.")]
Data = Annotated[
    str | None, typer.Option("--data", "--dataset", help="A folder of data, or a hub id.")
]
ModelOption = Annotated[str | None, typer.Option(help="A checkpoint: folder or hub id.")]


def _alpha(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"alpha must be a number or auto, got {text!r}") from None


Alpha = Annotated[
    Any,
    typer.Option(
        parser=_alpha, metavar="NUMBER", help="Weight of the KL, or auto, instead of the preset's."
    ),
]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps, instead of the preset's.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting of the preset: dropout=0.2, training.learning_rate=1e-4, "
        "rdrop.fraction=0.5. Repeat it for several.",
    ),
]
# NumPy's generators take no larger one.
LAST_SEED = 2**32 - 1
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds.")]
FirstSeed = Annotated[int, typer.Option(min=0, max=LAST_SEED, help="The first of them.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Runs at a time; one a core, or one on a GPU.")
]
ExecutorAddress = Annotated[
    str | None,
    typer.Option(
        "--executor",
        metavar="dask://HOST:PORT",
        help="A Dask cluster whose workers take the runs: see docs/cluster.md.",
    ),
]


def chosen_task(
    task: str,
    preset: str | None,
    data: str | None,
    model: str | None,
    alpha: float | Literal["auto"] | None,
    steps: int | None,
    settings: Sequence[str] | None,
) -> Task:
    """Return the task that the options of a command choose.

    Raises:
        ValueError: For a task, preset or setting that there is not.
    """
    return change_task(
        find_task(task, preset),
        data=data,
        model=model,
        alpha=alpha,
        steps=steps,
        settings=settings or (),
    )


def seed_range(first: int, count: int) -> range:
    """Return the seeds of a comparison.

    Raises:
        ValueError: If the last one is too large.
    """
    if first + count - 1 > LAST_SEED:
        raise ValueError(
            f"the last seed must be at most {LAST_SEED}, got --first-seed {first} and "
            f"--seeds {count}"
        )
    return range(first, first + count)
