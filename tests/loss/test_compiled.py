"""A loss compiled with the layer before it has the value and the gradient of the plain one.

The compiler of torch 2.11 gives a zero gradient to outputs that were written in place. That of 2.13
does not: with it `tests/kernels/test_not_in_place.py` holds what is needed. The graph is traced
here and not compiled further, which needs no C++ compiler.
"""

from itertools import product

import pytest
import torch

from regdrop import rdrop_cross_entropy

REDUCTIONS = ("mean", "sum", "none")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reduction", "inplace", "backward_passes"),
    [*product(REDUCTIONS, (False, True), (None, 1))],
)
@pytest.mark.parametrize(
    ("dtype", "label_smoothing"), [(torch.float32, 0.0), (torch.bfloat16, 0.1)]
)
def test_a_compiled_loss_has_the_gradient_of_the_plain_one(
    reduction, inplace, backward_passes, dtype, label_smoothing
):
    torch.manual_seed(0)
    logits = torch.randn(16, 7).to(dtype)
    target = torch.randint(0, 7, (8,))
    target[1] = -100
    torch._dynamo.reset()

    def loss(x):
        output = rdrop_cross_entropy(
            x * 2,
            target,
            alpha=2.0,
            reduction=reduction,
            inplace=inplace,
            label_smoothing=label_smoothing,
            backward_passes=backward_passes,
        )
        return output.loss.sum()

    values, gradients = [], []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 5, 3), (8, 5, 3), (2, 5, 3, 2)])
@pytest.mark.parametrize(
    "options",
    [{}, {"backward_passes": 1}, {"reduction": "none"}, {"unlabelled_index": -1}],
)
def test_classes_may_be_anywhere_in_memory(shape, options):
    """One item alone is not copied to have its classes last."""
    logits = torch.randn(shape, requires_grad=True)
    target = torch.randint(0, 5, (shape[0] // 2, *shape[2:]))

    def loss(x):
        return rdrop_cross_entropy(x, target, alpha=1.0, class_dim=1, **options).loss.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    gradients = (torch.autograd.grad(function(logits), logits) for function in (compiled, loss))
    torch.testing.assert_close(*gradients)
