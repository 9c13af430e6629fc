"""What holds where an option is left out, or is counted from the end."""

import pytest
import torch

from regdrop import RDropCrossEntropyLoss, rdrop_cross_entropy

LOGITS = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))  # (2 * batch, C, length)
TARGET = torch.tensor([[0, 1, 4], [3, -100, 2]])


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_logits_stay_readable_after_the_backward(impl):
    leaf = LOGITS.clone().requires_grad_()
    stacked = leaf * 1
    RDropCrossEntropyLoss(1.0, class_dim=1, impl=impl)(stacked, TARGET).loss.backward()
    assert torch.equal(stacked, LOGITS)
    stacked = leaf * 1
    rdrop_cross_entropy(stacked, TARGET, alpha=1.0, class_dim=1, impl=impl).loss.backward()
    assert torch.equal(stacked, LOGITS)


@pytest.mark.parametrize(("from_the_end", "class_dim"), [(-2, 1), (-1, 2)])
def test_the_dimension_of_classes_may_be_counted_from_the_end(from_the_end, class_dim):
    logits = LOGITS if class_dim == 1 else LOGITS.transpose(1, 2)
    found, expected = (
        rdrop_cross_entropy(logits, TARGET, alpha=1.0, class_dim=dim)
        for dim in (from_the_end, class_dim)
    )
    torch.testing.assert_close(found, expected)
