"""Arms over seeds, in parallel, continued where they stopped."""

import multiprocessing
import os
import queue
import shutil
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from regdrop.experiments.arms import Arm
from regdrop.experiments.processes import require_one_process
from regdrop.experiments.progress import Display, Update, quiet_libraries
from regdrop.experiments.record import RunRecord, load_records, resolved_config, settings_digest
from regdrop.experiments.run import UNFINISHED, check_same_config, run_arm
from regdrop.tasks import Task

_POLL_SECONDS = 0.2


def run_arms(
    task: Task,
    arms: Sequence[Arm],
    *,
    seeds: Sequence[int],
    folder: Path,
    workers: int = 1,
    threads: int | None = None,
    display: Display | None = None,
) -> list[RunRecord]:
    """Train several arms of a task over seeds and return their records.

    Finished runs are read, not run again; interrupted ones go on from their last checkpoint.

    Args:
        task: The task.
        arms: Ways of training, of different names.
        seeds: Seeds, the same for every arm, so that differences are paired.
        folder: Where records are kept.
        workers: Runs at a time, each in a process of its own.
        threads: Threads a run; None leaves torch's own number.
        display: Shown the progress.

    Raises:
        ValueError: For arms of one name, no seeds, a folder of other settings, or several
            processes.
        Exception: What the first run that failed raised, once the runs beside it have ended.
    """
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) != len(names):
        raise ValueError(f"arms must have different names, at least one, got {names}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}")
    require_one_process("a comparison")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    _check_records(task, arms, folder)
    # The longest runs first, so that no worker waits for one at the end.
    jobs = sorted(
        ((arm, seed) for seed in seeds for arm in arms),
        key=lambda job: -job[0].training.max_steps * job[0].rdrop.num_passes,
    )
    # Named by its settings, so that what an interrupted comparison learned is never another's.
    learned = folder / UNFINISHED / "learned"
    _run_jobs(task, jobs, folder, learned / settings_digest(task), workers, threads, display)
    if learned.exists() and list(learned.parent.iterdir()) == [learned]:  # nobody else's runs
        shutil.rmtree(learned.parent)
    wanted = {(name, seed) for name in names for seed in seeds}
    return [record for record in load_records(folder) if (record.arm, record.seed) in wanted]


def _check_records(task: Task, arms: Sequence[Arm], folder: Path) -> None:
    """Check that what a folder holds is of this task, and each arm's of the settings it has now."""
    wanted = {arm.name: resolved_config(task, arm) for arm in arms}
    first = next(iter(wanted.values()))
    for path in sorted((folder / "records").glob("*.json")):
        record = RunRecord.load(path)
        if record.arm in wanted:
            check_same_config(path, record.config, wanted[record.arm])
        else:
            check_same_config(path, _without_training(record.config), _without_training(first))


def _without_training(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("training", "rdrop")}


def _run_jobs(
    task: Task,
    jobs: Sequence[tuple[Arm, int]],
    folder: Path,
    learned: Path,
    workers: int,
    threads: int | None,
    display: Display | None,
) -> None:
    # A fresh interpreter a worker: CUDA and thread pools do not survive a fork.
    context = multiprocessing.get_context("spawn")
    news: Any = context.Queue()
    with ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(news, threads),
    ) as pool:
        pending: set[Future[RunRecord]] = {
            pool.submit(_work, task, arm, seed, folder, learned) for arm, seed in jobs
        }
        failure: BaseException | None = None
        try:
            while pending:
                done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                _show(news, display)
                for future in done:
                    error = future.exception()
                    failure = failure or error
                    if error is None and display is not None:
                        display.finish(future.result())
                if failure is not None:
                    # What runs beside it is brought to its end, nothing else is begun.
                    pending = {future for future in pending if not future.cancel()}
        except BaseException:
            # Ctrl-C: what has not begun is not begun, what runs has its checkpoint.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    if failure is not None:
        raise failure


def _show(news: Any, display: Display | None) -> None:
    while True:
        try:
            update = news.get_nowait()
        except queue.Empty:
            return
        if display is not None:
            display.update(update)


_news: Any = None


def _start_worker(news: Any, threads: int | None) -> None:
    global _news
    _news = news
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    quiet_libraries()


def _exit_with_parent() -> None:
    """End this process when the command is killed, so that no run goes on unseen."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: Task, arm: Arm, seed: int, folder: Path, learned: Path) -> RunRecord:
    def progress(step: int, figures: dict[str, float]) -> None:
        _news.put(Update(arm.name, seed, step, figures))

    with warnings.catch_warnings():
        # transformers looks for pinned memory on machines without an accelerator.
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        return run_arm(task, arm, seed, folder, learned=learned, progress=progress)
