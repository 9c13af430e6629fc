"""Which settings of a finished run an evaluation can change, and how a saved model takes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from regdrop.tasks import Task

# How text is generated: settings of a task that a model keeps in its generation config.
_DECODING = ("num_beams", "length_penalty", "min_length", "max_length", "no_repeat_ngram_size")
# Which data is read and how much of it a model sees; everything else is in the weights by now.
_READING = (
    "source",
    "target",
    "glue_task",
    "dataset_config",
    "streaming",
    "train_examples",
    "train_words",
    "block_size",
    "context_window",
    "test_block_size",
    "image_size",
    "max_length",
    "max_source_length",
    "max_target_length",
    "training.batch_size",
)
_LENGTHS = ("max_length", "max_source_length", "max_target_length")


def changed_names(settings: Sequence[str]) -> list[str]:
    """Return the names of settings, each "name=value"."""
    return [setting.partition("=")[0].strip() for setting in settings]


def check_changes(folder: Path, task: Task, settings: Sequence[str]) -> None:
    """Check that an evaluation can change some settings.

    Args:
        folder: That of the run.
        task: The task with these settings.
        settings: The changed ones, each "name=value".

    Raises:
        ValueError: If they would have no effect, by name, with those that have one.
    """
    names = changed_names(settings)
    generates = "num_beams" in task.__dataclass_fields__
    known = dict.fromkeys((*_READING, *(_DECODING if generates else ())))
    if refused := [name for name in names if name not in known]:
        own = [name for name in known if name.partition(".")[0] in task.__dataclass_fields__]
        raise ValueError(
            f"an evaluation cannot change {', '.join(refused)}: the model of {folder} has what it "
            f"was trained with; it can change {', '.join(own)}"
        )
    if "length_penalty" in names and getattr(task, "num_beams", 1) == 1:
        raise ValueError("length_penalty is of several beams: it must not be set with num_beams=1")


def apply_decoding(model: nn.Module, task: Task, settings: Sequence[str]) -> None:
    """Make a saved model generate, or read, as the changed settings say.

    Args:
        model: The saved model.
        task: The task with the changed settings.
        settings: These, each "name=value".

    Raises:
        ValueError: If the model has fewer positions than are wanted.
    """
    options: Any = task
    saved: Any = model
    names = changed_names(settings)
    positions = getattr(saved.config, "max_position_embeddings", None)
    for name in names:
        if name in _LENGTHS and positions is not None and getattr(options, name) > positions:
            raise ValueError(
                f"{name} must be at most the {positions} positions of the model, "
                f"got {getattr(options, name)}"
            )
    if "num_beams" not in task.__dataclass_fields__:
        return
    changes = {name: getattr(options, name) for name in names if name in _DECODING}
    if changes.keys() & {"num_beams", "length_penalty"}:
        has_beams = options.num_beams > 1
        changes["length_penalty"] = options.length_penalty if has_beams else None
        changes["early_stopping"] = True if has_beams else None
    saved.generation_config.update(**changes)
