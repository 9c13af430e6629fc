"""`torch.func`: gradients of functions and of each sample, second derivatives; or a refusal."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, vmap

from regdrop import (
    RDropConfig,
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_l1_loss,
    rdrop_mse_loss,
    rdrop_smooth_l1_loss,
    rdrop_step,
    repeat_batch,
    symmetric_kl,
)

CLASSES = torch.tensor([1, 2, -100, 4])
NUMBERS = torch.rand(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WEIGHT = torch.linspace(0.5, 2, 5, dtype=torch.float64)
LOSSES = {
    "classes": (partial(rdrop_cross_entropy, alpha=1.3), CLASSES),
    "weighted": (
        partial(
            rdrop_cross_entropy, alpha=1.3, weight=WEIGHT, label_smoothing=0.1, unlabelled_index=-1
        ),
        torch.tensor([1, -1, -100, 4]),
    ),
    "none": (partial(rdrop_cross_entropy, alpha=1.3, reduction="none"), CLASSES),
    "one backward": (partial(rdrop_cross_entropy, alpha=1.3, backward_passes=1), CLASSES),
    "probabilities": (partial(rdrop_cross_entropy, alpha=1.3), NUMBERS.softmax(-1)),
    "divergence": (lambda x, target: symmetric_kl(x), CLASSES),
    "bce": (partial(rdrop_binary_cross_entropy_with_logits, alpha=1.3), NUMBERS),
    "mse": (partial(rdrop_mse_loss, alpha=1.3, backward_passes=1), NUMBERS),
    "l1": (partial(rdrop_l1_loss, alpha=1.3, mask=NUMBERS > 0.3), NUMBERS),
    "smooth_l1": (partial(rdrop_smooth_l1_loss, alpha=1.3), NUMBERS),
}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(loss, x, target):
    output = loss(x, target)
    return (output if isinstance(output, torch.Tensor) else output.loss).sum()


def gradient(loss, x, target):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(total(loss, leaf, target), leaf)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_a_function(name):
    loss, target = LOSSES[name]
    x = numbers(8, 5)
    expected = gradient(loss, x, target)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(grad(partial(total, loss))(x, target), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_several_batches_at_once(name):
    loss, target = LOSSES[name]
    x = numbers(3, 8, 5)
    found = vmap(grad(partial(total, loss)), in_dims=(0, None))(x, target)
    torch.testing.assert_close(found, torch.stack([gradient(loss, part, target) for part in x]))
    targets = torch.stack([target, target.flip(0), target])
    found = vmap(grad(partial(total, loss)))(x, targets)
    torch.testing.assert_close(found[1], gradient(loss, x[1], targets[1]))


@pytest.mark.parametrize("name", ["classes", "probabilities", "divergence", "bce"])
def test_second_derivative(name):
    loss, target = LOSSES[name]
    x, step = numbers(8, 5), 1e-5 * numbers(8, 5, seed=2)
    found = hessian(partial(total, loss))(x, target)
    change = gradient(loss, x + step, target) - gradient(loss, x - step, target)
    torch.testing.assert_close((found * step).sum((-2, -1)) * 2, change, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("by_step", [False, True])
def test_gradient_of_each_sample(by_step):
    """As for private learning, or to weigh samples: that of a batch is their mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    x, target = numbers(6, 4), torch.randint(0, 5, (6,))
    # Two passes that differ without a random number.
    shift = torch.tensor([[0.0], [0.3]], dtype=torch.float64)

    def forward(weights, stacked):
        by = shift.repeat_interleave(len(stacked) // 2, 0)
        return functional_call(model, weights, (stacked + by,))

    def loss(weights, samples, classes):
        if not by_step:
            logits = forward(weights, repeat_batch(samples))
            return rdrop_cross_entropy(logits, classes, alpha=1.0).loss
        return rdrop_step(
            partial(forward, weights), samples, classes, config=RDropConfig(alpha=1.0), step=0
        ).loss

    def loss_of_one(weights, sample, its_class):
        return loss(weights, sample[None], its_class[None])

    weights = dict(model.named_parameters())
    samples = vmap(grad(loss_of_one), in_dims=(None, 0, 0))(weights, x, target)
    whole = grad(loss)(weights, x, target)
    for name, expected in whole.items():
        assert samples[name].shape == (6, *expected.shape)
        torch.testing.assert_close(samples[name].mean(0), expected)


@pytest.mark.parametrize("impl", ["chunked", "compiled", "cpp"])
def test_other_kernels_are_refused_by_name(impl):
    def loss(x):
        return rdrop_cross_entropy(x, CLASSES, alpha=1.0, impl=impl).loss

    message = f"impl='{impl}' has no rule for torch.func .*; use impl='auto' or 'eager'"
    with pytest.raises(ValueError, match=message):
        grad(loss)(numbers(8, 5))
    with pytest.raises(ValueError, match=message):
        vmap(loss)(numbers(3, 8, 5))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_fused_layer_is_refused_by_name(reduction):
    def loss(hidden):
        options = {"alpha": 1.0, "reduction": reduction}
        return linear_rdrop_cross_entropy(hidden, numbers(5, 6), CLASSES, **options).loss.sum()

    with pytest.raises(ValueError, match=r"has no rule for torch.func .* take rdrop_cross_entropy"):
        grad(loss)(numbers(8, 6))
