"""Where two features of a loss meet, each with its right value."""

import math

import pytest
import torch

from regdrop import rdrop_binary_cross_entropy_with_logits, rdrop_cross_entropy, rdrop_mse_loss
from regdrop.loss import cross_entropy_terms

WEIGHT = torch.tensor([1.0, 5.0, 0.2])
CLOSED_FORMS = ["chunked", "auto"]


@pytest.mark.parametrize("impl", ["eager", *CLOSED_FORMS])
def test_the_weight_of_ignored_labels_is_not_counted(impl):
    target = torch.tensor([0, -100, 2])
    logits = torch.randn(6, 3, dtype=torch.float64)
    terms = cross_entropy_terms(logits, target, num_passes=2, weight=WEIGHT.double(), impl=impl)
    assert terms.nll_count.item() == pytest.approx(1.2)
    assert terms.kl_count.item() == 2
    output = rdrop_cross_entropy(logits, target, alpha=0.0, weight=WEIGHT.double(), impl=impl)
    passes = [
        torch.nn.functional.cross_entropy(part, target, weight=WEIGHT.double())
        for part in logits.chunk(2)
    ]
    torch.testing.assert_close(output.loss, torch.stack(passes).mean())


@pytest.mark.parametrize("impl", CLOSED_FORMS)
@pytest.mark.parametrize("backward_passes", [None, 1])
def test_probabilities_with_smoothing_and_weights_have_the_eager_gradient(impl, backward_passes):
    target = torch.rand(5, 3, dtype=torch.float64).softmax(-1)
    start = torch.randn(10, 3, dtype=torch.float64)
    gradients = []
    for kind in ("eager", impl):
        logits = start.clone().requires_grad_()
        output = rdrop_cross_entropy(
            logits,
            target,
            alpha=0.7,
            weight=WEIGHT.double(),
            label_smoothing=0.2,
            backward_passes=backward_passes,
            impl=kind,
        )
        output.loss.backward()
        gradients.append((output.loss.detach(), logits.grad))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("impl", ["eager", *CLOSED_FORMS])
def test_a_class_masked_in_one_pass_and_unlikely_in_the_other_is_an_error(impl, flipped):
    """In the other pass its probability is 0 in float32, and its logit is not infinite."""
    logits = torch.tensor([[0.0, -math.inf], [0.0, -200.0]])
    logits = logits.flip(0) if flipped else logits
    with pytest.raises(ValueError, match="the KL is infinite"):
        rdrop_cross_entropy(logits, torch.tensor([0]), alpha=1.0, impl=impl)


def test_a_mask_covers_targets_that_are_no_number():
    mask = torch.tensor([[True], [False]])
    target = torch.tensor([[1.0], [math.nan]])
    logits = torch.zeros(4, 1, requires_grad=True)
    output = rdrop_binary_cross_entropy_with_logits(logits, target, alpha=1.0, mask=mask)
    assert output.loss.item() == pytest.approx(math.log(2))
    output.loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25], [0.0], [-0.25], [0.0]]))

    predicted = torch.tensor([[3.0], [math.nan], [2.0], [math.inf]], requires_grad=True)
    output = rdrop_mse_loss(predicted, target, alpha=1.0, mask=mask)
    assert output.loss.item() == pytest.approx((4 + 1 + 1) / 2)
    output.loss.backward()
    torch.testing.assert_close(predicted.grad, torch.tensor([[3.0], [0.0], [0.0], [0.0]]))
