"""The commands, one function each."""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from regdrop.config import RDropConfig
from regdrop.conventions import CONVENTIONS
from regdrop.conventions import convert_alpha as convert
from regdrop.diagnostics import dropout_report
from regdrop.experiments import build_arms, write_report
from regdrop.experiments import compare as run_comparison
from regdrop.experiments.arms import Arm
from regdrop.experiments.display import LiveDisplay, print_table
from regdrop.experiments.record import load_records
from regdrop.integrations.transformers.loading import load_model
from regdrop.passes import find_dropout
from regdrop.tasks import PRESETS, Task

app = typer.Typer(
    help="Train with R-Drop (Regularized Dropout), compare it with training without it, and "
    "see whether it acts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

TaskName = Annotated[str, typer.Argument(help="A preset: see `regdrop tasks`.", metavar="TASK")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the results; runs/TASK if absent.")
]
DatasetOption = Annotated[str | None, typer.Option(help="A `datasets` folder or hub id.")]
ModelOption = Annotated[str | None, typer.Option(help="A checkpoint: folder or hub id.")]
Alpha = Annotated[float | None, typer.Option(help="Weight of the KL, instead of the preset's.")]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps, instead of the preset's.")]


@app.command()
def tasks() -> None:
    """List the tasks."""
    table = Table("task", "what", "steps", "alpha")
    for name, task in PRESETS.items():
        table.add_row(name, task.description, str(task.training.max_steps), f"{task.rdrop.alpha:g}")
    console.print(table)


@app.command()
def train(
    task: TaskName,
    arm: Annotated[str, typer.Option(help="Way of training.")] = "rdrop",
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and masks.")] = 0,
    dataset: DatasetOption = None,
    model: ModelOption = None,
    alpha: Alpha = None,
    steps: Steps = None,
    output: Output = None,
) -> None:
    """Train one arm with one seed; go on where it was interrupted."""
    _compare(_task(task, dataset, model, alpha, steps), [arm], [seed], 1, output)


@app.command()
def compare(
    task: TaskName,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    arms: Annotated[
        str | None, typer.Option(help="Arms to train, by commas; all if absent.")
    ] = None,
    dataset: DatasetOption = None,
    model: ModelOption = None,
    alpha: Alpha = None,
    steps: Steps = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; one a core, or one on a GPU.")
    ] = None,
    output: Output = None,
) -> None:
    """Train the baseline, its equal-compute and two-pass controls, and R-Drop; print the result.

    Finished runs are kept: repeating the command trains only what is missing.
    """
    names = None if arms is None else [name.strip() for name in arms.split(",")]
    chosen = _task(task, dataset, model, alpha, steps)
    _compare(chosen, names, list(range(first_seed, first_seed + seeds)), workers, output)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison.")],
) -> None:
    """Draw the table and the plots of a comparison from its records."""
    try:
        target = write_report(folder)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    print_table(load_records(folder), console)
    console.print(f"Report and plots: {target}")


@app.command()
def doctor(
    model: Annotated[
        str, typer.Argument(help="A saved model's folder, a hub id, or module:callable.")
    ],
    options: Annotated[
        str, typer.Option("--rdrop", help="R-Drop's options: alpha=1,backward_passes=1,...")
    ] = "",
) -> None:
    """Show a model's sources of dropout, the cost of a step, and what to change."""
    try:
        config = _parse_rdrop(options)
        loaded = load_model(model).train()
    except (ValueError, TypeError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    sources = find_dropout(loaded)
    table = Table("source", "kind", "rate", title=f"{type(loaded).__name__}: sources of dropout")
    for source in sources:
        table.add_row(source.name or "(the model)", source.kind, f"{source.rate:g}")
    console.print(table)
    for line in dropout_report(loaded, config):
        console.print(f"- {line}")
    if not any(source.active for source in sources):
        raise typer.Exit(1)


@app.command(name="convert-alpha")
def convert_alpha(
    value: Annotated[float, typer.Argument(help="The coefficient in the other implementation.")],
    convention: Annotated[
        str, typer.Option("--from", help=f"Whose it is: {', '.join(CONVENTIONS)}.")
    ],
    batch_size: Annotated[
        int | None, typer.Option(help="Samples of its micro-batch, before they are doubled.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Target tokens of its micro-batch, for token tasks.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Number of classes, or size of the vocabulary.")
    ] = None,
) -> None:
    """Convert another implementation's KL coefficient to the paper's alpha, which is ours."""
    try:
        alpha = convert(
            value, convention, batch_size=batch_size, tokens=tokens, num_classes=num_classes
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"{CONVENTIONS[convention].loss}", style="dim", highlight=False)
    console.print(f"alpha = {alpha:g}")


def _compare(
    task: Task,
    arms: list[str] | None,
    seeds: list[int],
    workers: int | None,
    output: Path | None,
) -> None:
    known = build_arms(task)
    names = list(known) if arms is None else arms
    if unknown := sorted(set(names) - set(known)):
        raise typer.BadParameter(f"arms must be among {', '.join(known)}; got {', '.join(unknown)}")
    folder = Path("runs") / task.name if output is None else output
    workers, threads = _workers(workers)
    shown: list[Arm] = [known[name] for name in names]
    console.print(
        f"[bold]{task.name}[/bold]: {task.description}; {len(shown)} arms, {len(seeds)} seeds, "
        f"results in {folder}"
    )
    try:
        with LiveDisplay(shown, seeds, console) as display:
            run_comparison(
                task,
                seeds=seeds,
                folder=folder,
                workers=workers,
                threads=threads,
                arms=names,
                display=display,
            )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on from here.")
        raise typer.Exit(130) from None
    target = write_report(folder)
    print_table(load_records(folder), console)
    console.print(f"Report and plots: {target}")


def _workers(workers: int | None) -> tuple[int, int | None]:
    """Return the runs at a time and the threads of each: all cores, or one run on a GPU."""
    import torch

    if torch.cuda.is_available():
        return workers or 1, None
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    workers = workers or cores
    return workers, max(1, cores // workers)


def _task(
    name: str, dataset: str | None, model: str | None, alpha: float | None, steps: int | None
) -> Task:
    if name not in PRESETS:
        raise typer.BadParameter(f"TASK must be one of {', '.join(PRESETS)}; got {name!r}")
    changes: dict[str, Any] = {"dataset": dataset, "model": model}
    changes = {key: value for key, value in changes.items() if value is not None}
    task: Any = PRESETS[name]
    if unknown := sorted(changes.keys() - {field.name for field in fields(task)}):
        raise typer.BadParameter(f"task {name!r} takes no {', '.join(unknown)}")
    if model is not None:
        changes["model_config"] = {}
    try:
        if alpha is not None:
            changes["rdrop"] = replace(task.rdrop, alpha=alpha)
        if steps is not None:
            changes["training"] = replace(task.training, max_steps=steps)
        changed: Task = replace(task, **changes)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    return changed


def _parse_rdrop(text: str) -> RDropConfig:
    """Return the options of "name=value,..." with JSON values."""
    import json

    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"--rdrop must be name=value,..., got {part!r}")
        try:
            options[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[name.strip()] = value
    return RDropConfig.from_dict(options)
