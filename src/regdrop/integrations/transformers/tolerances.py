"""How far apart numbers may be that mean the same, in single and in half precision."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """A relative distance: for logits in float32 or float64, and in half precision."""

    single: float
    half: float

    def of(self, dtype: torch.dtype | None) -> float:
        """Return that of a dtype; None is a layer's own, without autocast."""
        return self.single if dtype in (None, torch.float32, torch.float64) else self.half


# A loss of the same logits by another formula: small enough that no term of a small weight hides.
LOSS = Tolerance(1e-4, 2e-2)
# The same layer on the same states, whose products a GPU may round otherwise (TF32).
LAYER = Tolerance(1e-3, 1e-2)
# What two forwards of the same rows give, with other rows beside them or other kernels.
FORWARD = Tolerance(1e-3, 5e-2)


def are_close(a: Tensor, b: Tensor) -> bool:
    """Return whether two losses are those of the same rows."""
    return bool(torch.isclose(a, b.to(a), rtol=FORWARD.of(a.dtype), atol=1e-6, equal_nan=True))
