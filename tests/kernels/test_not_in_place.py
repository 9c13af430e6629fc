"""What a kernel returns was not written in place: the compiler of torch 2.11 takes the gradient of
such an output for zero, without a word, on a CPU and on a GPU."""

import pytest
import torch

from regdrop.kernels.chunked import chunked_kernel
from regdrop.kernels.closed_form import closed_form_sum, closed_form_terms
from regdrop.kernels.target import Target


def make(num_ignored: int, label_smoothing: float) -> tuple[torch.Tensor, Target]:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7, requires_grad=True)
    valid = torch.arange(5) >= num_ignored if num_ignored else None
    target = Target(torch.arange(5), None, None, label_smoothing, valid)
    return logits, target


@pytest.mark.parametrize("num_ignored", [0, 2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_terms_are_not_written_in_place(num_ignored, label_smoothing):
    logits, target = make(num_ignored, label_smoothing)
    nll, kl, _ = chunked_kernel().forward(logits.detach(), target)
    assert (nll._version, kl._version) == (0, 0)
    terms = closed_form_terms(logits, target, chunked_kernel(), backward_passes=3, inplace=False)
    assert [term._version for term in terms] == [0, 0]


@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.5, 2.0), (None, 2.0), (0.5, None)])
def test_sums_are_not_written_in_place(weights):
    logits, target = make(0, 0.0)
    nll_weight, kl_weight = weights
    sums = closed_form_sum(
        logits,
        target,
        chunked_kernel(),
        nll_weight=nll_weight,
        kl_weight=kl_weight,
        backward_passes=3,
        inplace=False,
    )
    assert [term._version for term in sums] == [0, 0, 0]
