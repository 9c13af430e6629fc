"""What is refused, and what does not underflow, whatever the reduction is."""

from functools import partial

import pytest
import torch

from regdrop import (
    RDropCrossEntropyLoss,
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_mse_loss,
)
from regdrop.loss import combine_terms, cross_entropy_terms, is_counted

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


@pytest.mark.parametrize("loss", ELEMENTWISE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_alpha_the_papers_scale_counts_every_pass(loss, reduction):
    generator = torch.Generator().manual_seed(0)
    outputs, target = torch.randn(3, 2, 4, generator=generator), torch.ones(2, 4)
    options = {"alpha": 0.0, "reduction": reduction}
    found = loss(outputs.flatten(0, 1), target, num_passes=3, scale="sum", **options).loss
    expected = sum(loss(x, target, num_passes=1, **options).loss for x in outputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing must be"),
        ({"unlabelled_index": -100}, "unlabelled_index must"),
        ({"reduction": "total"}, "reduction must be"),
    ],
)
def test_a_module_refuses_its_options_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        RDropCrossEntropyLoss(1.0, **options)


@pytest.mark.parametrize("name", ["nll_count", "kl_count"])
def test_a_count_of_terms_is_one_number(name):
    terms = cross_entropy_terms(torch.randn(6, 4), torch.tensor([0, 3, 1]), num_passes=2)
    with pytest.raises(ValueError, match=rf"terms must have {name} as a scalar, .* \(3,\)"):
        combine_terms(terms._replace(**{name: torch.ones(3)}), alpha=1.0, num_passes=2)
    expected = combine_terms(terms, alpha=1.0, num_passes=2)
    for count in (3, 3.0, torch.tensor([3])):
        found = combine_terms(terms._replace(**{name: count}), alpha=1.0, num_passes=2)
        torch.testing.assert_close(found, expected)


def test_terms_from_elsewhere_are_not_counted():
    assert is_counted(cross_entropy_terms)
    assert is_counted(partial(cross_entropy_terms, ignore_index=0))
    assert not is_counted(lambda output, target, **options: None)
