"""Several processes of one run, as torchrun starts them: their number, and who goes first."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def num_processes() -> int:
    """Return the number of processes that share a run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process is the one that speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def require_one_process(command: str) -> None:
    """Check that a command was not started once for each of several processes.

    Raises:
        ValueError: If it was.
    """
    if num_processes() > 1:
        raise ValueError(
            f"{command} must be started once, got {num_processes()} processes (WORLD_SIZE); "
            "`regdrop train` is what torchrun can start"
        )


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process go through the block before the others do; all go on together."""
    if num_processes() == 1:
        yield
        return
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():
        yield
    # Otherwise the main one could undo what the others are about to look for, or to make again.
    state.wait_for_everyone()


def leave_process_group() -> None:
    """End the communication of the processes of a run, if there is any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
