"""Names and options of optimisers and schedules, which transformers knows."""

import inspect
from typing import Any

from regdrop.tasks import TrainingSettings
from regdrop.tasks.common.accepted import check_choice, nearest


def check_optimiser(training: TrainingSettings) -> None:
    """Check that there are such an optimiser and such a schedule, and that it takes its options.

    Raises:
        ValueError: If not; the Trainer would leave an option that it does not know out.
    """
    from transformers import SchedulerType, Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    check_choice("training.optim", training.optim, [name.value for name in OptimizerNames])
    schedules = [name.value for name in SchedulerType]
    check_choice("training.lr_scheduler_type", training.lr_scheduler_type, schedules)
    if training.optim_args is None:
        return
    names = []
    for part in training.optim_args.replace(" ", "").split(","):
        name, separator, value = part.partition("=")
        if not (name and separator and value):
            raise ValueError(
                f"training.optim_args must be name=value,..., got {training.optim_args!r}"
            )
        names.append(name)
    arguments = TrainingArguments(
        optim=training.optim, optim_args=training.optim_args, use_cpu=True, report_to=[]
    )
    kind: Any
    try:
        kind, taken = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"training.optim={training.optim!r} with training.optim_args="
            f"{training.optim_args!r} cannot be: {error}"
        ) from error
    known = set(inspect.signature(kind).parameters)
    for name in names:
        if name not in taken or name not in known:
            raise ValueError(
                f"training.optim_args: {training.optim} takes no option {name!r} here"
                f"{nearest(name, known)}"
            )
