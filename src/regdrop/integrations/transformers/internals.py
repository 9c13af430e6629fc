"""What regdrop uses of transformers' Trainer that is not its public interface, all of it here.

Methods with the Trainer's own names are overridden in one class, which calls methods with names of
ours. What they and the rest rely on is listed beside it: where a version of transformers has other
names or arguments, a trainer says so when it is built, instead of doing something else in silence.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from regdrop.passes import copy_structure, preserve_random_state

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

# Methods that are overridden or called, with the arguments that they are given.
METHODS: dict[str, tuple[str, ...]] = {
    "_determine_best_metric": ("metrics", "trial"),
    "_evaluate": ("trial", "ignore_keys_for_eval", "skip_scheduler"),
    "_hp_search_setup": ("trial",),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_prepare_input": ("data",),
    "_prepare_inputs": ("inputs",),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "floating_point_ops": ("inputs",),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "get_tp_size": (),
    "log": ("logs", "start_time"),
    "save_model": ("output_dir", "_internal_call"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
}
# Attributes that are read or set, which the Trainer's own code names.
ATTRIBUTES = (
    "_globalstep_last_logged",
    "_tr_loss",
    "compute_loss_func",
    "current_gradient_accumulation_steps",
    "hp_space",
    "is_deepspeed_enabled",
    "is_fsdp_enabled",
    "model_accepts_loss_kwargs",
    "model_wrapped",
)
ARGUMENTS = ("average_tokens_across_devices", "train_sampling_strategy")
# Those of the trainer that generates.
GENERATION_ATTRIBUTES = ("_gen_kwargs", "gather_function")


@cache
def missing_internals() -> tuple[str, ...]:
    """Return what this version of transformers does not have as it is used here."""
    missing = []
    for name, wanted in METHODS.items():
        method = getattr(Trainer, name, None)
        found = () if method is None else tuple(inspect.signature(method).parameters)[1:]
        if method is None or found[: len(wanted)] != wanted:
            missing.append(f"Trainer.{name}({', '.join(wanted)})")
    missing += missing_attributes(Trainer, ATTRIBUTES)
    missing += missing_attributes(Seq2SeqTrainer, GENERATION_ATTRIBUTES)
    known = inspect.signature(TrainingArguments).parameters
    missing += [f"TrainingArguments.{name}" for name in ARGUMENTS if name not in known]
    return tuple(missing)


def missing_attributes(kind: type, names: Iterable[str]) -> tuple[str, ...]:
    """Return the attributes that the code of another library's class does not name."""
    code = inspect.getsource(kind)
    return tuple(f"{kind.__name__}.{name}" for name in names if f"self.{name}" not in code)


def require_internals() -> None:
    """Refuse a version of transformers in which something would be done in silence or not at all.

    Raises:
        RuntimeError: Names what is missing.
    """
    refuse_without(missing_internals(), transformers)


def refuse_without(missing: Iterable[str], library: ModuleType) -> None:
    """Refuse a version of a library that does not have what is used of it.

    Raises:
        RuntimeError: Names what is missing.
    """
    names = ", ".join(missing)
    if names:
        raise RuntimeError(
            f"{library.__name__} {library.__version__} does not have {names}, which "
            "regdrop's trainers build on: install a version that this version of regdrop was "
            "tried with (docs/install.md)"
        )


def loss_since_log(trainer: Any) -> tuple[Tensor, int]:
    """Return the sum of this process's losses since the last log, and the step of that log."""
    return trainer._tr_loss.detach(), trainer._globalstep_last_logged


def go_on_from_log(trainer: Any, total: float, step: int) -> None:
    """Have a trainer that begins anew go on with such a sum."""
    trainer._tr_loss += total
    trainer._globalstep_last_logged = step


