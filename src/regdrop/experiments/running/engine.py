"""What computes runs: the interface of processes of this machine and of a cluster."""

import queue
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

from regdrop.experiments.running.progress import Update


class WorkerLostError(RuntimeError):
    """The process of a run ended before the run did."""


class Engine(NamedTuple):
    """What computes runs.

    Attributes:
        pool: Takes the runs.
        enter: Called where a run is, before it; it can be pickled, as `report` can.
        report: Called where a run is, with its progress.
        read_updates: Returns the progress that has come since the last call.
        stop: Ends what runs, once the command is interrupted.
    """

    pool: Executor
    enter: Callable[[], None]
    report: Callable[[Update], None]
    read_updates: Callable[[], list[Update]]
    stop: Callable[[], None]


def read_all(updates: Any) -> list[Update]:
    """Return what a queue holds."""
    found = []
    while True:
        try:
            found.append(updates.get_nowait())
        except queue.Empty:
            return found
