"""Gradients of each row by itself, as Opacus clips them for differential privacy."""

import sys
from collections.abc import Iterable

import torch
from torch import nn


def has_per_sample_gradients(modules: Iterable[nn.Module]) -> bool:
    """Return whether Opacus computes a gradient for each row of what some modules are given.

    It marks their parameters, whether it wraps the model or hooks into it. A program that never
    imported it is not looked at, and neither is compiled code.
    """
    if torch.compiler.is_compiling() or "opacus" not in sys.modules:
        return False
    return any(hasattr(p, "grad_sample") for module in modules for p in module.parameters())
