"""How a batch goes through a model several times, and where the passes differ."""

from regdrop.passes.dropout import DropoutSource, find_dropout
from regdrop.passes.noise import embedding_noise
from regdrop.passes.rates import dropout_rates, uses_gradient_checkpointing
from regdrop.passes.stacking import find_batch_size, repeat_batch, take_items
from regdrop.passes.strategies import Strategy, run_passes

__all__ = [
    "DropoutSource",
    "Strategy",
    "dropout_rates",
    "embedding_noise",
    "find_batch_size",
    "find_dropout",
    "repeat_batch",
    "run_passes",
    "take_items",
    "uses_gradient_checkpointing",
]
