"""Why a part of a model cannot be computed once for all passes."""

import re
from typing import NamedTuple

from torch import nn

from regdrop.passes.dropout import rate_attributes

# As words of a name in capitals: a ThermoEncoder has none.
_EXPERTS = re.compile(r"M[oO][eE](?![a-z])|(?:^|_)moe(?![a-z])|(?i:expert|router|mixture)")
# The flags of transformers and of timm.
_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")


class Obstacle(NamedTuple):
    """Something in a part that forbids to share it while an attribute is on, in training mode."""

    module: nn.Module
    attribute: str
    reason: str

    def is_on(self) -> bool:
        """Return whether it stands in the way now."""
        return self.module.training and bool(getattr(self.module, self.attribute))


def list_obstacles(model: nn.Module, until: str) -> list[Obstacle]:
    """List what in a part is, or could be switched on to be, in the way of sharing it.

    Dropout makes passes differ, BatchNorm counts rows in its statistics, and checkpointing
    recomputes with all rows. A rate that only a config knows has no place and is not listed.
    """
    part = model.get_submodule(until)
    found = [
        Obstacle(
            owner,
            attribute,
            f"{until}.{source.name}".strip(".") + f" is an active source of {source.kind}",
        )
        for source, owner, attribute in rate_attributes(part)
        if isinstance(owner, nn.Module)
    ]
    for name, module in part.named_modules(prefix=until):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            reason = f"{name} is a BatchNorm in training mode; call eval() on it to freeze it"
            found.append(Obstacle(module, "training", reason))
    around = [until[: dot.start()] for dot in re.finditer(r"\.", until)]
    inside = [name for name, _ in part.named_modules(prefix=until)]
    for name in ["", *around, *inside]:
        for flag in _CHECKPOINTING:
            if hasattr(model.get_submodule(name), flag):
                reason = f"{name or 'the model'} uses gradient checkpointing; switch it off"
                found.append(Obstacle(model.get_submodule(name), flag, reason))
    return found


def uses_gradient_checkpointing(model: nn.Module) -> bool:
    """Return whether a model of transformers or timm has gradient checkpointing switched on."""
    return any(
        getattr(module, flag, False) is True
        for module in model.modules()
        for flag in _CHECKPOINTING
    )


def find_experts(model: nn.Module, until: str) -> str | None:
    """Return the reason if a part holds experts, whose load is that of the whole batch."""
    part = model.get_submodule(until)
    for name, module in part.named_modules(prefix=until):
        if _EXPERTS.search(type(module).__name__):
            return f"{name} ({type(module).__name__}) is a mixture of experts"
    if getattr(getattr(part, "config", None), "router_aux_loss_coef", None) is not None:
        return "its config has a router_aux_loss_coef, that of a mixture of experts"
    return None
