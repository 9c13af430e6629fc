"""What is refused, and what does not underflow, whatever the reduction is."""

import pytest
import torch

from regdrop import (
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_mse_loss,
)

ELEMENTWISE = [rdrop_binary_cross_entropy_with_logits, rdrop_mse_loss]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_class_that_a_linear_layer_masks_in_one_pass_is_refused(reduction):
    hidden = torch.tensor([[1.0, 0.0], [1.0, -1e38]])
    weight = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.5, 1e38]])  # the product is -inf
    with pytest.raises(ValueError, match="the KL is infinite"):
        linear_rdrop_cross_entropy(
            hidden, weight, torch.tensor([1]), alpha=1.0, reduction=reduction
        )


@pytest.mark.parametrize("loss", ELEMENTWISE)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 0}, "num_items must be finite and above 0, got 0"),
        ({"num_items": 3, "reduction": "sum"}, "num_items is only used with reduction='mean'"),
    ],
)
def test_counts_of_elements_are_checked(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(4, 3), torch.zeros(2, 3), alpha=1.0, **options)


def test_small_upstream_gradients_of_items_do_not_underflow_in_float16():
    """The gradients of the logits are below float16's least number; those of the weight are not."""
    generator = torch.Generator().manual_seed(0)
    hidden = 64 * torch.randn(2 * 512, 6, generator=generator).half()
    weight = torch.randn(29, 6, generator=generator).half() / 64
    target = torch.randint(29, (512,), generator=generator)

    def gradient(dtype):
        leaf = weight.to(dtype).requires_grad_()
        loss = linear_rdrop_cross_entropy(
            hidden.to(dtype), leaf, target, alpha=1.0, reduction="none"
        ).loss
        return torch.autograd.grad(loss, leaf, torch.full_like(loss, 2.0**-26))[0].double()

    exact = gradient(torch.float64)
    assert (gradient(torch.float16) - exact).abs().max() < 0.02 * exact.abs().max()
