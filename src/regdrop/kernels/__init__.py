"""How the R-Drop terms are computed: one function, several implementations of it."""

from regdrop.kernels.cpp_rows import whole_loss
from regdrop.kernels.fused_linear import linear_loss, linear_terms
from regdrop.kernels.implementation import Implementation, check_implementation
from regdrop.kernels.projection import Projection, project
from regdrop.kernels.sharded_classes import is_distributed, stack_rows, whole_tensor
from regdrop.kernels.target import Target
from regdrop.kernels.terms import rdrop_sum, rdrop_terms

__all__ = [
    "Implementation",
    "Projection",
    "Target",
    "check_implementation",
    "is_distributed",
    "linear_loss",
    "linear_terms",
    "project",
    "rdrop_sum",
    "rdrop_terms",
    "stack_rows",
    "whole_loss",
    "whole_tensor",
]
