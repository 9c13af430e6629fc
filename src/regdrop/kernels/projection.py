"""The linear layer before the loss: its products, the logits made of them, and its gradients."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regdrop.kernels.implementation import Implementation
from regdrop.kernels.precision import accumulation_dtype
from regdrop.tracing import is_traced


class Projection(NamedTuple):
    """From hidden states h to logits, `cap(scale * (h weight^T + bias))`, and how that is computed.

    Attributes:
        weight: (C, features).
        bias: (C,) or None.
        scale: A number that multiplies the logits.
        softcap: Bound c of the logits, `c * tanh(x / c)`, or None.
        chunk_size: Items a chunk; None chooses.
        dtype: The dtype of the products; None takes autocast's, or that of the tensors.
        impl: What computes the terms from logits, as in `select_kernel`.
        block_size: Classes a block; a number asks for blocks of classes, None chooses.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    chunk_size: int | None = None
    dtype: torch.dtype | None = None
    impl: Implementation = "auto"
    block_size: int | None = None


class Gradients(NamedTuple):
    """Gradients of the layer's input and of its parameters; None where none is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class TermGradients(NamedTuple):
    """The gradient of each item's NLL and divergence, (N,); None where there is none."""

    nll: Tensor | None
    kl: Tensor | None

    def rows(self, items: slice) -> "TermGradients":
        """Return those of some items."""
        return TermGradients(*(None if grad is None else grad[items] for grad in self))


class Wanted(NamedTuple):
    """Whether the layer's input and its parameters need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


def with_dtype(hidden: Tensor, projection: Projection) -> Projection:
    """Return a projection whose dtype is given: its own, autocast's, or that of the states."""
    if projection.dtype is not None:
        return projection
    dtype = hidden.dtype
    if dtype != torch.float64 and casts_itself(hidden.device):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    return projection._replace(dtype=dtype)


def casts_itself(device: torch.device) -> bool:
    """Return whether autocast is on; not every device has one."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products are computed in the dtype of their factors."""
    if not casts_itself(device):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def project(hidden: Tensor, projection: Projection) -> Tensor:
    """Return the logits themselves, (..., C), without a gradient: those of a few items."""
    projection = with_dtype(hidden, projection)
    weight, bias, dtype = projection.weight, projection.bias, projection.dtype
    assert dtype is not None
    with torch.no_grad(), without_autocast(hidden.device):
        rows = hidden.to(dtype).reshape(-1, hidden.shape[-1])
        products = multiply(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        logits = shape_logits(products, projection.scale, projection.softcap)
        return logits.view(*hidden.shape[:-1], -1)


def multiply(
    rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Return the products of rows (R, features) with a weight (c, features): (R, c)."""
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


def add_product(
    total: Tensor, a: Tensor, b: Tensor, *, is_first: bool = False, scratch: Tensor | None = None
) -> None:
    """Add a @ b to `total`, or write it there.

    `total` may be wider than half-precision factors. Where torch has no such product it goes by
    way of one in half precision, in `scratch` if that is given.
    """
    beta = 0 if is_first else 1
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.dtype == torch.float32 and adds_in_float32(a.device, a.dtype):
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    else:
        product = torch.mm(a, b, out=scratch)
        total.copy_(product) if is_first else total.add_(product)


def adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this version of torch adds products of `dtype` to numbers in float32.

    Where torch compiles or traces, nothing can be tried, and the way that every torch has is taken.
    """
    if torch.compiler.is_compiling() or is_traced():
        return False
    return _can_add_in_float32(device, dtype)


@cache
def _can_add_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    a = torch.ones(16, 16, device=device, dtype=dtype)
    total = torch.ones(16, 16, device=device, dtype=torch.float32)
    try:
        torch.ops.aten.addmm.dtype_out(total, a, a, torch.float32, out=total)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


def shape_logits(
    products: Tensor, scale: float, softcap: float | None, *, inplace: bool = False
) -> Tensor:
    """Return the logits that products give: the products themselves, or in float32 at least.

    With `inplace` they overwrite the products where their dtype can hold them.
    """
    if scale == 1 and softcap is None:
        return products
    logits = products.to(accumulation_dtype(products.dtype), copy=not inplace).mul_(scale)
    if softcap is None:
        return logits
    return logits.div_(softcap).tanh_().mul_(softcap)


def logits_slope(logits: Tensor, scale: float, softcap: float | None) -> Tensor | float | None:
    """Return the derivative of the logits with respect to the products; None for 1."""
    if softcap is None:
        return None if scale == 1 else scale
    return logits.div(softcap).square_().neg_().add_(1).mul_(scale)
