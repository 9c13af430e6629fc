"""Commands of many runs: the five arms, the studies, and their reports."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from regdrop.commands.app import (
    announce,
    app,
    command_line,
    console,
    interruptible,
    usage_errors,
    workers_and_threads,
)
from regdrop.commands.display import FinishedRuns, LiveDisplay, print_table, print_tuned
from regdrop.commands.options import (
    Alpha,
    Data,
    ExecutorAddress,
    FirstSeed,
    ModelOption,
    Preset,
    Seeds,
    Settings,
    Steps,
    TaskName,
    Workers,
    chosen_task,
    seed_range,
)
from regdrop.experiments import load_records, run_arms, write_report
from regdrop.experiments.arms import Arm, choose_arms, compared_arms
from regdrop.experiments.recording.manifest import (
    COMPARISON,
    TUNING,
    check_study,
    forget_command,
    note_command,
)
from regdrop.experiments.recording.ownership import remove_empty
from regdrop.experiments.recording.processes import require_one_process
from regdrop.experiments.recording.record import merge_records
from regdrop.experiments.reporting.verdict import verdict
from regdrop.experiments.running.cluster import parse_address
from regdrop.experiments.running.leftovers import clean_up, holds_runs
from regdrop.experiments.studies.definitions import STUDIES, study_arms
from regdrop.experiments.studies.tuning import (
    STORAGE_NAME,
    apply_tuned,
    parse_variation,
    save_tuned,
)
from regdrop.experiments.studies.tuning import tune as run_tuning
from regdrop.tasks import PRESETS, Task

ArmNames = Annotated[str | None, typer.Option(help="Arms to train, by commas; the five if absent.")]
StudyArmNames = Annotated[
    str | None, typer.Option("--arms", help="Arms of the study to train, by commas; all if absent.")
]
Grid = Annotated[str | None, typer.Option(help="Values of what the study varies: 0,1,3.")]
Tuned = Annotated[
    Path | None,
    typer.Option(help="Settings of the arms that `regdrop tune` chose: its tuned.json."),
]
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
        shown = alpha if alpha == "auto" else f"{alpha:g}"
        table.add_row(task.family, name, task.description, f"{steps:,}", shown)
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
    arms: ArmNames = None,
    steps: Steps = None,
    settings: Settings = None,
    workers: Workers = None,
    executor: ExecutorAddress = None,
    tuned: Tuned = None,
    output: Output = None,
) -> None:
    """Train the baseline, its equal-compute and two-pass controls, and R-Drop; print the result.

    Finished runs are kept: repeating the command trains only what is missing.
    """
    with usage_errors():
        require_one_process("compare")
        chosen = chosen_task(task, preset, data, model, alpha, steps, settings)
        trained = _tuned(compared_arms(chosen, _names(arms)), COMPARISON, tuned)
        folder = output or Path("runs") / chosen.name
        chosen_seeds = seed_range(first_seed, seeds)
        machine = _machine(workers, executor, len(trained) * seeds)
        _run(COMPARISON, chosen, trained, chosen_seeds, machine, folder)


@app.command()
def sweep(
    study: Annotated[str, typer.Argument(help=f"{', '.join(STUDIES)}.", metavar="STUDY")],
    task: Annotated[str, typer.Option(help="A task or a preset: see `regdrop tasks`.")],
    preset: Preset = None,
    data: Data = None,
    model: ModelOption = None,
    alpha: Alpha = None,
    grid: Grid = None,
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    arms: StudyArmNames = None,
    steps: Steps = None,
    settings: Settings = None,
    workers: Workers = None,
    executor: ExecutorAddress = None,
    tuned: Tuned = None,
    output: Output = None,
) -> None:
    """Run one of the paper's studies, or that of cost, over seeds; draw what it asks.

    Finished runs are kept: repeating the command, also with a longer grid or more arms, trains only
    what is missing.
    """
    with usage_errors():
        require_one_process("sweep")
        chosen = chosen_task(task, preset, data, model, alpha, steps, settings)
        trained = _tuned(_arms_of_study(study, chosen, grid, arms), study, tuned)
        announce(study, STUDIES[study].question)
        folder = output or Path("runs") / f"{chosen.name}-{study}"
        chosen_seeds = seed_range(first_seed, seeds)
        machine = _machine(workers, executor, len(trained) * seeds)
        _run(study, chosen, trained, chosen_seeds, machine, folder)


@app.command()
def tune(
    task: TaskName,
    vary: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=...",
            help="What is chosen: rdrop.alpha=1,2,5 tries values, "
            "training.learning_rate=1e-4:1e-2:log searches a range. Repeat it for several.",
        ),
    ],
    preset: Preset = None,
    data: Data = None,
    model: ModelOption = None,
    study: Annotated[str, typer.Option(help="Whose arms: compare, or a study of `sweep`.")] = (
        COMPARISON
    ),
    grid: Grid = None,
    arms: StudyArmNames = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Settings that a search tries for each arm.")
    ] = 20,
    storage: Annotated[
        str | None,
        typer.Option(help="Address of an Optuna storage, to search from several machines."),
    ] = None,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 100,
    steps: Steps = None,
    settings: Settings = None,
    workers: Workers = None,
    executor: ExecutorAddress = None,
    output: Output = None,
) -> None:
    """Choose settings of every arm on the validation split, by other seeds than a comparison's.

    Values are tried all; ranges are searched by Optuna. `compare` and `sweep` take the result by
    --tuned. Finished runs are kept: repeating the command tries only what is missing.
    """
    with usage_errors():
        require_one_process("tune")
        chosen = chosen_task(task, preset, data, model, None, steps, settings)
        if study == COMPARISON:
            if grid is not None:
                raise ValueError(f"--grid needs a study that has one, got --study {COMPARISON}")
            trained = compared_arms(chosen, _names(arms))
        else:
            trained = _arms_of_study(study, chosen, grid, arms)
        variations = [parse_variation(text) for text in vary]
        folder = output or Path("runs") / f"{chosen.name}-tuning"
        check_study(folder, TUNING)
        is_search = any(not variation.values for variation in variations)
        machine = _machine(workers, executor, seeds if is_search else None)
        announce(chosen.name, f"{chosen.description}; results in {folder}")
        with interruptible(), _noted(folder, TUNING), console.status("training"):
            found = run_tuning(
                chosen,
                trained,
                variations,
                seeds=seed_range(first_seed, seeds),
                folder=folder,
                trials=trials,
                storage=storage,
                display=FinishedRuns(console),
                **machine,
            )
            target = save_tuned(folder, study, found)
    print_tuned(chosen, found, console)
    console.print(f"Choice: {target}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison or a study.")],
) -> None:
    """Draw the tables and the plots of a comparison or a study again, from its records.

    What is long in the records of an older version is moved into one compressed file.
    """
    with usage_errors(FileNotFoundError):
        merge_records(folder)
        _show(folder)


def _run(
    study: str,
    task: Task,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    machine: Mapping[str, Any],
    folder: Path,
) -> None:
    check_study(folder, study)
    scope = f"{len(arms)} arms, {len(seeds)} seeds, results in {folder}"
    announce(task.name, f"{task.description}; {scope}")
    with interruptible(), _noted(folder, study), LiveDisplay(arms, seeds, console) as display:
        run_arms(task, arms, seeds=seeds, folder=folder, display=display, **machine)
    _show(folder)


def _machine(workers: int | None, executor: str | None, runs: int | None) -> dict[str, Any]:
    """Return the options that say where runs are computed, and how many at a time."""
    if executor is not None:
        parse_address(executor)
        if workers is not None:
            raise ValueError("--workers is of this machine alone: a cluster has its own")
        return {"executor": executor}
    count, threads = workers_and_threads(workers, runs)
    return {"workers": count, "threads": threads}


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _arms_of_study(study: str, task: Task, grid: str | None, names: str | None) -> list[Arm]:
    known = {arm.name: arm for arm in study_arms(study, task, _numbers(grid))}
    return choose_arms(known, _names(names))


def _tuned(arms: Sequence[Arm], study: str, path: Path | None) -> list[Arm]:
    return list(arms) if path is None else apply_tuned(arms, study, path)


@contextmanager
def _noted(folder: Path, study: str) -> Iterator[None]:
    """Note the command in a folder before its first run, so that it can be gone on with.

    Nothing is left of a command that is refused before a run has got anywhere, and what other
    commands have there is left to them.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    is_new = note_command(folder, study, command_line())
    try:
        yield
    except BaseException:
        clean_up(folder)
        if is_new and not holds_runs(folder):
            forget_command(folder, command_line(), own=[folder / STORAGE_NAME])
        remove_empty(made)
        raise


def _show(folder: Path) -> None:
    target = write_report(folder)
    records = load_records(folder)
    print_table(records, console)
    console.print(f"Report and plots: {target}")
    if sentence := verdict(records):
        console.print(sentence, style="bold", highlight=False)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--grid must be numbers by commas, got {text!r}") from None
