"""A pass beside a step's own that is only measured, and how far two passes are apart."""

import random
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regdrop.loss import TermsFunction, combine_terms
from regdrop.passes import (
    concatenate_outputs,
    copy_structure,
    forget_converted_weights,
    preserve_buffers,
    preserve_random_state,
)
from regdrop.tracing import is_transformed

Output = TypeVar("Output")


def measure_divergence(outputs: Any, other: Any, target: Any, terms: TermsFunction) -> Tensor:
    """Return the divergence of two passes of the same batch, a detached mean over its items.

    Args:
        outputs: Output of one pass, (batch, ...), or a structure of such.
        other: Output of the other.
        target: The target, which tells the items that count.
        terms: The output family's terms of each item.
    """
    # Terms may draw masks of their own, as an adaptive softmax does.
    try:
        with torch.no_grad(), preserve_random_state():
            both = terms(concatenate_outputs([outputs, other]), target, num_passes=2)
            return combine_terms(both, alpha=0.0, num_passes=2).kl
    finally:
        forget_converted_weights()


def extra_pass(model: nn.Module, forward: Callable[[Any], Output], batch: Any) -> Output:
    """Run one more pass without gradient and leave the run exactly as it was.

    The pass draws masks of its own; afterwards the random states of torch, Python and NumPy and
    the model's buffers (BatchNorm statistics among them) are what they were.

    Args:
        model: The module whose buffers are kept.
        forward: Maps a batch to the model's output.
        batch: The original batch.

    Raises:
        ValueError: Inside of `torch.func`, whose passes have no seed that may be set.
    """
    if is_transformed():
        raise ValueError(
            "monitor_steps runs one more pass under masks of its own, for which torch.func (vmap, "
            "grad and their like) has no seed; use monitor_steps=None there"
        )
    try:
        with torch.no_grad(), preserve_random_state(), preserve_buffers(model):
            # Without a new seed the pass would draw the very masks of the pass that follows.
            _seed_all(int(torch.randint(2**32, (), device="cpu").item()))
            return forward(copy_structure(batch, clones=True))
    finally:
        forget_converted_weights()


def _seed_all(seed: int) -> None:
    """Seed torch, Python and NumPy, each of which a model may draw from; NumPy has 2**32 seeds."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    if numpy_random is not None:
        # Its `seed` would be compiled anew for every number, and somebody may have put in another
        # generator, which has no such seed.
        state = numpy_random.RandomState(seed).get_state(legacy=False)
        if numpy_random.get_state(legacy=False)["bit_generator"] == state["bit_generator"]:
            numpy_random.set_state(state)
