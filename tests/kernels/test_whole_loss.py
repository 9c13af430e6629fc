"""One operation for the whole loss: of impl="cpp" alone, and for the tensors that it takes."""

import pytest
import torch

from regdrop import rdrop_cross_entropy
from regdrop.kernels import cpp_rows, whole_loss

LOGITS = torch.arange(20.0).view(4, 5)
CLASSES = torch.tensor([1, 2])
WEIGHT = torch.ones(5)


@pytest.fixture
def calls(monkeypatch):
    """Let the operation note that it was called; nothing is built."""
    found = []
    monkeypatch.setattr(cpp_rows, "whole_loss", lambda *arguments, **options: found.append(options))
    return found


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_usual_tensors_take_it(calls, weight):
    whole_loss(LOGITS, CLASSES, weight, impl="cpp", num_passes=2)
    assert calls == [{"num_passes": 2}]


@pytest.mark.parametrize(
    ("logits", "classes", "weight"),
    [
        (LOGITS, CLASSES.int(), None),
        (LOGITS.t().contiguous().t(), CLASSES, None),
        (LOGITS, torch.tensor([1, 0, 2, 0])[::2], None),
        (torch._neg_view(LOGITS), CLASSES, None),
        (LOGITS.to("meta"), CLASSES, None),
        (LOGITS, CLASSES, WEIGHT.clone().requires_grad_()),
    ],
    ids=[
        "int32",
        "logits across",
        "classes apart",
        "negated",
        "another device",
        "weight's gradient",
    ],
)
def test_other_tensors_do_not(calls, logits, classes, weight):
    assert whole_loss(logits, classes, weight, impl="cpp", num_passes=2) is None
    assert calls == []


@pytest.mark.parametrize("impl", ["auto", "chunked", "eager", "triton", "compiled"])
def test_no_other_implementation_takes_it(calls, impl):
    assert whole_loss(LOGITS, CLASSES, None, impl=impl) is None
    if impl in ("auto", "chunked", "eager"):
        assert rdrop_cross_entropy(LOGITS, CLASSES, alpha=1.0, impl=impl).loss.isfinite()
    assert calls == []


def test_forward_mode_does_not(calls):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(LOGITS, torch.ones_like(LOGITS))
        assert whole_loss(dual, CLASSES, None, impl="cpp") is None
    assert calls == []
