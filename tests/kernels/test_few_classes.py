"""Rows of few classes, which the form in plain torch lays out with the classes first."""

import pytest
import torch

from regdrop import rdrop_cross_entropy, symmetric_kl
from regdrop.kernels import chunked

ITEMS = 200


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("class_dim", [-1, 1])
@pytest.mark.parametrize("num_classes", [1, 2, 5, chunked._FEW_CLASSES])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"num_passes": 3, "backward_passes": 2},
        {"inplace": True},
        {"reduction": "none"},
    ],
    ids=str,
)
def test_they_give_the_loss_and_gradient_of_the_definition(options, num_classes, class_dim):
    passes = options.get("num_passes", 2)
    logits = numbers(passes * ITEMS, 3, num_classes)
    if num_classes > 1 and "label_smoothing" not in options:
        logits[7::ITEMS, 1, 0] = -torch.inf  # masked in all passes
    target = torch.arange(ITEMS * 3).view(ITEMS, 3) % num_classes
    target[7, 1] = num_classes - 1
    target[0, 0] = -100
    results = []
    for impl in ("chunked", "eager"):
        leaf = logits.movedim(-1, class_dim).clone().requires_grad_()
        given = {"alpha": 1.3, "class_dim": class_dim, "impl": impl, **options}
        if impl == "eager":
            given.pop("inplace", None)
        output = rdrop_cross_entropy(leaf * 1, target, **given)
        output.loss.sum().backward()
        results.append((*output, leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_divergence_alone():
    logits = numbers(2 * ITEMS, 3).requires_grad_()
    p, q = logits.log_softmax(-1).chunk(2)
    expected = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    found = symmetric_kl(logits)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(kl, logits)[0] for kl in (found, expected)]
    torch.testing.assert_close(*grads)
