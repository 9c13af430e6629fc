"""What every task is made of: settings as typed Python, and data, model and metrics from them."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from regdrop.config import RDropConfig
from regdrop.tasks.common.accepted import (
    BelowOne,
    Count,
    NotNegative,
    Part,
    Positive,
    Text,
    check_choice,
    check_fields,
    check_parts,
)


@dataclass(frozen=True)
class TrainingSettings:
    """Optimisation of a task without R-Drop, as `transformers.TrainingArguments` names it.

    Attributes:
        max_steps: Optimiser steps.
        batch_size: Items a step over all processes, before they are stacked.
        learning_rate: Peak learning rate.
        eval_steps: Steps between evaluations on the validation split (and checkpoints).
        logging_steps: Steps between logs, and between measurements of the divergence.
        lr_scheduler_type: Name of the schedule.
        warmup_ratio: Part of the steps over which the learning rate rises.
        weight_decay: Weight decay of the optimiser.
        max_grad_norm: Gradient clipping; 0 for none.
        label_smoothing: Smoothing of the target.
        optim: Name of the optimiser.
        optim_args: Its options, "name=value,...".
        adam_beta2: Decay of Adam's second moment.
        gradient_accumulation_steps: Micro-batches a step.
        mixed_precision: None, "bf16" or, where a GPU is used, "fp16": autocast's type. Without a
            GPU "fp16" is float32.
        average_checkpoints: Checkpoints whose mean weights are the result: the last so many. With 1
            it is the checkpoint that is best on the validation split.
    """

    max_steps: Count
    batch_size: Count
    learning_rate: Positive
    eval_steps: Count
    logging_steps: Count
    lr_scheduler_type: Text = "cosine"
    warmup_ratio: Part = 0.1
    weight_decay: NotNegative = 0.01
    max_grad_norm: NotNegative = 1.0
    label_smoothing: BelowOne = 0.0
    optim: Text = "adamw_torch_fused"
    optim_args: Text | None = None
    adam_beta2: BelowOne = 0.999
    gradient_accumulation_steps: Count = 1
    mixed_precision: Literal["bf16", "fp16"] | None = None
    average_checkpoints: Count = 1

    def __post_init__(self) -> None:
        check_fields(self)
        checkpoints = math.ceil(self.max_steps / self.eval_steps)
        if self.average_checkpoints > checkpoints:
            raise ValueError(
                f"average_checkpoints must be at most {checkpoints}, the checkpoints of "
                f"max_steps={self.max_steps} with eval_steps={self.eval_steps}, "
                f"got {self.average_checkpoints}"
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps must divide batch_size, got "
                f"{self.gradient_accumulation_steps} and {self.batch_size}"
            )

    @property
    def micro_batch_size(self) -> int:
        """Items a micro-batch over all processes."""
        return self.batch_size // self.gradient_accumulation_steps

    def stretched(self, factor: int) -> "TrainingSettings":
        """Return the same settings with `factor` times the steps and the schedule stretched."""
        return replace(self, max_steps=self.max_steps * factor)


@dataclass(frozen=True)
class Metric:
    """How one metric of a task is read.

    Attributes:
        title: What tables and plots call it.
        greater_is_better: Its direction.
        percent: Whether it is shown times 100.
    """

    title: str
    greater_is_better: bool
    percent: bool = False

    @property
    def factor(self) -> int:
        """What a value is multiplied by where it is shown."""
        return 100 if self.percent else 1

    @property
    def decimals(self) -> int:
        """How many decimals of it are shown then."""
        return 2 if self.percent else 3

    def format(self, value: float) -> str:
        """Return a value as tables show it."""
        return f"{value * self.factor:.{self.decimals}f}"


class LazySplits(Mapping[str, Dataset[Any]]):
    """Splits by name, each made when it is first asked for.

    Args:
        makers: From the name of a split to the function that makes it.
        dataset: Folder or hub id, for errors.
    """

    def __init__(
        self, makers: Mapping[str, Callable[[], Dataset[Any]]], dataset: str | None = None
    ) -> None:
        self._makers, self._dataset = dict(makers), dataset
        self._made: dict[str, Dataset[Any]] = {}

    def __getitem__(self, name: str) -> Dataset[Any]:
        if name not in self._made:
            if name not in self._makers:
                whose = "" if self._dataset is None else f"data {self._dataset!r} has no {name!r}: "
                raise ValueError(
                    f"{whose}split must be one of {sorted(self._makers)}, got {name!r}"
                )
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass
class PreparedTask:
    """Data, model and metrics of a task, ready for the trainer.

    Attributes:
        splits: "train"; "validation", on which checkpoints and settings are selected; "test",
            which is evaluated once, with the selected checkpoint; and further test splits.
        build_model: Returns a new model; draws its weights from torch's random state.
        load_model: Returns a model that was saved in a folder.
        example_statistics: From `transformers.EvalPrediction` to an array (examples, statistics)
            from which `Task.compute_metrics` computes the task's metrics.
        further_tests: Names of the splits that are tested beside "test".
        data_collator: Makes a batch of items; None for the Trainer's own.
        processing_class: Tokenizer or image processor, saved with the model.
        trainer: Makes the trainer; None for `RDropTrainer`.
        arguments: Makes its arguments; None for `transformers.TrainingArguments`.
        eval_batch_factor: Items a batch of an evaluation, in micro-batches of training.
        options: Further arguments of the trainer's arguments.
        training_options: Those of training alone.
        signatures: What a metric's own library says of how it is computed, by metric.
    """

    splits: Mapping[str, Dataset[Any]]
    build_model: Callable[[], nn.Module]
    load_model: Callable[[Path], nn.Module]
    example_statistics: Callable[[Any], np.ndarray]
    further_tests: tuple[str, ...] = ()
    data_collator: Callable[[Any], Any] | None = None
    processing_class: Any = None
    trainer: Callable[..., Any] | None = None
    arguments: Callable[..., Any] | None = None
    eval_batch_factor: int = 4
    options: dict[str, Any] = field(default_factory=dict)
    training_options: dict[str, Any] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)


class OldNames:
    """Names that a task had in 0.1, kept for two minor releases."""

    def figures(self: Any, statistics: np.ndarray) -> dict[str, float]:
        """Return what `compute_metrics` returns, with a warning."""
        warnings.warn("figures is now compute_metrics", DeprecationWarning, stacklevel=2)
        metrics: dict[str, float] = self.compute_metrics(statistics)
        return metrics


def check_task(task: "Task") -> None:
    """Check the settings of a task, before any work.

    Raises:
        ValueError: For a field of the wrong type or out of range, by name.
    """
    check_fields(task)
    check_parts(task, [("training", TrainingSettings), ("rdrop", RDropConfig)])
    check_choice("selection_metric", task.selection_metric, task.metrics)


class Task(Protocol):
    """A task of the command line: a frozen dataclass whose fields are its resolved settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    family: ClassVar[str]

    @property
    def name(self) -> str:
        """Name of the preset on the command line."""

    @property
    def description(self) -> str:
        """One line of what is trained on what."""

    @property
    def dataset(self) -> str:
        """Folder or hub id of the data."""

    @property
    def training(self) -> TrainingSettings:
        """Optimisation without R-Drop."""

    @property
    def rdrop(self) -> RDropConfig:
        """R-Drop's options, chosen on the validation split."""

    @property
    def metrics(self) -> dict[str, Metric]:
        """How each metric is read, by the names that `compute_metrics` gives them."""

    @property
    def selection_metric(self) -> str:
        """The metric on the validation split by which the checkpoint is selected."""

    def compute_metrics(self, statistics: np.ndarray) -> dict[str, float]:
        """Return the metrics of some examples from their statistics (examples, statistics)."""

    def prepare(self, folder: Path | None = None, *, begun: bool = False) -> PreparedTask:
        """Load the data and return everything that a trainer needs.

        Args:
            folder: Holds what is learned from data before the model is (a vocabulary): read where
                it is there, else written. None keeps nothing.
            begun: Whether it is for a run that was begun, which keeps settings of its model that a
                new run is refused.
        """


class Family(NamedTuple):
    """The tasks of one kind, by which the command line knows them.

    Attributes:
        task: The class of its tasks.
        small_presets: Presets for a small machine.
        paper_presets: The paper's.
        default: Name of the preset that is trained where none is named: one that runs small and is
            known to learn.
    """

    task: type[Task]
    small_presets: Sequence[Task]
    paper_presets: Sequence[Task]
    default: str
