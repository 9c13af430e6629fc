"""Does R-Drop act: a report before training, and what a pass beside it tells.

The other public names of diagnostics have files of their own and are found here too.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regdrop.config import RDropConfig
from regdrop.cost import describe_cost_options
from regdrop.cost import expected_cost as expected_cost
from regdrop.disagreement import Disagreement as Disagreement
from regdrop.disagreement import measure_disagreement as measure_disagreement
from regdrop.divergence_watch import advise_dropout
from regdrop.divergence_watch import warn_without_dropout as warn_without_dropout
from regdrop.divergence_watch import warn_zero_divergence as warn_zero_divergence
from regdrop.loss import TermsFunction, combine_terms
from regdrop.passes import (
    concatenate_outputs,
    copy_structure,
    find_dropout,
    preserve_buffers,
    preserve_random_state,
)
from regdrop.tracing import is_transformed

__all__ = [
    "Disagreement",
    "dropout_report",
    "expected_cost",
    "measure_disagreement",
    "warn_without_dropout",
    "warn_zero_divergence",
]

Output = TypeVar("Output")

# Steps from whose cost on a cheaper form is named.
_DEAR = 1.99


def dropout_report(model: nn.Module, config: RDropConfig | None = None) -> list[str]:
    """Return what a user should know before training a model with R-Drop, one line each."""
    config = RDropConfig() if config is None else config
    sources, cost = find_dropout(model), expected_cost(config)
    on = [source for source in sources if source.rate > 0]
    lines = [
        f"{len(on)} of {len(sources)} sources of dropout have a rate above 0.",
        f"A step costs about {cost:.2f} single-pass steps, the mean over a long run "
        f"({describe_cost_options(config)}).",
    ]
    if not on:
        lines.append(advise_dropout(model))
    elif cost > _DEAR and config.every_n_steps == 1 and config.rescale:
        lines.append(
            "every_n_steps=3 estimates the same gradient without bias at about "
            f"{expected_cost(replace(config, every_n_steps=3)):.2f} single-pass steps."
        )
    is_stacked = config.passes == "stacked"
    if config.num_passes == 1:
        return lines
    if is_stacked and any(source.kind == "layerdrop" for source in on):
        lines.append(
            "LayerDrop draws once a forward, so that stacked passes share it: "
            "use passes='sequential'."
        )
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        lines.append(
            "BatchNorm computes its statistics over the stacked batch, all passes of it."
            if is_stacked
            else "BatchNorm updates its running statistics in every pass."
        )
    return lines


def measure_divergence(outputs: Any, other: Any, target: Any, terms: TermsFunction) -> Tensor:
    """Return the divergence of two passes of the same batch, a detached mean over its items.

    Args:
        outputs: Output of one pass, (batch, ...), or a structure of such.
        other: Output of the other.
        target: The target, which tells the items that count.
        terms: The output family's terms of each item.
    """
    # Terms may draw masks of their own, as an adaptive softmax does.
    with torch.no_grad(), preserve_random_state():
        both = terms(concatenate_outputs([outputs, other]), target, num_passes=2)
        return combine_terms(both, alpha=0.0, num_passes=2).kl


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
    with torch.no_grad(), preserve_random_state(), preserve_buffers(model):
        # Without a new seed the pass would draw the very masks of the pass that follows.
        torch.manual_seed(int(torch.randint(2**62, ()).item()))
        return forward(copy_structure(batch, clones=True))
