"""The chunks of a linear layer as one operator: how torch.compile sees them.

Were it to follow them, it would unroll them, and compile anew for every number of chunks and of
items. Of an operator it asks shapes alone, so that chunks, memory and kernels are those of code
that is not compiled. Label smoothing, scale and softcap are constants of a graph.
"""

from typing import Any, cast

import torch
from torch import Tensor

from regdrop.kernels.implementation import Implementation
from regdrop.kernels.linear_chunks import NO_GRADIENTS, NOTHING_WANTED, chunked_linear_terms
from regdrop.kernels.precision import accumulation_dtype
from regdrop.kernels.projection import Gradients, Projection, TermGradients, Wanted
from regdrop.kernels.target import Target


def linear_chunks(
    hidden: Tensor,
    projection: Projection,
    target: Target,
    grads: TermGradients = NO_GRADIENTS,
    backward_passes: int = 1,
    wanted: Wanted = NOTHING_WANTED,
) -> tuple[Tensor, Tensor, Gradients]:
    """Return what `chunked_linear_terms` does, by one operator where torch compiles."""
    if not torch.compiler.is_compiling():
        return chunked_linear_terms(hidden, projection, target, grads, backward_passes, wanted)
    with torch.no_grad():
        terms, *found = _operator(
            *(hidden, projection.weight, projection.dtype, *wanted, projection.bias),
            *(target.classes, target.weight, target.valid, target.label_smoothing),
            *(projection.scale, projection.softcap, projection.chunk_size, projection.impl),
            *(grads.nll, grads.kl, backward_passes),
        )
    kept = (x if is_wanted else None for x, is_wanted in zip(found, wanted, strict=True))
    return terms[0], terms[1], Gradients(*kept)


@torch.library.custom_op("regdrop::linear_chunks", mutates_args=())
def _operator(
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    bias: Tensor | None,
    classes: Tensor,
    class_weight: Tensor | None,
    valid: Tensor | None,
    label_smoothing: float,
    scale: float,
    softcap: float | None,
    chunk_size: int | None,
    impl: str,
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    backward_passes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both terms, (2, N), and the gradients, empty where they are not wanted."""
    nll, kl, gradients = chunked_linear_terms(
        hidden,
        Projection(weight, bias, scale, softcap, chunk_size, dtype, cast(Implementation, impl)),
        Target(classes, None, class_weight, label_smoothing, valid),
        TermGradients(grad_nll, grad_kl),
        backward_passes,
        Wanted(wants_hidden, wants_weight, wants_bias),
    )
    of_hidden, of_weight, of_bias = (hidden.new_empty(0) if x is None else x for x in gradients)
    return torch.stack([nll, kl]), of_hidden, of_weight, of_bias


@_operator.register_fake
def _shapes(
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(dtype)
    return (
        hidden.new_empty(2, hidden.shape[1], dtype=wide),
        torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0),
        hidden.new_empty(weight.shape if wants_weight else 0, dtype=wide),
        hidden.new_empty(len(weight) if wants_bias else 0, dtype=wide),
    )
