"""One run: a task trained in one way with one seed, by the Trainer, to one record."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from regdrop.experiments.arms import Arm
from regdrop.experiments.record import (
    RunRecord,
    describe_hardware,
    library_versions,
    peak_memory_mib,
    record_path,
    reset_peak_memory,
    resolved_config,
    write_json,
)
from regdrop.integrations.transformers import RDropTrainer
from regdrop.tasks import Task

# Called with the step and the figures of every log and evaluation.
Progress = Callable[[int, dict[str, float]], None]


def run_arm(
    task: Task, arm: Arm, seed: int, folder: Path, *, progress: Progress | None = None
) -> RunRecord:
    """Train one arm of a task with one seed, or return the record if that was done before.

    An interrupted run goes on from its last checkpoint. The checkpoint with the best selection
    metric on the validation split is evaluated once on the test split.

    Args:
        task: The task.
        arm: The way of training.
        seed: Seed of weights, order of the data and dropout masks.
        folder: Folder of the comparison.
        progress: Called with the step and the figures of every log and evaluation.

    Raises:
        ValueError: If the folder holds a record or an interrupted run with other settings.
    """
    path = record_path(folder, arm.name, seed)
    config = resolved_config(task, arm)
    if path.exists():
        record = RunRecord.load(path)
        _check_same_config(path, record.config, config)
        return record

    work = folder / "unfinished" / f"{arm.name}-seed{seed}"
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = _find_checkpoint(work, config)
    set_seed(seed)
    reset_peak_memory()
    prepared = task.prepare()
    set_seed(seed)
    history = HistoryCallback(work / "history.jsonl", progress)
    trainer = RDropTrainer(
        model=prepared.build_model(),
        args=training_arguments(task, arm, seed, work, prepared.arguments),
        rdrop=arm.rdrop,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        data_collator=prepared.data_collator,
        compute_metrics=prepared.compute_metrics,
        callbacks=[history],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    best_step, validation = history.best(task.selection_metric, _is_greater_better(task))
    test = trainer.predict(prepared.test, metric_key_prefix="test").metrics or {}
    record = RunRecord(
        task=task.name,
        arm=arm.name,
        seed=seed,
        config=config,
        steps=trainer.state.global_step,
        seconds=history.seconds,
        peak_memory_mib=peak_memory_mib(),
        best_step=best_step,
        validation={name: validation[f"eval_{name}"] for name in task.metrics},
        test={name: test[f"test_{name}"] for name in task.metrics},
        history=history.entries,
        versions=library_versions(),
        hardware=describe_hardware(),
    )
    record.save(path)
    shutil.rmtree(work)
    with suppress(OSError):  # other runs may be unfinished
        work.parent.rmdir()
    return record


def training_arguments(
    task: Task, arm: Arm, seed: int, folder: Path, further: dict[str, Any]
) -> TrainingArguments:
    """Return the Trainer's arguments of one run."""
    settings = arm.training
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size // settings.gradient_accumulation_steps,
        per_device_eval_batch_size=4 * settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=math.ceil(settings.warmup_ratio * settings.max_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        label_smoothing_factor=settings.label_smoothing,
        optim=settings.optim,
        optim_args=settings.optim_args,
        bf16=on_gpu and settings.mixed_precision == "bf16",
        fp16=on_gpu and settings.mixed_precision == "fp16",
        use_cpu=not on_gpu,
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.eval_steps,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=task.selection_metric,
        greater_is_better=_is_greater_better(task),
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        disable_tqdm=True,
        report_to=[],
        **further,
    )


class HistoryCallback(TrainerCallback):
    """Writes every log and evaluation with the time of training alone, as it happens."""

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        self.path = path
        self.progress = progress
        self.entries: list[dict[str, float]] = []
        self.seconds = 0.0
        self._mark = 0.0

    def best(self, metric: str, greater_is_better: bool) -> tuple[int, dict[str, float]]:
        """Return the step and the figures of the first best evaluation."""
        evaluations = [entry for entry in self.entries if f"eval_{metric}" in entry]
        sign = 1 if greater_is_better else -1
        best = max(evaluations, key=lambda entry: sign * entry[f"eval_{metric}"])
        return int(best["step"]), best

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the entries up to the checkpoint, or begin anew."""
        kept = []
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            entries = [json.loads(line) for line in lines if line.endswith("}")]
            kept = [entry for entry in entries if entry["step"] <= state.global_step]
        self.entries = kept if state.global_step else []
        self.seconds = self.entries[-1]["seconds"] if self.entries else 0.0
        text = "".join(json.dumps(entry) + "\n" for entry in self.entries)
        self.path.write_text(text, encoding="utf-8")
        self._mark = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the time since the last step, or since the evaluation after it."""
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the figures of training; evaluations come by `on_evaluate`."""
        if logs is not None and "loss" in logs:
            self._add(state, logs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the figures of an evaluation, and leave its time out."""
        self._add(state, metrics or {})
        self._mark = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the time of a checkpoint out."""
        self._mark = time.perf_counter()

    def _add(self, state: TrainerState, figures: dict[str, float]) -> None:
        numbers = {
            name: float(value)
            for name, value in figures.items()
            if isinstance(value, (int, float)) and not name.endswith(("per_second", "runtime"))
        }
        entry = {**numbers, "step": state.global_step, "seconds": self.seconds}
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.progress is not None:
            self.progress(state.global_step, numbers)


def _is_greater_better(task: Task) -> bool:
    return task.metrics[task.selection_metric].greater_is_better


def _find_checkpoint(work: Path, config: dict[str, Any]) -> str | None:
    """Return the last checkpoint of an interrupted run with the same settings."""
    path = work / "config.json"
    if not path.exists():
        write_json(path, config)
        return None
    _check_same_config(path, json.loads(path.read_text(encoding="utf-8")), config)
    for folder in work.glob("checkpoint-*"):
        # The Trainer writes its state last: without it the run was stopped while it saved.
        if not _is_json(folder / TRAINER_STATE_NAME):
            shutil.rmtree(folder)
    checkpoint: str | None = get_last_checkpoint(str(work))
    return checkpoint


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def _check_same_config(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found != wanted:
        names = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
        raise ValueError(
            f"{path} was made with other settings ({', '.join(names)}); "
            "choose another output folder, or remove it to train again"
        )
