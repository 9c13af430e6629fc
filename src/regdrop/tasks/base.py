"""What every task is made of: settings as typed Python, and data, model and metrics from them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from torch import nn
from torch.utils.data import Dataset

from regdrop.config import RDropConfig


@dataclass(frozen=True)
class TrainingSettings:
    """Optimisation of a task without R-Drop, as `transformers.TrainingArguments` names it.

    Attributes:
        max_steps: Optimiser steps.
        batch_size: Items a step, before they are stacked.
        learning_rate: Peak learning rate.
        eval_steps: Steps between evaluations on the validation split (and checkpoints).
        logging_steps: Steps between logs, and between measurements of the divergence.
        lr_scheduler_type: Name of the schedule.
        warmup_ratio: Part of the steps over which the learning rate rises.
        weight_decay: Weight decay of the optimiser.
        max_grad_norm: Gradient clipping; 0 for none.
        label_smoothing: Smoothing of the likelihood's target.
        optim: Name of the optimiser.
        optim_args: Its options, "name=value,...".
        gradient_accumulation_steps: Micro-batches a step.
        mixed_precision: "bf16" or "fp16" where a GPU is used, else float32.
    """

    max_steps: int
    batch_size: int
    learning_rate: float
    eval_steps: int
    logging_steps: int
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    gradient_accumulation_steps: int = 1
    mixed_precision: str | None = None

    def stretched(self, factor: int) -> "TrainingSettings":
        """Return the same settings with `factor` times the steps and the schedule stretched."""
        return replace(self, max_steps=self.max_steps * factor)


@dataclass(frozen=True)
class Metric:
    """How one figure of a task is read.

    Attributes:
        title: What tables and plots call it.
        greater_is_better: Its direction.
        percent: Whether it is shown times 100.
    """

    title: str
    greater_is_better: bool
    percent: bool = False


@dataclass
class PreparedTask:
    """Data, model and metrics of a task, ready for the trainer.

    Attributes:
        train: Training split.
        validation: Split on which checkpoints and settings are selected.
        test: Split that is evaluated once, with the selected checkpoint.
        build_model: Returns a new model; draws its weights from torch's random state.
        compute_metrics: From `transformers.EvalPrediction` to the task's figures.
        data_collator: Makes a batch of items; None for the Trainer's own.
        arguments: Further `transformers.TrainingArguments`.
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    build_model: Callable[[], nn.Module]
    compute_metrics: Callable[[Any], dict[str, float]]
    data_collator: Callable[[Any], Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A task of the command line: a frozen dataclass whose fields are its resolved settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Name on the command line."""

    @property
    def description(self) -> str:
        """One line of what is trained on what."""

    @property
    def training(self) -> TrainingSettings:
        """Optimisation without R-Drop."""

    @property
    def rdrop(self) -> RDropConfig:
        """R-Drop's options, chosen on the validation split."""

    @property
    def metrics(self) -> dict[str, Metric]:
        """The figures, by the names that `compute_metrics` gives them."""

    @property
    def selection_metric(self) -> str:
        """The figure on the validation split by which the checkpoint is selected."""

    def prepare(self) -> PreparedTask:
        """Load the data and return everything that a trainer needs."""
