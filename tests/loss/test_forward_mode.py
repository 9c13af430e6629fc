"""Forward-mode differentiation is right, or refused by name."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from regdrop import (
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_mse_loss,
    rdrop_smooth_l1_loss,
    symmetric_kl,
)
from regdrop.loss import adaptive_softmax_terms

TARGET = torch.tensor([1, 2, -100, 4])
NUMBERS = torch.rand(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LOSSES = {
    "auto": lambda x: rdrop_cross_entropy(x, TARGET, alpha=1.3).loss,
    "eager": lambda x: rdrop_cross_entropy(x, TARGET, alpha=1.3, impl="eager").loss,
    "probabilities": lambda x: rdrop_cross_entropy(x, NUMBERS.softmax(-1), alpha=1.3).loss,
    "divergence": symmetric_kl,
    "bce": lambda x: rdrop_binary_cross_entropy_with_logits(x, NUMBERS, alpha=1.3).loss,
    "mse": lambda x: rdrop_mse_loss(x, NUMBERS, alpha=1.3).loss,
    "smooth_l1": lambda x: rdrop_smooth_l1_loss(x, NUMBERS, alpha=1.3).loss,
}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_dual_numbers(loss, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent


def by_functions(loss, x, tangent):
    return torch.func.jvp(loss, (x,), (tangent,))[1]


def product(loss, x, tangent):
    """Return the derivative along a tangent from the gradient."""
    leaf = x.clone().requires_grad_()
    return (torch.autograd.grad(loss(leaf), leaf)[0] * tangent).sum()


@pytest.mark.parametrize("name", LOSSES)
def test_derivative_is_the_gradient_along_the_tangent(name):
    loss, x, tangent = LOSSES[name], numbers(8, 5), numbers(8, 5, seed=2)
    expected = product(loss, x, tangent)
    assert expected.abs() > 1e-3
    torch.testing.assert_close(by_functions(loss, x, tangent), expected)
    torch.testing.assert_close(by_dual_numbers(loss, x, tangent), expected)
    torch.testing.assert_close(
        by_dual_numbers(loss, x.clone().requires_grad_(), tangent).detach(), expected
    )
    torch.testing.assert_close((torch.func.jacfwd(loss)(x) * tangent).sum(), expected)


def test_of_a_target():
    x, tangent = numbers(8, 5), numbers(4, 5, seed=2)

    def loss(target):
        return rdrop_cross_entropy(x, target, alpha=1.0).loss

    soft = NUMBERS.softmax(-1)
    expected = product(loss, soft, tangent)
    torch.testing.assert_close(by_dual_numbers(loss, soft, tangent), expected)


def test_of_an_adaptive_softmax():
    torch.manual_seed(0)
    softmax = nn.AdaptiveLogSoftmaxWithLoss(6, 5, [2, 3]).double()
    x, tangent = numbers(8, 6), numbers(8, 6, seed=2)

    def loss(hidden):
        terms = adaptive_softmax_terms(hidden, TARGET, softmax, num_passes=2)
        return (terms.nll + terms.kl).sum()

    torch.testing.assert_close(by_dual_numbers(loss, x, tangent), product(loss, x, tangent))


@pytest.mark.parametrize(
    "differentiate", [by_dual_numbers, lambda f, x, t: torch.func.jvp(f, (x,), (t,))]
)
def test_what_has_none_is_named(differentiate):
    x = numbers(8, 5)

    def refuses(message, loss):
        with pytest.raises(ValueError, match=message):
            differentiate(loss, x, numbers(8, 5, seed=2))

    options = {"alpha": 1.0}
    for impl in ("chunked", "cpp", "compiled"):
        refuses(
            f"impl='{impl}' has no forward-mode derivative; use impl='auto' or 'eager'",
            lambda z, impl=impl: rdrop_cross_entropy(z, TARGET, impl=impl, **options).loss,
        )
    refuses(
        "backward_passes must be None or num_passes=2 in forward-mode",
        lambda z: rdrop_cross_entropy(z, TARGET, backward_passes=1, **options).loss,
    )
    refuses(
        "backward_passes must be None or num_passes=2 in forward-mode",
        lambda z: rdrop_mse_loss(z, NUMBERS, backward_passes=1, **options).loss,
    )


@pytest.mark.parametrize("differentiate", [by_dual_numbers, by_functions])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_fused_layer_has_none(differentiate, reduction):
    hidden, weight = numbers(8, 5), numbers(6, 5)

    def loss(hidden, weight):
        options = {"alpha": 1.0, "reduction": reduction}
        return linear_rdrop_cross_entropy(hidden, weight, TARGET, **options).loss

    message = "fused linear layer has no forward-mode derivative; take rdrop_cross_entropy of"
    with pytest.raises(ValueError, match=message):
        differentiate(lambda x: loss(x, weight), hidden, numbers(8, 5, seed=2))
    with pytest.raises(ValueError, match=message):
        differentiate(lambda x: loss(hidden, x), weight, numbers(6, 5, seed=2))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_second_derivative_of_the_closed_form_is_refused(reduction, is_fused):
    x, weight = numbers(8, 5).requires_grad_(), numbers(6, 5)
    scale = torch.tensor(2.0, dtype=x.dtype, requires_grad=True)
    loss, layer = (linear_rdrop_cross_entropy, [weight]) if is_fused else (rdrop_cross_entropy, [])
    output = loss(x * x, *layer, TARGET, alpha=1.0, reduction=reduction).loss.sum() * scale
    (once,) = torch.autograd.grad(output, x, retain_graph=True)
    (gradient,) = torch.autograd.grad(output, x, create_graph=True)
    torch.testing.assert_close(gradient.detach(), once)
    penalty = x.sum() + gradient.square().sum()
    for differentiate in (
        lambda: penalty.backward(retain_graph=True),
        lambda: penalty.backward(inputs=[x], retain_graph=True),
        lambda: torch.autograd.grad(penalty, x, retain_graph=True),
        lambda: torch.autograd.grad(gradient.sum(), scale, allow_unused=True),
    ):
        with pytest.raises(RuntimeError, match=r"no second derivative; use .* or RDropConfig"):
            differentiate()
    # A gradient may be written to, as by clipping.
    assert gradient.mul_(2.0) is gradient
