"""The implementations of the cross-entropy form, as parameters of a test on the CPU."""

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    _why_no_triton = "triton is not installed"
elif torch.cuda.is_available():
    _why_no_triton = "Triton is not interpreted beside a GPU; tests/kernels runs it there"
else:
    _why_no_triton = ""

TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(_why_no_triton != "", reason=_why_no_triton)
)
