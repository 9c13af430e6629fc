"""The implementations of the cross-entropy form as parameters of a test, and what it gives them."""

import os
import shutil
from importlib.util import find_spec

import pytest
import torch
from torch.utils.cpp_extension import is_ninja_available

from regdrop import rdrop_cross_entropy

if find_spec("triton") is None:
    _why_no_triton = "triton is not installed"
elif torch.cuda.is_available():
    _why_no_triton = "Triton is not interpreted beside a GPU; tests/kernels runs it there"
else:
    _why_no_triton = ""

if shutil.which(os.environ.get("CXX", "c++")) is None:
    WHY_NO_CPP = "no C++ compiler"
elif not is_ninja_available():
    WHY_NO_CPP = "no ninja, which builds extensions"
else:
    WHY_NO_CPP = ""

# On a CPU torch.compile writes C++; without a compiler its graphs can be traced all the same.
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))

TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(_why_no_triton != "", reason=_why_no_triton)
)
# The first test builds it.
CPP = pytest.param(
    "cpp", marks=[pytest.mark.slow, pytest.mark.skipif(WHY_NO_CPP != "", reason=WHY_NO_CPP)]
)


def make(num_passes=2, batch=5, classes=7, *, ignored=(), dtype=torch.float64, seed=0, scale=2.0):
    """Return the logits of stacked passes and the target, some of whose items are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_passes * batch, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (batch,), generator=generator)
    target[list(ignored)] = -100
    return (logits * scale).to(dtype), target


def gradient(logits, target, upstream=1.0, **options):
    """Return the gradient of the logits, of the loss times an upstream gradient."""
    logits = logits.detach().clone().requires_grad_()
    (rdrop_cross_entropy(logits, target, **options).loss * upstream).sum().backward()
    return logits.grad
