"""How a batch goes through a model several times, and where the passes differ."""

from regdrop.passes.batch_size import find_batch_size
from regdrop.passes.dropout import DropoutSource, find_dropout
from regdrop.passes.noise import embedding_noise
from regdrop.passes.outputs import concatenate_outputs, count_rows, map_rows
from regdrop.passes.preserved_state import (
    forget_converted_weights,
    preserve_buffers,
    preserve_modes,
    preserve_random_state,
    train_without_statistics,
)
from regdrop.passes.rates import DropoutOdds, dropout_rates, scale_dropout_odds
from regdrop.passes.shared_prefix import SharedPrefix, share_prefix, why_not_shared
from regdrop.passes.stacking import find_tensors, repeat_batch, take_items
from regdrop.passes.strategies import Strategy, refuse_other_rows, run_as_pass, run_passes
from regdrop.passes.structures import copy_structure

__all__ = [
    "DropoutOdds",
    "DropoutSource",
    "SharedPrefix",
    "Strategy",
    "concatenate_outputs",
    "copy_structure",
    "count_rows",
    "dropout_rates",
    "embedding_noise",
    "find_batch_size",
    "find_dropout",
    "find_tensors",
    "forget_converted_weights",
    "map_rows",
    "preserve_buffers",
    "preserve_modes",
    "preserve_random_state",
    "refuse_other_rows",
    "repeat_batch",
    "run_as_pass",
    "run_passes",
    "scale_dropout_odds",
    "share_prefix",
    "take_items",
    "train_without_statistics",
    "why_not_shared",
]