class TrainerInternals(_Base):
    """The lowest part of `RDropTrainerMixin`: it knows the Trainer's own names and order of calls.

    Methods of ours that it calls do nothing here; `RunState` and the mixin override them.
    """

    _model_takes_num_items: bool
    _should_restore = False

    # --- what the Trainer calls -----------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, beside it, the R-Drop config; in checkpoints also its state."""
        super().save_model(output_dir, _internal_call)
        self._write_beside(Path(output_dir or self.args.output_dir or "."), _internal_call)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load these, and R-Drop's state: DeepSpeed does not call `_load_from_checkpoint`."""
        super()._load_optimizer_and_scheduler(checkpoint)
        self._read_beside(checkpoint)

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Evaluate in training; a rule of alpha reads the loss that comes out."""
        metrics: dict[str, float] = super()._evaluate(
            trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler
        )
        # An evaluation before the first step, which skips the schedule of the learning rate, would
        # count a second time where a run goes on.
        if not skip_scheduler:
            self._note_evaluation(metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Note the best figure; weights that do not have it give way to those of the checkpoint.

        That is before the checkpoint is written: one with the best figure keeps its own weights.
        """
        is_best: bool = super()._determine_best_metric(metrics, trial)
        if self._should_restore and not is_best and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self._should_restore = False
        return is_best

    def _hp_search_setup(self, trial: Any) -> None:
        """Take R-Drop's hyperparameters of a trial; leave the others to the Trainer."""
        space: Any = getattr(self, "hp_space", None)
        if trial is None:
            if space is not None:
                self._leave_search()
            return super()._hp_search_setup(trial)
        is_optuna = not isinstance(trial, dict) and hasattr(trial, "suggest_float")
        params = dict(space(trial) if is_optuna and space else trial)
        # Under these names the search tells its best.
        named = dict(trial.params) if is_optuna else params
        rest = self._take_searched(params, named)
        self.hp_space = lambda _: rest
        try:
            super()._hp_search_setup(trial if is_optuna else rest)
        finally:
            self.hp_space = space
            self._trial = trial

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect an accumulation window, and count its items and their weight over all ranks."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, self._count_window(samples, num_items, device)

    # --- what it calls of ours ------------------------------------------------------------------

    def _write_beside(self, folder: Path, is_checkpoint: bool) -> None:
        """Write what is ours beside a saved model."""

    def _read_beside(self, checkpoint: str | None) -> None:
        """Read what is ours beside a checkpoint that a run goes on from."""

    def _load_renamed(self, checkpoint: str | None) -> bool:
        """Load weights that have other names than the model's; return whether they were such."""
        return False

    def _note_evaluation(self, metrics: dict[str, float]) -> None:
        """See the figures of an evaluation in training."""

    def _take_searched(self, params: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
        """Take what is ours of a trial's hyperparameters; return the others."""
        return params

    def _leave_search(self) -> None:
        """Leave the hyperparameters of the last trial, where a run after a search begins."""

    def _count_window(
        self, samples: list[Any], num_items: Tensor | int | None, device: torch.device
    ) -> Tensor | int | None:
        """Return the number of items of a window of micro-batches."""
        return num_items

    # --- what ours asks of it -------------------------------------------------------------------

    def _take_over_counting(self) -> None:
        """Have the Trainer count the items of a window, and leave dividing by them to R-Drop.

        It counts them only for models that ask for it; R-Drop divides by them whatever the model
        does.
        """
        self._model_takes_num_items = getattr(self, "model_accepts_loss_kwargs", False)
        self.model_accepts_loss_kwargs: bool = True
        self.loss_is_scaled_for_ga = True

    def _num_micro_batches(self) -> int:
        """Return the number of micro-batches of this window."""
        return getattr(self, "current_gradient_accumulation_steps", 1)

    def _prepared(self, samples: list[Any]) -> list[Any]:
        """Return batches as a `_prepare_inputs` of one's own leaves them, labels among them.

        The Trainer calls it when a window is counted already. The run is left as it is.
        """
        if type(self)._prepare_inputs is Trainer._prepare_inputs:
            return samples
        with preserve_random_state():
            return [
                _Prepared(self._prepare_inputs(dict(copy_structure(sample, clones=True))))
                if isinstance(sample, Mapping)
                else sample
                for sample in samples
            ]

    def _on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch on the model's device, as the Trainer brings it there.

        Raises:
            TypeError: For a batch that is no mapping.
        """
        if not isinstance(inputs, Mapping):
            raise TypeError(
                f"a batch must be a mapping from names to tensors, got {type(inputs).__name__}: "
                "let the data collator return a dictionary"
            )
        # Another process may have sent it.
        if isinstance(inputs, _Prepared):
            return _Prepared({name: self._prepare_input(x) for name, x in inputs.items()})
        prepared: dict[str, Any] = self._prepare_inputs(dict(inputs))
        return prepared

    def _compute_without_rdrop(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Any
    ) -> Any:
        """Call the `compute_loss` below the mixin as the Trainer would without it."""
        compute = super().compute_loss
        options = {"num_items_in_batch": num_items} if takes(compute, "num_items_in_batch") else {}
        # R-Drop has the Trainer count items for every model, but not every model takes the count.
        counts, self.model_accepts_loss_kwargs = (
            self.model_accepts_loss_kwargs,
            self._model_takes_num_items,
        )
        try:
            return compute(model, inputs, return_outputs=return_outputs, **options)
        finally:
            self.model_accepts_loss_kwargs = counts

    def _own_loss_counts(self) -> bool | None:
        """Return whether that loss divides by the items it is given; None where that is to try."""
        says: bool | None = getattr(type(self), "loss_is_scaled_for_ga", None)
        if says is not None:
            return says
        if not takes(super().compute_loss, "num_items_in_batch"):
            return False
        is_plain = self._loss_owner() is None
        return False if is_plain and not self._model_takes_num_items else None

    def _loss_owner(self) -> str | None:
        """Return who computes the loss without R-Drop, but for the Trainer and its model."""
        if self.compute_loss_func is not None:
            return "compute_loss_func"
        classes = type(self).__mro__
        below = classes[classes.index(TrainerInternals) + 1 : classes.index(Trainer)]
        owner = next((c for c in below if "compute_loss" in vars(c)), None)
        return None if owner is None else f"{owner.__name__}.compute_loss"


class _Prepared(dict[str, Any]):
    """A batch that is as `_prepare_inputs` leaves it."""


def takes(function: Any, name: str) -> bool:
    """Return whether a function may be given an argument by a name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )
