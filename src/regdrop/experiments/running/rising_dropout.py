"""Dropout that rises over a run: what alpha's ramp would be by noise alone."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regdrop.passes import DropoutOdds


class RisingDropout(TrainerCallback):
    """Multiplies the odds of dropout by a factor that rises linearly from 1 over the run.

    Args:
        model: The model, with its first rates.
        factor: What the odds are multiplied by in the end.
    """

    def __init__(self, model: nn.Module, factor: float) -> None:
        self._odds = DropoutOdds(model)
        self._factor = factor

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the rates of the step, of which the number in the run tells them alone."""
        progress = state.global_step / max(1, state.max_steps)
        self._odds.scale(1 + (self._factor - 1) * progress)
