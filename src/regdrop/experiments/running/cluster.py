"""Runs on the workers of a Dask cluster, which share a folder with this machine."""

import os
import queue
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from regdrop.experiments.running.engine import Engine, read_all
from regdrop.experiments.running.progress import Update, quiet_libraries

_ADDRESS = re.compile(r"dask://(?P<host>\[[\da-fA-F:]+\]|[^\s/:\[\]]+):(?P<port>\d+)/?")


class RunCancelledError(RuntimeError):
    """A run was stopped because nobody waits for it any more."""


class _Place(NamedTuple):
    """What a worker has: threads for tasks, version, and which of some paths it sees."""

    threads: int
    version: str
    missing: list[str]


def parse_address(executor: str) -> str:
    """Return the address of a Dask scheduler from "dask://HOST:PORT".

    Raises:
        ValueError: If it is none.
    """
    match = _ADDRESS.fullmatch(executor)
    if match is None or int(match["port"]) >= 2**16:
        raise ValueError(
            f"--executor must be dask://HOST:PORT, the address of a Dask scheduler, got "
            f"{executor!r}; leave it out to train on this machine alone"
        )
    return f"tcp://{match['host']}:{match['port']}"


@contextmanager
def open_cluster(executor: str, folder: Path, *, connect_seconds: float = 10) -> Iterator[Engine]:
    """Open the engine of a Dask cluster.

    A run whose worker dies is given to another worker, where it goes on from its last checkpoint.
    A run that nobody waits for any more stops when it next tells of its progress.

    Args:
        executor: "dask://HOST:PORT".
        folder: Folder of the study; all workers must see it under the same name.
        connect_seconds: How long the scheduler is waited for.

    Raises:
        ValueError: For another address, or a cluster that cannot be used.
    """
    address = parse_address(executor)
    if find_spec("distributed") is None:
        raise ValueError(
            f"--executor {executor} needs dask.distributed, which is not installed: "
            "pip install 'regdrop[cluster]'"
        )
    from distributed import Client

    try:
        client = Client(address, timeout=connect_seconds, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise ValueError(
            f"--executor {executor}: no Dask scheduler answers there ({error}); start one by "
            "`dask scheduler`"
        ) from error
    with client:
        _check_workers(client, executor, folder)
        updates: queue.Queue[Update] = queue.Queue()
        topic = f"regdrop-{uuid.uuid4().hex}"
        client.subscribe_topic(topic, lambda event: updates.put(_as_update(event)))
        # Not by their content: a run that failed before is begun again.
        pool = client.get_executor(pure=False)
        yield Engine(
            pool,
            enter=partial(_enter, os.getcwd()),
            report=partial(_report, topic),
            read_updates=lambda: read_all(updates),
            stop=lambda: pool.shutdown(wait=False),
        )


def _check_workers(client: Any, executor: str, folder: Path) -> None:
    """Check that there are workers, that each does one run at a time, and that they see the folder.

    Raises:
        ValueError: If not, with the workers for which it does not hold.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f"shared-{uuid.uuid4().hex}"
    marker.touch()
    try:
        paths = [str(marker.resolve()), os.getcwd()]
        places: dict[str, _Place] = client.run(_look, paths)
    finally:
        marker.unlink()
        for path in created:
            path.rmdir()
    if not places:
        raise ValueError(
            f"--executor {executor}: the cluster has no workers; start some by "
            f"`dask worker {parse_address(executor)} --nthreads 1`"
        )
    own = version("regdrop")
    for problem, workers in (
        (
            "must do one run at a time: start them with --nthreads 1, as many as runs at a time",
            [worker for worker, place in places.items() if place.threads != 1],
        ),
        (
            f"must have regdrop {own}, as this machine has",
            [worker for worker, place in places.items() if place.version != own],
        ),
        (
            f"must see the folders {folder.resolve()} and {os.getcwd()} under the same names: "
            "work in a folder that all machines share",
            [worker for worker, place in places.items() if place.missing],
        ),
    ):
        if workers:
            raise ValueError(f"--executor {executor}: workers {', '.join(workers)} {problem}")


def _look(paths: list[str], dask_worker: Any = None) -> _Place:
    try:
        found = version("regdrop")
    except ModuleNotFoundError:
        found = "none"
    return _Place(
        dask_worker.state.nthreads, found, [path for path in paths if not os.path.exists(path)]
    )


def _as_update(event: tuple[float, Any]) -> Update:
    _, (arm, seed, step, metrics) = event
    return Update(arm, seed, step, metrics)


def _enter(directory: str) -> None:
    os.chdir(directory)  # data may be named relative to where the command was given
    quiet_libraries()


def _report(topic: str, update: Update) -> None:
    from distributed import get_worker

    worker = get_worker()
    task = worker.state.tasks.get(worker.get_current_task())
    if task is None or task.state != "executing":
        raise RunCancelledError(f"{update.arm} seed {update.seed}: nobody waits for this run")
    worker.log_event(topic, list(update))
