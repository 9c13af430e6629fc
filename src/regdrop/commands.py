"""The commands, one function each."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from regdrop.config import RDropConfig
from regdrop.conventions import CONVENTIONS
from regdrop.conventions import convert_alpha as convert
from regdrop.diagnostics import dropout_report
from regdrop.experiments import build_arms, write_report
from regdrop.experiments import compare as run_comparison
from regdrop.experiments.alone import run_alone
from regdrop.experiments.arms import Arm
from regdrop.experiments.display import LiveDisplay, print_figures, print_table
from regdrop.experiments.evaluate import evaluate as run_evaluation
from regdrop.experiments.evaluate import load_run
from regdrop.experiments.processes import is_main_process, require_one_process
from regdrop.experiments.progress import quiet_libraries
from regdrop.experiments.record import RunRecord, load_records
from regdrop.experiments.run import MODEL_FOLDER, RunPaths
from regdrop.integrations.transformers.loading import load_model
from regdrop.passes import find_dropout
from regdrop.tasks import PRESETS, Task
from regdrop.tasks.generate import generate_lines
from regdrop.tasks.iwslt import prepare_iwslt
from regdrop.tasks.options import change_task, find_task, parse_value

app = typer.Typer(
    help="Train with R-Drop (Regularized Dropout), compare it with training without it, and "
    "see whether it acts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Of several processes of one run the main one alone speaks.
console = Console(quiet=not is_main_process())

TaskName = Annotated[
    str, typer.Argument(help="A task or one of its presets: see `regdrop tasks`.", metavar="TASK")
]
Preset = Annotated[str | None, typer.Option(help="A preset of the task; its first if absent.")]
Data = Annotated[
    str | None, typer.Option("--data", "--dataset", help="A folder of data, or a hub id.")
]
ModelOption = Annotated[str | None, typer.Option(help="A checkpoint: folder or hub id.")]
Alpha = Annotated[float | None, typer.Option(help="Weight of the KL, instead of the preset's.")]
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
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run of `regdrop train`.")]


@app.command()
def tasks() -> None:
    """List the tasks and their presets."""
    table = Table("task", "preset", "what", "steps", "alpha")
    for name, task in PRESETS.items():
        steps, alpha = task.training.max_steps, task.rdrop.alpha
        table.add_row(task.family, name, task.description, f"{steps:,}", f"{alpha:g}")
    console.print(table)


@app.command()
def train(
    task: TaskName,
    preset: Preset = None,
    data: Data = None,
    model: ModelOption = None,
    alpha: Alpha = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and masks.")] = 0,
    steps: Steps = None,
    settings: Settings = None,
    arm: Annotated[str, typer.Option(help="Way of training: see `regdrop compare`.")] = "rdrop",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the run; runs/PRESET-ARM-seedN if absent."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in the folder.")
    ] = False,
) -> None:
    """Train once; keep the model with its tokenizer, and the record of the run.

    torchrun can start it in several processes, which share each batch.
    """
    with _usage_errors():
        chosen = change_task(
            find_task(task, preset),
            data=data,
            model=model,
            alpha=alpha,
            steps=steps,
            settings=settings or (),
        )
        known = build_arms(chosen)
        if arm not in known:
            raise ValueError(f"arm must be one of {', '.join(known)}; got {arm!r}")
        folder = output or Path("runs") / f"{chosen.name}-{arm}-seed{seed}"
        paths = RunPaths.alone(folder)
        is_finished = paths.record.exists()
        # The other processes may come here after the main one has begun.
        if paths.work.exists() and not is_finished and not resume and is_main_process():
            raise ValueError(
                f"{folder} holds an interrupted run: go on with --resume, or choose "
                "another --output"
            )
        console.print(f"[bold]{chosen.name}[/bold]: {chosen.description}; {known[arm].description}")
        record = _train_shown(chosen, known[arm], seed, folder)
    print_figures(record, console)
    console.print(f"{'Finished before' if is_finished else 'Model and record'}: {folder}")


@app.command()
def evaluate(
    run: RunFolder,
    split: Annotated[
        str, typer.Option(help="train, validation, test, or another test split of the task.")
    ] = "test",
    data: Data = None,
    settings: Settings = None,
) -> None:
    """Evaluate the model of a run on a split, with 95 % intervals over its examples."""
    with _usage_errors():
        require_one_process("evaluate")
        result = run_evaluation(run, split, data=data, settings=settings or ())
    print_figures(result, console)
    console.print(f"Kept in {result.path}")


@app.command()
def generate(
    run: RunFolder,
    source: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Lines; standard input if absent."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File; standard output if absent."),
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Number of beams; the run's own if absent.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Lines at a time.")] = 32,
) -> None:
    """Generate a line of text for each line with the model of a run, such as its translation."""
    with _usage_errors(OSError), ExitStack() as files:
        require_one_process("generate")
        load_run(run)
        if output is not None and output.exists():
            raise ValueError(f"--output {output} exists; choose another file, or remove it")
        lines: TextIO = (
            sys.stdin if source is None else files.enter_context(source.open(encoding="utf-8"))
        )
        target = (
            sys.stdout
            if output is None
            else files.enter_context(output.open("w", encoding="utf-8"))
        )
        quiet_libraries()
        for text in generate_lines(
            run / MODEL_FOLDER, lines, batch_size=batch_size, num_beams=num_beams
        ):
            print(text, file=target, flush=output is None)


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(metavar="SET", help="iwslt14 (and IWSLT17's pairs).")],
    archive: Annotated[Path, typer.Argument(help="The official archive, as downloaded.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Turn a downloaded archive into a folder of data, with the paper's cleaning and splits."""
    with _usage_errors():
        require_one_process("prepare")
        if name != "iwslt14":
            raise ValueError(f"SET must be iwslt14, got {name!r}")
        sizes = prepare_iwslt(archive, output)
    counts = ", ".join(f"{split} {size:,}" for split, size in sizes.items())
    console.print(f"{counts} pairs in {output}")


@app.command()
def compare(
    task: TaskName,
    preset: Preset = None,
    data: Data = None,
    model: ModelOption = None,
    alpha: Alpha = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    arms: Annotated[
        str | None, typer.Option(help="Arms to train, by commas; all if absent.")
    ] = None,
    steps: Steps = None,
    settings: Settings = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; one a core, or one on a GPU.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the results; runs/PRESET if absent."),
    ] = None,
) -> None:
    """Train the baseline, its equal-compute and two-pass controls, and R-Drop; print the result.

    Finished runs are kept: repeating the command trains only what is missing.
    """
    with _usage_errors():
        require_one_process("compare")
        chosen = change_task(
            find_task(task, preset),
            data=data,
            model=model,
            alpha=alpha,
            steps=steps,
            settings=settings or (),
        )
        known = build_arms(chosen)
        names = list(known) if arms is None else [name.strip() for name in arms.split(",")]
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"arms must be among {', '.join(known)}; got {', '.join(unknown)}")
        all_seeds = list(range(first_seed, first_seed + seeds))
        _compare(chosen, [known[name] for name in names], all_seeds, workers, output)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison.")],
) -> None:
    """Draw the table and the plots of a comparison from its records."""
    with _usage_errors(FileNotFoundError):
        target = write_report(folder)
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
    with _usage_errors(TypeError, OSError):
        config = _parse_rdrop(options)
        loaded = load_model(model).train()
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
    with _usage_errors():
        alpha = convert(
            value, convention, batch_size=batch_size, tokens=tokens, num_classes=num_classes
        )
    console.print(f"{CONVENTIONS[convention].loss}", style="dim", highlight=False)
    console.print(f"alpha = {alpha:g}")


def _compare(
    task: Task, arms: list[Arm], seeds: list[int], workers: int | None, output: Path | None
) -> None:
    folder = Path("runs") / task.name if output is None else output
    workers, threads = _workers(workers)
    console.print(
        f"[bold]{task.name}[/bold]: {task.description}; {len(arms)} arms, {len(seeds)} seeds, "
        f"results in {folder}"
    )
    with _interruptible(), LiveDisplay(arms, seeds, console) as display:
        run_comparison(
            task,
            seeds=seeds,
            folder=folder,
            workers=workers,
            threads=threads,
            arms=[arm.name for arm in arms],
            display=display,
        )
    target = write_report(folder)
    print_table(load_records(folder), console)
    console.print(f"Report and plots: {target}")


def _train_shown(task: Task, arm: Arm, seed: int, folder: Path) -> RunRecord:
    with _interruptible(), LiveDisplay([arm], [seed], console) as display:
        return run_alone(task, arm, seed, folder, display=display)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.print("Interrupted; the same command (train: with --resume) goes on from here.")
        raise typer.Exit(130) from None


@contextmanager
def _usage_errors(*others: type[Exception]) -> Iterator[None]:
    """Turn the errors of bad input into messages without a traceback."""
    expected: tuple[type[Exception], ...] = (ValueError, *others)
    try:
        yield
    except expected as error:
        if not is_main_process():  # the main process says it
            raise typer.Exit(2) from error
        raise typer.BadParameter(str(error)) from error


def _workers(workers: int | None) -> tuple[int, int | None]:
    """Return the runs at a time and the threads of each: all cores, or one run on a GPU."""
    import torch

    if torch.cuda.is_available():
        return workers or 1, None
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    workers = workers or cores
    return workers, max(1, cores // workers)


def _parse_rdrop(text: str) -> RDropConfig:
    """Return the options of "name=value,..." with JSON values."""
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"--rdrop must be name=value,..., got {part!r}")
        options[name.strip()] = parse_value(value)
    return RDropConfig.from_dict(options)
