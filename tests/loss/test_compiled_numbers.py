"""Numbers that change from call to call: a compiled loss makes one graph more, as one by hand does.

With dynamic=True it makes one in all.
"""

from functools import partial

import pytest
import torch

from graphs import count_graphs
from regdrop import (
    RDropCrossEntropyLoss,
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_mse_loss,
)

pytestmark = pytest.mark.slow

CLASSES, NUMBERS = torch.tensor([3, 0, -100, 1]), torch.tensor([[0.0, 1, 1, 0, 1]] * 4)
WEIGHT = torch.linspace(-1, 1, 20).view(5, 4)


def changed_by_module(logits, alpha):
    module = RDropCrossEntropyLoss(1.0)
    module.alpha = alpha
    return module(logits, CLASSES).loss


def classes(logits, value, *, name, **options):
    options = {"alpha": 1.0, **options, name: value}
    return rdrop_cross_entropy(logits, CLASSES, **options).loss


def linear(hidden, value, *, name, **options):
    options = {"alpha": 1.0, **options, name: value}
    return linear_rdrop_cross_entropy(hidden, WEIGHT, CLASSES, **options).loss


FUNCTIONS = {
    "alpha": partial(classes, name="alpha"),
    "alpha of a module": changed_by_module,
    "alpha of items": partial(classes, name="alpha", reduction="none"),
    "label smoothing": partial(classes, name="label_smoothing"),
    "number of items": partial(classes, name="num_items"),
    "alpha of labels": lambda x, alpha: (
        rdrop_binary_cross_entropy_with_logits(x, NUMBERS, alpha=alpha).loss
    ),
    "alpha of numbers": lambda x, alpha: rdrop_mse_loss(x, NUMBERS, alpha=alpha).loss,
    "alpha of a layer": partial(linear, name="alpha"),
    "number of items of a layer": partial(linear, name="num_items"),
}


@pytest.mark.parametrize(
    ("dynamic", "expected"), [(None, [1, 2, 2, 2]), (True, [1, 1, 1, 1])], ids=["auto", "dynamic"]
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_number_that_changes_makes_few_graphs(name, dynamic, expected):
    width = 4 if "layer" in name else 5
    logits = torch.randn(8, width, requires_grad=True)
    calls = [(logits, value) for value in (0.1, 0.2, 0.3, 0.4)]
    assert count_graphs(FUNCTIONS[name], calls, fullgraph=True, dynamic=dynamic) == expected


@pytest.mark.parametrize("name", ["alpha", "label smoothing", "alpha of a layer"])
def test_it_enters_value_and_gradient(name):
    function = FUNCTIONS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for value in (0.1, 0.2, 0.3):
        logits = torch.randn(8, 4 if "layer" in name else 5, requires_grad=True)
        found, expected = (f(logits, value) for f in (compiled, function))
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
        torch.testing.assert_close(*grads)
