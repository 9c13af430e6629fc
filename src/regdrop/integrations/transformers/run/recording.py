"""R-Drop's options where a run is recorded: experiment trackers, and the model card."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regdrop.config import RDropConfig
from regdrop.whole_files import write_text

_PREFIX = "rdrop_"
_MARK = "The following hyperparameters were used during training:"


class RecordOptions(TrainerCallback):
    """Begins what the trainer keeps of a run, and shows the options to the trackers.

    Trackers record the model's config when training begins, and nothing else of a trainer of one's
    own. Before the first step it is what it was, so that no saved model has an entry of ours.

    Args:
        trainer: Has the options as `rdrop`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add the options; this callback comes before the trackers'."""
        self._trainer.begin_training()
        entries = _entries(kwargs.get("model"))
        if entries is not None:
            # One entry an option: MLflow leaves out long values.
            for name, value in self._trainer.rdrop.to_dict().items():
                entries[f"{_PREFIX}{name}"] = value

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the options away again."""
        _forget(kwargs.get("model"))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the options away also where there was no step."""
        _forget(kwargs.get("model"))


def add_to_model_card(path: Path, rdrop: RDropConfig) -> None:
    """Add the options that differ from the default, and alpha, to the card's hyperparameters."""
    if not path.exists():
        return
    card = path.read_text(encoding="utf-8")
    if _MARK not in card:
        return
    default = RDropConfig().to_dict()
    options = ", ".join(
        f"{name}={value!r}"
        for name, value in rdrop.to_dict().items()
        if name == "alpha" or value != default[name]
    )
    line = f"\n- rdrop (regularized dropout, arXiv 2106.14448): {options}"
    write_text(path, card.replace(_MARK, f"{_MARK}{line}", 1))


def _forget(model: Any) -> None:
    entries = _entries(model)
    if entries is not None:
        for name in RDropConfig().to_dict():
            entries.pop(f"{_PREFIX}{name}", None)


def _entries(model: Any) -> dict[str, Any] | None:
    """Return the entries of a model's config; None for a config to which none can be added.

    That of a model of one's own may be a class, or an object with slots.
    """
    entries = getattr(getattr(model, "config", None), "__dict__", None)
    return entries if isinstance(entries, dict) else None
