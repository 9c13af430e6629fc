"""The history of a run, written as it happens, with the time of training alone."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regdrop.whole_files import write_text


class DivergedError(ValueError):
    """The loss or a metric of a run is no finite number any more."""


def check_finite(measured: Mapping[str, float], step: int) -> None:
    """Check that what was measured of a run is finite.

    Args:
        measured: Numbers by what they are, in words.
        step: When.

    Raises:
        DivergedError: If one is not, with what to change.
    """
    for name, value in measured.items():
        if not math.isfinite(value):
            raise DivergedError(
                f"{name} is {value} at step {step}: the run has diverged. Lower "
                "training.learning_rate or alpha, raise training.warmup_ratio, clip by "
                "training.max_grad_norm, or train without training.mixed_precision"
            )


TRAINING_LOSS = "the training loss"

# Called with the step and the metrics of every log and evaluation.
Progress = Callable[[int, dict[str, float]], None]


class HistoryCallback(TrainerCallback):
    """Writes every log and evaluation with the time of training alone, as it happens.

    It ends a run whose loss or metrics are no finite numbers any more.
    """

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        self.path = path
        self.progress = progress
        self.entries: list[dict[str, float]] = []
        self.seconds = 0.0
        self._mark = 0.0

    def best(self, metric: str, greater_is_better: bool) -> tuple[int, dict[str, float]]:
        """Return the step and the metrics of the first best evaluation."""
        evaluations = [entry for entry in self.entries if f"eval_{metric}" in entry]
        sign = 1 if greater_is_better else -1
        best = max(evaluations, key=lambda entry: sign * entry[f"eval_{metric}"])
        return int(best["step"]), best

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the entries up to the checkpoint, or begin anew."""
        step = state.global_step
        self.entries = _read_entries(self.path, step) if step else []
        self.seconds = self.entries[-1]["seconds"] if self.entries else 0.0
        if state.is_world_process_zero:
            # Whole or not at all: other processes may be reading it.
            write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self.entries))
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
        """Keep the metrics of training; evaluations come by `on_evaluate`."""
        logs = logs or {}
        if "loss" in logs:
            self._add(state, logs)
        # The latter is the mean over the run, logged at its end: it holds what no log held.
        losses = [logs[name] for name in ("loss", "train_loss") if name in logs]
        for loss in losses:
            check_finite({TRAINING_LOSS: loss}, state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the metrics of an evaluation, and leave its time out."""
        numbers = self._add(state, metrics or {})
        named = {f"validation {name.removeprefix('eval_')}": x for name, x in numbers.items()}
        check_finite(named, state.global_step)
        self._mark = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the time of a checkpoint out."""
        self._mark = time.perf_counter()

    def _add(self, state: TrainerState, metrics: dict[str, float]) -> dict[str, float]:
        """Keep and return the numbers among some metrics."""
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and not name.endswith(("per_second", "runtime"))
        }
        entry = {**numbers, "step": state.global_step, "seconds": self.seconds}
        self.entries.append(entry)
        if not state.is_world_process_zero:
            return numbers
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.progress is not None:
            self.progress(state.global_step, numbers)
        return numbers


def _read_entries(path: Path, step: int) -> list[dict[str, float]]:
    """Return the entries of a history up to the step of a checkpoint.

    Raises:
        ValueError: If the file is damaged, or does not reach so far.
    """
    problem: object = f"it does not reach step {step}"
    try:
        # The last line may have been cut by what stopped the run, or belong to later steps.
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        kept = [entry for entry in entries if entry["step"] <= step]
        if kept and kept[-1]["step"] == step:
            return kept
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = error
    raise ValueError(
        f"{path} is not the history of the interrupted run beside it: {problem}; remove "
        f"{path.parent} to train again from the start"
    )
