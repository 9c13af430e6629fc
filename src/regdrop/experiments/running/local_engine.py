"""Runs in processes of this machine, of which one that is killed loses its own run alone."""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NamedTuple

from regdrop.experiments.running.engine import Engine, WorkerLostError, read_all
from regdrop.experiments.running.progress import Update, quiet_libraries

# How long a process may take to end once it is told to.
_STOP_SECONDS = 10.0


@contextmanager
def open_processes(workers: int, threads: int | None) -> Iterator[Engine]:
    """Open the engine of so many processes, of so many threads each; None leaves torch's own."""
    # A fresh interpreter a worker: CUDA and thread pools do not survive a fork.
    context = multiprocessing.get_context("spawn")
    updates: queue.SimpleQueue[Update] = queue.SimpleQueue()

    def start() -> _Worker:
        own: Any = context.Queue()
        own.cancel_join_thread()
        threading.Thread(target=_forward, args=(own, updates), daemon=True).start()
        return _Worker(
            ProcessPoolExecutor(
                1, mp_context=context, initializer=_start_worker, initargs=(own, threads)
            ),
            own,
        )

    with _Workers(workers, start) as pool:
        yield Engine(pool, quiet_libraries, _report, lambda: read_all(updates), pool.terminate)


class _Worker(NamedTuple):
    """A process and its updates.

    They come by a queue of its own: one that is killed while it writes leaves its queue locked.
    """

    pool: ProcessPoolExecutor
    updates: Any


class _Workers(Executor):
    """Processes, of which one that is killed takes its own run with it and no other's.

    Args:
        count: Number of processes.
        start: Starts one.
    """

    def __init__(self, count: int, start: Callable[[], _Worker]) -> None:
        self._start = start
        self._started: list[_Worker] = []
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(self._new_worker())
        self._threads = ThreadPoolExecutor(count, initializer=_leave_interrupts)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Compute a function in the first process that is free."""
        return self._threads.submit(self._run, fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes, what runs before that if it is waited for."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        while not self._free.empty():
            worker = self._free.get()
            worker.pool.shutdown(wait)
            worker.updates.put(None)

    def terminate(self) -> None:
        """End the processes at once, whatever they are at, and no other children of this one."""
        # Before the pools forget them. Python 3.14 alone has a method for this.
        found = [list((worker.pool._processes or {}).values()) for worker in self._started]
        processes = [process for own in found for process in own]
        self.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(_STOP_SECONDS)

    def _new_worker(self) -> _Worker:
        worker = self._start()
        self._started.append(worker)
        return worker

    def _run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        worker = self._free.get()
        try:
            return worker.pool.submit(fn, *args, **kwargs).result()
        except BrokenProcessPool as error:
            worker.pool.shutdown(wait=False)
            worker = self._new_worker()
            raise WorkerLostError("its process was killed; is there enough memory?") from error
        finally:
            self._free.put(worker)


def _leave_interrupts() -> None:
    """Leave Ctrl-C to the main thread, which ends the processes that this one is about to start.

    A terminal sends it to all of them, and one that is still loading answers with a traceback.
    """
    if hasattr(signal, "pthread_sigmask"):  # a process inherits what its thread has blocked
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _forward(own: Any, updates: "queue.SimpleQueue[Update]") -> None:
    """Pass the updates of a process on, until it says that there are no more."""
    while (update := own.get()) is not None:
        updates.put(update)


_updates: Any = None


def _start_worker(updates: Any, threads: int | None) -> None:
    global _updates
    _updates = updates
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _report(update: Update) -> None:
    _updates.put(update)


def _exit_with_parent() -> None:
    """End this process when the command is killed, so that no run goes on unseen."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
