"""What a forward has saved is unpacked once: a checkpoint refuses more, offloading copies again."""

from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from implementations import CPP, HAS_COMPILER, TRITON
from regdrop import (
    RDropOutput,
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_l1_loss,
    rdrop_mse_loss,
    rdrop_smooth_l1_loss,
    symmetric_kl,
)
from regdrop.kernels import Projection
from regdrop.loss import (
    combine_terms,
    linear_cross_entropy_loss,
    linear_cross_entropy_terms,
)

ITEMS, CLASSES, FEATURES = 6, 5, 4
COMPILED = pytest.param(
    "compiled",
    marks=[pytest.mark.slow, pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")],
)
KERNELS = ["auto", "eager", "chunked", COMPILED, TRITON, CPP]
TARGET = torch.tensor([1, 0, -100, 4, 2, 3])
UNLABELLED = torch.tensor([1, -1, -100, 4, -1, 3])
WEIGHT = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
PROBABILITIES = torch.linspace(-1, 1, ITEMS * CLASSES, dtype=torch.float64).view(ITEMS, -1)
PROBABILITIES = PROBABILITIES.softmax(-1)
# Of classes: the target, and options.
OPTIONS = {
    "mean": (TARGET, {}),
    "sum": (TARGET, {"reduction": "sum", "scale": "sum"}),
    "none": (TARGET, {"reduction": "none"}),
    "weights": (TARGET, {"weight": WEIGHT, "label_smoothing": 0.1}),
    "weights of items": (TARGET, {"weight": WEIGHT, "reduction": "none"}),
    "unlabelled": (UNLABELLED, {"unlabelled_index": -1}),
    "num_items": (TARGET, {"num_items": 17, "num_weight": torch.tensor(13.0)}),
    "one backward": (TARGET, {"backward_passes": 1}),
    "probabilities": (PROBABILITIES, {"label_smoothing": 0.1}),
    "probabilities of items": (PROBABILITIES, {"reduction": "none"}),
}
ELEMENTWISE = {
    "bce": rdrop_binary_cross_entropy_with_logits,
    "mse": rdrop_mse_loss,
    "l1": partial(rdrop_l1_loss, backward_passes=1),
    "smooth_l1": partial(rdrop_smooth_l1_loss, reduction="none"),
}


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def by_classes(
    hidden, weight, target, *, alpha, bias, block_size, reduction="mean", num_items=None, **options
):
    """Return the loss of a linear layer by blocks of classes."""
    options |= {"projection": Projection(weight, bias, block_size=block_size), "num_passes": 2}
    if reduction == "none":
        terms = linear_cross_entropy_terms(hidden, target, **options)
        return combine_terms(terms, alpha=alpha, num_passes=2, reduction=reduction)
    options |= {"alpha": alpha, "reduction": reduction, "num_items": num_items}
    return linear_cross_entropy_loss(hidden, target, **options)


LAYERS = {
    "chunks": partial(linear_rdrop_cross_entropy, chunk_size=2),
    "blocks": partial(by_classes, block_size=2),
}


def of_logits(target, impl, inplace=False, **options):
    """Return a function from leaves to a loss, behind an operation of its own."""

    def loss(x):
        logits = x * 1.5  # does not keep its output, which may be overwritten
        options.setdefault("alpha", 1.3)
        return rdrop_cross_entropy(logits, target, impl=impl, inplace=inplace, **options).loss

    return loss


def gradients(loss, leaves, **options):
    value = loss(*leaves)
    items = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return torch.autograd.grad(value, leaves, items, **options)


def checkpointed(loss):
    return partial(checkpoint, loss, use_reentrant=False)


class Unpacked:
    """How often each saved tensor was unpacked."""

    def __init__(self):
        self.times = []

    def hooks(self):
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor):
        self.times.append(0)
        return len(self.times) - 1, tensor

    def unpack(self, packed):
        index, tensor = packed
        self.times[index] += 1
        return tensor


def assert_unpacked_once(loss, leaves):
    """Check it without and with a graph of the gradient, and the gradients in a checkpoint."""
    expected = gradients(loss, leaves)
    for create_graph in (False, True):
        unpacked = Unpacked()
        with unpacked.hooks():
            found = gradients(loss, leaves, create_graph=create_graph)
        torch.testing.assert_close(found, expected)
        assert unpacked.times
        assert set(unpacked.times) <= {0, 1}
        # A gradient that has a graph needs what it depends on.
        assert not create_graph or 1 in unpacked.times
        torch.testing.assert_close(
            gradients(checkpointed(loss), leaves, create_graph=create_graph), expected
        )


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_of_logits(impl, name, inplace):
    if impl == "eager" and inplace:
        pytest.skip("refused")
    target, options = OPTIONS[name]
    loss = of_logits(target, impl, inplace, **options)
    assert_unpacked_once(loss, (numbers(2 * ITEMS, CLASSES),))


@pytest.mark.parametrize("impl", ["chunked", CPP])
def test_a_second_backward_unpacks_once_more(impl):
    """The first has given away the gradient that the forward computed."""
    x, unpacked = numbers(2 * ITEMS, CLASSES), Unpacked()
    with unpacked.hooks():
        loss = of_logits(TARGET, impl)(x)
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        before = list(unpacked.times)
        (second,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(second, first)
    assert {b - a for a, b in zip(before, unpacked.times, strict=True)} <= {0, 1}


@pytest.mark.parametrize("way", LAYERS)
@pytest.mark.parametrize("name", ["mean", "none", "unlabelled", "num_items", "one backward"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_of_a_linear_layer(way, name, has_bias):
    target, options = OPTIONS[name]
    options = {key: value for key, value in options.items() if key != "num_weight"}

    def loss(hidden, weight, bias=None):
        return LAYERS[way](hidden, weight, target, bias=bias, alpha=1.3, **options).loss

    leaves = numbers(2 * ITEMS, FEATURES), numbers(CLASSES, FEATURES)
    assert_unpacked_once(loss, (*leaves, numbers(CLASSES)) if has_bias else leaves)


@pytest.mark.parametrize("way", LAYERS)
def test_a_second_backward_of_a_linear_layer_unpacks_once_more(way):
    leaves = numbers(2 * ITEMS, FEATURES), numbers(CLASSES, FEATURES)
    unpacked = Unpacked()
    with unpacked.hooks():
        loss = LAYERS[way](*leaves, TARGET, bias=None, alpha=1.3).loss
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        before = list(unpacked.times)
        second = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(second, first)
    assert {b - a for a, b in zip(before, unpacked.times, strict=True)} <= {0, 1}


@pytest.mark.parametrize("name", [*ELEMENTWISE, "divergence"])
def test_of_elements_and_of_the_divergence_alone(name):
    x, target = numbers(2 * ITEMS, CLASSES), PROBABILITIES

    def loss(x):
        if name == "divergence":
            return symmetric_kl(x * 1.5)
        output: RDropOutput = ELEMENTWISE[name](x * 1.5, target, alpha=1.3)
        return output.loss

    expected = gradients(loss, (x,))
    torch.testing.assert_close(gradients(checkpointed(loss), (x,)), expected)


@pytest.mark.parametrize("impl", ["chunked", CPP])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused_in_a_checkpoint_too(impl, reduction):
    x = numbers(2 * ITEMS, CLASSES)
    loss = of_logits(TARGET, impl, reduction=reduction)
    (gradient,) = gradients(checkpointed(loss), (x,), create_graph=True)
    with pytest.raises(RuntimeError, match="gives no second derivative"):
        gradient.sum().backward()
