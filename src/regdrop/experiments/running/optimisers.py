"""Names and options of optimisers and schedules, which transformers knows."""

import inspect
import math
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch

from regdrop.arguments import nearest
from regdrop.tasks import TrainingSettings
from regdrop.tasks.common.accepted import check_choice

_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# Parts of what was before, which torch takes at any size; "alpha" is RMSprop's.
_PARTS = ("momentum", "dampening", "alpha")

_FAILURES = (AttributeError, ImportError, RuntimeError, TypeError, ValueError)


def check_optimiser(training: TrainingSettings) -> None:
    """Check that there are such an optimiser and such a schedule, and that it takes its options.

    Raises:
        ValueError: If not; the Trainer would leave an option that it does not know out, or take
            another value.
    """
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    check_choice("training.optim", training.optim, [name.value for name in OptimizerNames])
    schedules = [name.value for name in SchedulerType]
    check_choice("training.lr_scheduler_type", training.lr_scheduler_type, schedules)
    given = _parse_options(training.optim_args)
    kind, used = _build(training)
    for name, text in given.items():
        if name not in used:
            known = [each for each in inspect.signature(kind).parameters if each in used]
            raise ValueError(
                f"training.optim_args: {training.optim} takes no option {name!r} here"
                f"{nearest(name, known)}"
            )
        value = _parse_value(name, text, used[name])
        if value != used[name]:
            raise ValueError(
                f"training.optim_args: the option {name!r} does not reach {training.optim}, which "
                f"has {used[name]!r} here; got {text}"
            )
        if name in _PARTS and kind in (torch.optim.SGD, torch.optim.RMSprop) and not value < 1:
            raise ValueError(f"training.optim_args: {name} must be below 1, got {text}")


def _parse_options(text: str | None) -> dict[str, str]:
    """Return the options of "name=value,..."."""
    options: dict[str, str] = {}
    for part in text.replace(" ", "").split(",") if text is not None else ():
        name, separator, value = part.partition("=")
        if not (name and separator and value) or "=" in value or name in options:
            raise ValueError(
                f"training.optim_args must be name=value,..., each name once, got {text!r}"
            )
        options[name] = value
    return options


def _parse_value(name: str, text: str, like: Any) -> Any:
    """Return a value of the type of another.

    Raises:
        ValueError: If the text is no such value.
    """
    if isinstance(like, bool):
        if text.lower() not in _BOOLS:
            raise ValueError(f"training.optim_args: {name} must be true or false, got {text}")
        return _BOOLS[text.lower()]
    if isinstance(like, int | float):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"training.optim_args: {name} must be a finite number, got {text}")
        return value
    return text


def _build(training: TrainingSettings) -> tuple[Any, dict[str, Any]]:
    """Return the class of the optimiser, and the options that it has where the Trainer makes it.

    Raises:
        ValueError: If it cannot be made, or its schedule.
    """
    from transformers import Trainer, TrainingArguments, get_scheduler

    # Their own class would begin the communication of several processes.
    arguments = SimpleNamespace(
        **{field.name: field.default for field in fields(TrainingArguments)}
        | {
            "optim": training.optim,
            "optim_args": training.optim_args,
            "learning_rate": training.learning_rate,
            "weight_decay": training.weight_decay,
            "adam_beta2": training.adam_beta2,
            "parallel_mode": None,
        }
    )
    model: Any = torch.nn.Linear(1, 1)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
        # As the Trainer groups them, with a weight decay of their own.
        groups = [{"params": [model.weight], "weight_decay": training.weight_decay}]
        optimiser = kind(groups, **options)
    except _FAILURES as error:
        chosen = f"training.optim={training.optim!r}"
        if training.optim_args is not None:
            chosen += f" with training.optim_args={training.optim_args!r}"
        raise ValueError(f"{chosen} cannot be: {' '.join(str(error).split())}") from error
    used = {name: value for name, value in optimiser.param_groups[0].items() if name != "params"}
    try:
        get_scheduler(training.lr_scheduler_type, optimiser, 0, training.max_steps)
    except _FAILURES as error:
        raise ValueError(
            f"training.lr_scheduler_type={training.lr_scheduler_type!r} cannot be: "
            f"{' '.join(str(error).split())}"
        ) from error
    return kind, used
