"""Commands of single runs: train, and use what was trained."""

import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, TextIO

import typer

from regdrop.commands.app import announce, app, console, interruptible, usage_errors
from regdrop.commands.live_display import LiveDisplay
from regdrop.commands.options import (
    LAST_SEED,
    Alpha,
    Data,
    EvaluationSettings,
    RunFolder,
    TaskName,
    TaskOptions,
    output_option,
    with_option_groups,
)
from regdrop.commands.streams import READ_ENCODING, WRITE_ENCODING, with_encoding
from regdrop.commands.tables import print_metrics
from regdrop.experiments import build_arms
from regdrop.experiments.arms import Arm, optional_arms
from regdrop.experiments.evaluating.evaluate import evaluate as run_evaluation
from regdrop.experiments.evaluating.saved_run import load_run
from regdrop.experiments.recording.ownership import holder
from regdrop.experiments.recording.processes import is_main_process, require_one_process
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.running.progress import quiet_libraries
from regdrop.experiments.running.run import MODEL_FOLDER, RunPaths
from regdrop.experiments.running.single import run_single
from regdrop.tasks import Task
from regdrop.tasks.common.accepted import check_choice
from regdrop.tasks.generate_lines import generate_lines
from regdrop.whole_files import write_whole

# Above this the metrics say more of the words than of the model.
MOST_UNKNOWN_WORDS = 0.03


@app.command()
@with_option_groups
def train(
    task: TaskName,
    options: TaskOptions,
    alpha: Alpha = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LAST_SEED, help="Seed of weights, data order and masks.")
    ] = 0,
    arm: Annotated[str, typer.Option(help="Way of training: see `regdrop compare`.")] = "rdrop",
    output: Annotated[
        Path | None, output_option("Folder of the run; runs/PRESET-ARM-seedN if absent.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in the folder.")
    ] = False,
) -> None:
    """Train once; keep the model with its tokenizer, and the record of the run.

    torchrun can start it in several processes, which share each batch.
    """
    with usage_errors():
        chosen = options.choose(task, alpha)
        known = {**build_arms(chosen), **optional_arms(chosen)}
        check_choice("arm", arm, known)
        folder = output or Path("runs") / f"{chosen.name}-{arm}-seed{seed}"
        paths = RunPaths.alone(folder)
        is_finished = paths.record.exists()
        # The other processes may come here after the main one has begun.
        if is_main_process() and not is_finished:
            _check_free(paths, folder, resume)
        announce(chosen.name, f"{chosen.description}; {known[arm].description}")
        record = _train_shown(chosen, known[arm], seed, folder)
    print_metrics(record, console)
    console.print(f"{'Finished before' if is_finished else 'Model and record'}: {folder}")


@app.command()
def evaluate(
    run: RunFolder,
    split: Annotated[
        str, typer.Option(help="train, validation, test, or another test split of the task.")
    ] = "test",
    data: Data = None,
    settings: EvaluationSettings = None,
) -> None:
    """Evaluate the model of a run on a split, with 95 % intervals over its examples."""
    with usage_errors():
        require_one_process("evaluate")
        result = run_evaluation(run, split, data=data, settings=settings or ())
    print_metrics(result, console)
    if result.unknown_words > MOST_UNKNOWN_WORDS:
        console.print(
            f"{result.unknown_words:.1%} of the words of {data} are unknown to the model: "
            "is it text of the language and the form that it was trained on?",
            style="yellow",
        )
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
    with usage_errors(OSError), ExitStack() as files:
        require_one_process("generate")
        load_run(run)
        if output is not None and output.exists():
            raise ValueError(f"--output {output} exists; choose another file, or remove it")
        lines: TextIO = (
            with_encoding(sys.stdin, READ_ENCODING)
            if source is None
            else files.enter_context(source.open(encoding=READ_ENCODING))
        )
        quiet_libraries()
        texts = generate_lines(
            run / MODEL_FOLDER, lines, batch_size=batch_size, num_beams=num_beams
        )
        try:
            if output is None:
                _print_lines(texts)
            else:
                write_whole(output, partial(_write_lines, texts))
        except UnicodeDecodeError as error:
            raise ValueError(f"{source or 'the input'} must be text in UTF-8: {error}") from error


def _print_lines(texts: Iterable[str]) -> None:
    """Print lines until there are no more, or nobody reads them, as after `| head -1`."""
    output = with_encoding(sys.stdout, WRITE_ENCODING)
    try:
        for text in texts:
            print(text, file=output, flush=True)
    except BrokenPipeError:
        # Python flushes at its end, too; a shell says 141 of what the signal ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None


def _write_lines(texts: Iterable[str], path: Path) -> None:
    with path.open("w", encoding=WRITE_ENCODING) as file:
        file.writelines(f"{text}\n" for text in texts)


def _check_free(paths: RunPaths, folder: Path, resume: bool) -> None:
    """Check that nobody is at work on a run, and that an interrupted one is wanted.

    Raises:
        ValueError: If not.
    """
    if other := holder(paths.lock):
        raise ValueError(f"{folder} is at work in {other}: wait for it, or choose another --output")
    if paths.is_interrupted and not resume:
        raise ValueError(
            f"{folder} holds an interrupted run: go on with --resume, or choose another --output"
        )


def _train_shown(task: Task, arm: Arm, seed: int, folder: Path) -> RunRecord:
    with interruptible(), LiveDisplay([arm], [seed], console) as display:
        return run_single(task, arm, seed, folder, display=display)
