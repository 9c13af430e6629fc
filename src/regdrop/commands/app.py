"""The application, its console, and what all commands share."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import typer
from rich.console import Console
from rich.text import Text

from regdrop.experiments.recording.processes import is_main_process, num_processes
from regdrop.out_of_memory import is_out_of_memory

app = typer.Typer(
    help="Train with R-Drop (Regularized Dropout), compare it with training without it, and "
    "see whether it acts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Of several processes of one run the main one alone speaks. Square brackets are text: a user's
# paths and names may hold them.
console = Console(quiet=not is_main_process(), markup=False)


def announce(name: str, text: str) -> None:
    """Print what begins, its name in bold."""
    console.print(Text.assemble((name, "bold"), f": {text}"))


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn Ctrl-C, and the signal by which others end a process, into a message how to go on."""
    before = signal.getsignal(signal.SIGTERM)
    if num_processes() == 1:  # torchrun's are ended by it, at whatever they wait for
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        console.print("Interrupted; the same command (train: with --resume) goes on from here.")
        number = next((one for one in error.args if isinstance(one, int)), signal.SIGINT)
        raise typer.Exit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


@contextmanager
def usage_errors(*others: type[Exception]) -> Iterator[None]:
    """Turn errors of bad input, the file system and memory into messages without a traceback."""
    expected: tuple[type[Exception], ...] = (ValueError, OSError, *others)
    try:
        yield
    except expected as error:
        if not is_main_process():  # the main process says it
            raise typer.Exit(2) from error
        raise typer.BadParameter(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if is_main_process():
            said = f" ({error})" if str(error) else ""
            typer.echo(
                f"Out of memory{said}: a smaller training.batch_size takes less, and so do fewer "
                "rdrop.num_passes; training.gradient_accumulation_steps keeps the batch as it is.",
                err=True,
            )
        raise typer.Exit(1) from error


def command_line() -> str:
    """Return the command as it was typed."""
    name = Path(sys.argv[0]).stem
    return shlex.join(["regdrop" if name == "__main__" else name, *sys.argv[1:]])


def workers_and_threads(workers: int | None, runs: int | None = None) -> tuple[int, int | None]:
    """Return the runs at a time and the threads of each: all cores, or one run on a GPU.

    A run has at most the threads that torch has here, which `OMP_NUM_THREADS` sets.

    Args:
        workers: Runs at a time; None for as many as there are cores.
        runs: Number of runs, if there are not more than so many.
    """
    if torch.cuda.is_available():
        return workers or 1, None
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    workers = workers or min(cores, runs or cores)
    return workers, max(1, min(cores // workers, torch.get_num_threads()))
