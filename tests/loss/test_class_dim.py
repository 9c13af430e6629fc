"""Logits whose classes are not the last dimension, as in torch's own layout (batch, C, ...)."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from implementations import CPP, TRITON
from regdrop import RDropCrossEntropyLoss, rdrop_cross_entropy, symmetric_kl
from regdrop.loss import count_items, cross_entropy_terms, fraternal_terms

ALL = ["eager", "chunked", TRITON, CPP]
BATCH, CLASSES, HEIGHT, WIDTH = 2, 3, 4, 5


def make(kind, num_passes=2):
    generator = torch.Generator().manual_seed(0)
    shape = (num_passes * BATCH, CLASSES, HEIGHT, WIDTH)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (BATCH, HEIGHT, WIDTH), generator=generator)
    if kind == "probabilities":
        soft = torch.rand(BATCH, CLASSES, HEIGHT, WIDTH, generator=generator).double()
        return logits, soft.softmax(1)
    target[0, 1, :2] = -100
    return logits, target


def moved(target):
    return target.movedim(1, -1) if target.is_floating_point() else target


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("class_dim", [1, -3])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_is_the_loss_of_moved_classes(impl, class_dim, kind):
    logits, target = make(kind)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    options = {"alpha": 1.3, "weight": weight, "label_smoothing": 0.1, "reduction": "none"}
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    found = rdrop_cross_entropy(leaf, target, class_dim=class_dim, impl=impl, **options)
    expected = rdrop_cross_entropy(other.movedim(1, -1), moved(target), impl="eager", **options)
    assert found.loss.shape == (BATCH, HEIGHT, WIDTH)
    upstream = torch.randn(found.loss.shape).double()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    found.loss.backward(upstream)
    expected.loss.backward(upstream)
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_pass_without_alpha_is_torchs_cross_entropy(kind, reduction):
    logits, target = make(kind, num_passes=1)
    found = rdrop_cross_entropy(
        logits, target, alpha=0.0, num_passes=1, class_dim=1, reduction=reduction
    )
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, target, reduction=reduction))


@pytest.mark.parametrize("impl", ["chunked", TRITON, CPP])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inplace(impl, layout):
    logits, target = make("indices")
    expected = logits.clone().requires_grad_()
    rdrop_cross_entropy(expected, target, alpha=1.0, class_dim=1, impl="eager").loss.backward()
    leaf = logits.to(memory_format=layout, copy=True).requires_grad_()
    stacked = leaf * 1
    rdrop_cross_entropy(
        stacked, target, alpha=1.0, class_dim=1, inplace=True, impl=impl
    ).loss.backward()
    torch.testing.assert_close(leaf.grad, expected.grad)
    # Classes that are last in memory are overwritten where they are.
    overwritten = layout == torch.channels_last
    assert torch.equal(stacked.detach(), leaf.grad if overwritten else logits)


def test_other_losses_of_classes():
    logits, target = make("indices")
    options = {"num_passes": 2}
    found = fraternal_terms(logits, target, class_dim=1, **options)
    expected = fraternal_terms(logits.movedim(1, -1), target, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    mask = target != -100
    for reduction in ("mean", "none"):
        torch.testing.assert_close(
            symmetric_kl(logits, class_dim=1, mask=mask, reduction=reduction),
            symmetric_kl(logits.movedim(1, -1), mask=mask, reduction=reduction),
        )
    module = RDropCrossEntropyLoss(1.0, class_dim=1)
    torch.testing.assert_close(
        module(logits, target).loss,
        rdrop_cross_entropy(logits.movedim(1, -1), target, alpha=1.0).loss,
    )


def test_probabilities_are_counted_without_their_classes():
    _, target = make("probabilities")
    counts = count_items(partial(cross_entropy_terms, class_dim=1), target)
    assert counts.nll.item() == counts.kl.item() == BATCH * HEIGHT * WIDTH


def test_the_right_dimension_is_named():
    logits, target = make("indices")
    with pytest.raises(ValueError, match="with class_dim=-1; class_dim=1 fits"):
        rdrop_cross_entropy(logits, target, alpha=1.0)
    with pytest.raises(ValueError, match="with class_dim=1; class_dim=-1 fits"):
        rdrop_cross_entropy(logits.movedim(1, -1), target, alpha=1.0, class_dim=1)
    _, soft = make("probabilities")
    with pytest.raises(ValueError, match=r"sum to 1 there, .* pass class_dim=1"):
        rdrop_cross_entropy(logits, soft, alpha=1.0)


def test_probabilities_that_sum_to_something_else_are_taken_as_they_are():
    logits, _ = make("probabilities")
    soft = torch.rand(BATCH, CLASSES, HEIGHT, WIDTH, dtype=torch.float64)
    assert torch.isfinite(rdrop_cross_entropy(logits, soft, alpha=1.0).loss)
    # Both fit: the last dimension is the one that was asked for.
    both = torch.full((2, 4, 4), 0.25, dtype=torch.float64)
    assert torch.isfinite(rdrop_cross_entropy(torch.randn(4, 4, 4).double(), both, alpha=1.0).loss)


@pytest.mark.parametrize(
    ("class_dim", "error"), [(0, ValueError), (4, ValueError), (-4, ValueError), (1.0, TypeError)]
)
def test_bad_dimension_is_named(class_dim, error):
    logits, target = make("indices")
    with pytest.raises(error, match="class_dim must"):
        rdrop_cross_entropy(logits, target, alpha=1.0, class_dim=class_dim)
    with pytest.raises(error, match="class_dim must"):
        symmetric_kl(logits, class_dim=class_dim)
