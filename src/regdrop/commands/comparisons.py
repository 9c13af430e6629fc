"""Commands of many runs: the five arms, the studies, and their reports."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from regdrop.commands.app import (
    app,
    command_line,
    console,
    interruptible,
    usage_errors,
    workers_and_threads,
)
from regdrop.commands.options import (
    Alpha,
    Data,
    FirstSeed,
    ModelOption,
    Preset,
    Seeds,
    Settings,
    Steps,
    TaskName,
    Workers,
    chosen_task,
)
from regdrop.experiments import build_arms, load_records, run_arms, write_report
from regdrop.experiments.arms import Arm
from regdrop.experiments.display import LiveDisplay, print_table
from regdrop.experiments.manifest import COMPARISON, check_study, note_command
from regdrop.experiments.processes import require_one_process
from regdrop.experiments.studies import STUDIES, study_arms
from regdrop.tasks import PRESETS, Task

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder of the results; in runs/ if absent."),
]


@app.command()
def tasks() -> None:
    """List the tasks and their presets."""
    table = Table("task", "preset", "what", "steps", "alpha")
    for name, task in PRESETS.items():
        steps, alpha = task.training.max_steps, task.rdrop.alpha
        table.add_row(task.family, name, task.description, f"{steps:,}", f"{alpha:g}")
    console.print(table)


@app.command()
def compare(
    task: TaskName,
    preset: Preset = None,
    data: Data = None,
    model: ModelOption = None,
    alpha: Alpha = None,
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    arms: Annotated[
        str | None, typer.Option(help="Arms to train, by commas; all if absent.")
    ] = None,
    steps: Steps = None,
    settings: Settings = None,
    workers: Workers = None,
    output: Output = None,
) -> None:
    """Train the baseline, its equal-compute and two-pass controls, and R-Drop; print the result.

    Finished runs are kept: repeating the command trains only what is missing.
    """
    with usage_errors():
        require_one_process("compare")
        chosen = chosen_task(task, preset, data, model, alpha, steps, settings)
        known = build_arms(chosen)
        names = list(known) if arms is None else [name.strip() for name in arms.split(",")]
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"arms must be among {', '.join(known)}; got {', '.join(unknown)}")
        folder = output or Path("runs") / chosen.name
        all_seeds = range(first_seed, first_seed + seeds)
        _run(COMPARISON, chosen, [known[name] for name in names], all_seeds, workers, folder)


@app.command()
def sweep(
    study: Annotated[str, typer.Argument(help=f"{', '.join(STUDIES)}.", metavar="STUDY")],
    task: Annotated[str, typer.Option(help="A task or a preset: see `regdrop tasks`.")],
    preset: Preset = None,
    data: Data = None,
    model: ModelOption = None,
    alpha: Alpha = None,
    grid: Annotated[
        str | None, typer.Option(help="Values of what is varied, by commas: 0,1,3.")
    ] = None,
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    steps: Steps = None,
    settings: Settings = None,
    workers: Workers = None,
    output: Output = None,
) -> None:
    """Run one of the paper's studies, or that of cost, over seeds; draw what it asks.

    Finished runs are kept: repeating the command, also with a longer grid, trains only what is
    missing.
    """
    with usage_errors():
        require_one_process("sweep")
        chosen = chosen_task(task, preset, data, model, alpha, steps, settings)
        arms = study_arms(study, chosen, _numbers(grid))
        console.print(f"[bold]{study}[/bold]: {STUDIES[study].question}")
        folder = output or Path("runs") / f"{chosen.name}-{study}"
        _run(study, chosen, arms, range(first_seed, first_seed + seeds), workers, folder)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison or a study.")],
) -> None:
    """Draw the tables and the plots of a comparison or a study again, from its records."""
    with usage_errors(FileNotFoundError):
        _show(folder)


def _run(
    study: str,
    task: Task,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    workers: int | None,
    folder: Path,
) -> None:
    workers, threads = workers_and_threads(workers)
    check_study(folder, study)
    console.print(
        f"[bold]{task.name}[/bold]: {task.description}; {len(arms)} arms, {len(seeds)} seeds, "
        f"results in {folder}"
    )
    with interruptible(), LiveDisplay(arms, seeds, console) as display:
        run_arms(
            task,
            arms,
            seeds=seeds,
            folder=folder,
            workers=workers,
            threads=threads,
            display=display,
        )
    note_command(folder, study, command_line())
    _show(folder)


def _show(folder: Path) -> None:
    target = write_report(folder)
    print_table(load_records(folder), console)
    console.print(f"Report and plots: {target}")


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--grid must be numbers by commas, got {text!r}") from None
