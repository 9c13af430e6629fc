"""One run: a task trained in one way with one seed, by the Trainer, to one record."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from regdrop.experiments.arms import Arm
from regdrop.experiments.recording.details import SIGNIFICANT_DIGITS
from regdrop.experiments.recording.environment import describe_hardware, library_versions
from regdrop.experiments.recording.files import disk_error, read_object, write_json
from regdrop.experiments.recording.history import (
    DivergedError,
    HistoryCallback,
    Progress,
    check_finite,
)
from regdrop.experiments.recording.memory import peak_memory_mib, reset_peak_memory
from regdrop.experiments.recording.ownership import hold, remove_empty
from regdrop.experiments.recording.processes import is_main_process, main_process_first
from regdrop.experiments.recording.record import RunRecord, record_path
from regdrop.experiments.recording.settings import check_same_config, resolved_config
from regdrop.experiments.running.building import (
    build_trainer,
    check_batch_size,
    check_dropout,
    is_greater_better,
)
from regdrop.experiments.running.epochs import EpochCallback
from regdrop.experiments.running.integrity import (
    SealCallback,
    choose_checkpoint,
    list_checkpoints,
    step_of,
)
from regdrop.experiments.running.optimisers import check_optimiser
from regdrop.experiments.running.rising_dropout import RisingDropout
from regdrop.experiments.running.running_loss import RunningLoss
from regdrop.integrations.transformers import RDropTrainer
from regdrop.integrations.transformers.run.checkpoints import average_weights
from regdrop.passes import scale_dropout_odds
from regdrop.tasks import PreparedTask, Task

_logger = logging.getLogger(__name__)

RECORD_NAME = "record.json"
MODEL_FOLDER = "model"
UNFINISHED_FOLDER = "unfinished"
CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class RunPaths:
    """Where a run writes.

    Attributes:
        record: File of its record.
        work: Folder of its checkpoints, removed at its end.
        model: Folder of the selected model; None to keep none.
        learned: Folder of what is learned from data before the model is, where runs share it; None
            for one inside `work`.
    """

    record: Path
    work: Path
    model: Path | None = None
    learned: Path | None = None

    @property
    def lock(self) -> Path:
        """File that is there while a process is at work on the run, and says which."""
        return self.work.with_name(f"{self.work.name}.lock")

    @property
    def is_interrupted(self) -> bool:
        """Whether there is something to go on from."""
        return not self.record.exists() and bool(list_checkpoints(self.work))

    @property
    def has_finished_beside(self) -> bool:
        """Whether its comparison has records, which are of the same settings."""
        return self.model is None and any(self.record.parent.glob("*.json"))

    @classmethod
    def alone(cls, folder: Path) -> "RunPaths":
        """Return the paths of a run with a folder of its own, which keeps its model."""
        return cls(folder / RECORD_NAME, folder / UNFINISHED_FOLDER, folder / MODEL_FOLDER)

    @classmethod
    def compared(cls, folder: Path, arm: str, seed: int, learned: Path | None = None) -> "RunPaths":
        """Return the paths of a run in the folder of a comparison."""
        work = folder / UNFINISHED_FOLDER / f"{arm}-seed{seed}"
        return cls(record_path(folder, arm, seed), work, learned=learned)


def run_arm(
    task: Task,
    arm: Arm,
    seed: int,
    folder: Path,
    *,
    learned: Path | None = None,
    progress: Progress | None = None,
) -> RunRecord:
    """Train one arm of a task with one seed in the folder of a comparison; see `train_run`."""
    paths = RunPaths.compared(folder, arm.name, seed, learned)
    return train_run(task, arm, seed, paths, progress=progress)


def train_run(
    task: Task, arm: Arm, seed: int, paths: RunPaths, *, progress: Progress | None = None
) -> RunRecord:
    """Train one arm of a task with one seed, or return the record if that was done before.

    An interrupted run goes on from its last whole checkpoint. The checkpoint with the best
    selection metric on the validation split, or the mean of the last ones, is evaluated once on the
    test splits. Under torchrun all processes call it; the main one alone writes. What ends without
    a checkpoint leaves nothing behind.

    Args:
        task: The task.
        arm: The way of training.
        seed: Seed of weights, order of the data and dropout masks.
        paths: Where the run writes.
        progress: Called with the step and the metrics of every log and evaluation.

    Raises:
        HeldError: If another process is at work on the run.
        DivergedError: If the training loss or a metric is no finite number.
        ValueError: If there is a record or an interrupted run with other settings, the batch
            cannot be shared among the processes, or the model has no dropout for several passes
            to differ by.
    """
    check_optimiser(arm.training)
    config = resolved_config(task, arm)
    if paths.record.exists() and not paths.work.exists():
        return _load_finished(paths, seed, config)
    with _owned(paths):
        if paths.record.exists():  # stopped after it was written, or written this moment
            record = _load_finished(paths, seed, config)
            if is_main_process():
                shutil.rmtree(paths.work, ignore_errors=True)
            return record
        try:
            return _train(task, arm, seed, paths, config, progress)
        except BaseException as error:
            # The checkpoints of a run that has diverged lead there again.
            is_lost = isinstance(error, DivergedError) or not list_checkpoints(paths.work)
            if is_main_process() and is_lost:
                shutil.rmtree(paths.work, ignore_errors=True)
            if isinstance(error, Exception) and (unwritten := disk_error(error, paths.work)):
                raise unwritten from error
            raise


@contextmanager
def _owned(paths: RunPaths) -> Iterator[None]:
    """Hold a run while the block runs; of several processes that share it the main one does."""
    if not is_main_process():
        yield
        return
    try:
        with hold(paths.lock, f"the run of {paths.record}"):
            yield
    finally:
        if paths.model is None:
            remove_empty([paths.lock.parent])


def _load_finished(paths: RunPaths, seed: int, config: dict[str, Any]) -> RunRecord:
    record = RunRecord.load(paths.record)
    found, wanted = {**record.config, "seed": record.seed}, {**config, "seed": seed}
    check_same_config(paths.record, found, wanted)
    return record


def _train(
    task: Task,
    arm: Arm,
    seed: int,
    paths: RunPaths,
    config: dict[str, Any],
    progress: Progress | None,
) -> RunRecord:
    checkpoint, prepared, model = _prepare(task, arm, seed, paths, config)
    measures_memory = reset_peak_memory()
    train, validation = prepared.splits["train"], prepared.splits["validation"]
    tests = {name: prepared.splits[name] for name in ("test", *prepared.further_tests)}
    history = HistoryCallback(paths.work / "history.jsonl", progress)
    trainer = build_trainer(
        task, arm, seed, paths.work, prepared, model, train=train, validation=validation
    )
    trainer.add_callback(history)
    trainer.add_callback(RunningLoss(trainer, checkpoint))
    trainer.add_callback(SealCallback())  # the last to write in a checkpoint
    trainer.add_callback(EpochCallback(train))
    if arm.dropout_rises:
        trainer.add_callback(RisingDropout(model, arm.dropout_odds))
    if checkpoint is not None and step_of(checkpoint) == arm.training.max_steps:
        _take_up_end(trainer, history, checkpoint)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    best_step, metrics = _select(task, arm, trainer, history, paths.work)
    test, examples = _evaluate_tests(task, trainer, prepared, tests)
    selected = {name: metrics[f"eval_{name}"] for name in task.metrics}
    for split, found in (("validation", selected), ("test", test)):
        check_finite({f"{split} {name}": value for name, value in found.items()}, best_step)
    record = RunRecord(
        task=task.name,
        arm=arm.name,
        seed=seed,
        config=config,
        steps=trainer.state.global_step,
        seconds=history.seconds,
        peak_memory_mib=peak_memory_mib() if measures_memory else None,
        best_step=best_step,
        validation=selected,
        test=test,
        history=history.entries,
        versions=library_versions(),
        hardware=describe_hardware(),
        examples=examples,
        signatures=prepared.signatures,
        metrics={name: asdict(metric) for name, metric in task.metrics.items()},
    )
    if paths.model is not None:
        trainer.save_model(str(paths.model))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        record.save(paths.record)
        shutil.rmtree(paths.work)
    return record


def _prepare(
    task: Task, arm: Arm, seed: int, paths: RunPaths, config: dict[str, Any]
) -> tuple[Path | None, PreparedTask, Any]:
    """Return the checkpoint to go on from, the data, all of it loaded, and a new model."""
    with main_process_first():
        paths.work.mkdir(parents=True, exist_ok=True)
        checkpoint = _find_checkpoint(paths.work, arm, {**config, "seed": seed})
    set_seed(seed)
    check_batch_size(arm)
    try:
        begun = checkpoint is not None or paths.has_finished_beside
        prepared = task.prepare(paths.learned or paths.work / "learned", begun=begun)
        for name in ("train", "validation", "test", *prepared.further_tests):
            prepared.splits[name]
        set_seed(seed)
        model = prepared.build_model()
    except StrictDataclassError as error:
        raise ValueError(
            f"the model's settings cannot be: {' '.join(str(error).split())}"
        ) from error
    check_dropout(model, arm)
    if arm.dropout_odds != 1 and not arm.dropout_rises:
        scale_dropout_odds(model, arm.dropout_odds)
    return checkpoint, prepared, model


def _take_up_end(trainer: RDropTrainer, history: HistoryCallback, checkpoint: Path) -> None:
    """Take up a run that was stopped between its last checkpoint and its record.

    The Trainer would take one more step.
    """
    trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    trainer.state.is_world_process_zero = trainer.is_world_process_zero()
    history.on_train_begin(trainer.args, trainer.state, trainer.control)
    best = trainer.state.best_model_checkpoint
    if best is not None:
        average_weights(trainer.accelerator.unwrap_model(trainer.model), [best])


def _evaluate_tests(
    task: Task, trainer: RDropTrainer, prepared: PreparedTask, splits: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, list[list[float]]]]:
    """Return the metrics of all test splits, and the statistics of their examples by split."""
    # The Trainer groups by length what it evaluates, too, in an order of the seed: the records of
    # all seeds hold the examples in the order of the data.
    trainer.args.train_sampling_strategy = "random"
    metrics, examples = {}, {}
    for name, split in splits.items():
        statistics = prepared.example_statistics(trainer.predict(split))
        prefix = "" if name == "test" else f"{name}_"
        metrics.update(
            {prefix + key: value for key, value in task.compute_metrics(statistics).items()}
        )
        examples[name] = [[float(f"{x:.{SIGNIFICANT_DIGITS}g}") for x in row] for row in statistics]
    return metrics, examples


def _select(
    task: Task, arm: Arm, trainer: RDropTrainer, history: HistoryCallback, work: Path
) -> tuple[int, dict[str, float]]:
    """Return the step and the validation metrics of the selected weights, which are loaded."""
    count = arm.training.average_checkpoints
    if count == 1:
        return history.best(task.selection_metric, is_greater_better(task))
    folders = list_checkpoints(work)[-count:]
    average_weights(trainer.accelerator.unwrap_model(trainer.model), folders)
    return trainer.state.global_step, trainer.evaluate()


def _find_checkpoint(work: Path, arm: Arm, config: dict[str, Any]) -> Path | None:
    """Return the last whole checkpoint of an interrupted run with the same settings."""
    path = work / CONFIG_NAME
    if not list_checkpoints(work):  # stopped before its first: whatever it was, nothing is lost
        if is_main_process():  # what it learned may be of other settings or data
            shutil.rmtree(work)
            work.mkdir()
            write_json(path, config)
        return None
    check_same_config(path, read_object(path, "the settings of an interrupted run"), config)
    if not is_main_process():  # which has looked before
        return next(reversed(list_checkpoints(work)), None)
    checkpoint, wrong = choose_checkpoint(work, _averaged_steps(arm))
    if wrong:
        where = "the start" if checkpoint is None else checkpoint.name
        _logger.warning(
            "a checkpoint was damaged, the run goes on from %s: %s", where, "; ".join(wrong)
        )
    return checkpoint


def _averaged_steps(arm: Arm) -> list[int]:
    """Return the steps whose checkpoints are averaged; none where the best one is taken."""
    settings = arm.training
    if settings.average_checkpoints == 1:
        return []
    saved = [*range(settings.eval_steps, settings.max_steps, settings.eval_steps)]
    return [*saved, settings.max_steps][-settings.average_checkpoints :]
