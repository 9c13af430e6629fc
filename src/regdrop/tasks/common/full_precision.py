"""Evaluation in float32, whatever precision a run trains in: a trainer's part, and its plain form.

Under autocast to bfloat16 a prediction has three significant digits, so that a regression gives a
handful of values and ranks are lost.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from regdrop.integrations.transformers import RDropTrainer

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class FullPrecisionEvaluation(_Base):
    """The part of a trainer that evaluates and predicts in float32; list it first."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict without autocast."""
        assert self.model is not None
        with _without_autocast(self.model):
            return super().evaluation_loop(*args, **kwargs)


class TaskTrainer(FullPrecisionEvaluation, RDropTrainer):
    """`RDropTrainer` that evaluates in float32: the trainer of classification and regression."""


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Take away the forward that accelerate gave a model to train in mixed precision."""
    wrapped = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            vars(model)["forward"] = wrapped
