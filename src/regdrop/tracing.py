"""Whether torch compiles or transforms what runs: then values cannot be read."""

import torch


def is_transformed() -> bool:
    """Return whether `torch.func` transforms what runs: grad, vmap, jvp and their like.

    Functions with a gradient of their own have no rule there.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def can_read(device: torch.device) -> bool:
    """Return whether a check may read values: where nobody waits for a device, nor traces."""
    return device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()
