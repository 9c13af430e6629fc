"""Tells a data set its epoch, also in an epoch that is resumed in its middle."""

from typing import Any

from transformers import TrainerCallback


class EpochCallback(TrainerCallback):
    """Calls the training data's `set_epoch`, where it has one, before an epoch is read.

    Accelerate does so too, but not for a loader that skips what was read before, nor for one that
    is shared by several processes.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the epoch, of which a resumed run may have a part behind it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))
