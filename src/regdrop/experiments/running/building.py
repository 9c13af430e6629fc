"""The Trainer of a run, built from a task and an arm, and what they must have for it."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

from regdrop.experiments.arms import Arm
from regdrop.experiments.recording.processes import num_processes
from regdrop.integrations.transformers import RDropTrainer
from regdrop.passes import find_dropout
from regdrop.tasks import PreparedTask, Task
from regdrop.tasks.common.full_precision import TaskTrainer


def build_trainer(
    task: Task,
    arm: Arm,
    seed: int,
    folder: Path,
    prepared: PreparedTask,
    model: Any,
    *,
    train: Any = None,
    validation: Any = None,
) -> RDropTrainer:
    """Return the trainer of a run; without data it only predicts."""
    make = prepared.trainer or TaskTrainer

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return task.compute_metrics(prepared.example_statistics(prediction))

    trainer: RDropTrainer = make(
        model=model,
        args=training_arguments(task, arm, seed, folder, prepared, with_training=train is not None),
        rdrop=arm.rdrop,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=prepared.data_collator,
        processing_class=prepared.processing_class,
        compute_metrics=compute_metrics,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(
    task: Task,
    arm: Arm,
    seed: int,
    folder: Path,
    prepared: PreparedTask,
    *,
    with_training: bool = True,
) -> TrainingArguments:
    """Return the Trainer's arguments of one run."""
    settings = arm.training
    on_gpu = torch.cuda.is_available()
    make = prepared.arguments or TrainingArguments
    batch_size = settings.batch_size // (settings.gradient_accumulation_steps * num_processes())
    selection: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": settings.eval_steps,
        "save_strategy": "steps",
        "save_steps": settings.eval_steps,
        # One more than is needed, for the case that the newest is damaged.
        "save_total_limit": settings.average_checkpoints + 1,
    }
    if settings.average_checkpoints == 1:  # else the best would take the place of a last one
        selection |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": task.selection_metric,
            "greater_is_better": is_greater_better(task),
        }
    options = {
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": prepared.eval_batch_factor * batch_size,
        **prepared.options,
        **({**selection, **prepared.training_options} if with_training else {}),
    }
    arguments: TrainingArguments = make(
        output_dir=str(folder),
        seed=seed,
        max_steps=settings.max_steps,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=math.ceil(settings.warmup_ratio * settings.max_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        label_smoothing_factor=settings.label_smoothing,
        optim=settings.optim,
        optim_args=settings.optim_args,
        adam_beta2=settings.adam_beta2,
        bf16=with_training and settings.mixed_precision == "bf16",
        fp16=with_training and on_gpu and settings.mixed_precision == "fp16",
        use_cpu=not on_gpu,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # `HistoryCallback` ends such a run
        disable_tqdm=True,
        report_to=[],
        **options,
    )
    return arguments


def check_batch_size(arm: Arm) -> None:
    """Refuse a batch that cannot be shared among micro-batches and processes."""
    settings, processes = arm.training, num_processes()
    if settings.batch_size % (settings.gradient_accumulation_steps * processes):
        raise ValueError(
            f"training.batch_size must be a multiple of gradient_accumulation_steps times the "
            f"number of processes, got {settings.batch_size}, "
            f"{settings.gradient_accumulation_steps} and {processes}"
        )


def check_dropout(model: Any, arm: Arm) -> None:
    """Refuse a model without dropout for several passes, which could not differ."""
    rates = arm.rdrop.dropout_rates
    is_noisy = arm.rdrop.method == "r3f" and arm.rdrop.noise > 0
    wanted = arm.rdrop.num_passes > 1 and not (rates is not None and any(rates)) and not is_noisy
    if wanted and not any(source.active for source in find_dropout(model.train())):
        raise ValueError(
            f"model {type(model).__name__} has no dropout above 0, so several passes cannot "
            "differ; set dropout above 0"
        )


def is_greater_better(task: Task) -> bool:
    """Return whether more of the metric that selects checkpoints is better."""
    return task.metrics[task.selection_metric].greater_is_better
