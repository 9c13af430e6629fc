"""Does R-Drop act: a report before training.

The other public names of diagnostics have files of their own and are found here too.
"""

from dataclasses import replace

from torch import nn

from regdrop.config import RDropConfig
from regdrop.cost import describe_cost_options
from regdrop.cost import expected_cost as expected_cost
from regdrop.disagreement import Disagreement as Disagreement
from regdrop.disagreement import measure_disagreement as measure_disagreement
from regdrop.divergence_watch import advise_dropout
from regdrop.divergence_watch import warn_without_dropout as warn_without_dropout
from regdrop.divergence_watch import warn_zero_divergence as warn_zero_divergence
from regdrop.passes import find_dropout

__all__ = [
    "Disagreement",
    "dropout_report",
    "expected_cost",
    "measure_disagreement",
    "warn_without_dropout",
    "warn_zero_divergence",
]

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
