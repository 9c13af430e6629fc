"""The denominators counted from the target alone are those of the terms."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from regdrop.kernels import Projection
from regdrop.loss import (
    ItemTerms,
    adaptive_softmax_terms,
    binary_cross_entropy_terms,
    combine_terms,
    count_items,
    cross_entropy_terms,
    fraternal_terms,
    l1_terms,
    linear_cross_entropy_terms,
    mse_terms,
    smooth_l1_terms,
)

CLASSES, FEATURES = 7, 3
WEIGHT = torch.linspace(0.1, 2.0, CLASSES)


def outputs(target, width):
    return torch.randn(2 * target.shape[0], *target.shape[1:], width)


def linear():
    projection = Projection(torch.randn(CLASSES, FEATURES))
    return partial(linear_cross_entropy_terms, projection=projection)


def adaptive():
    softmax = nn.AdaptiveLogSoftmaxWithLoss(FEATURES, CLASSES, [2, 4])
    return partial(adaptive_softmax_terms, softmax=softmax)


FAMILIES = {
    "cross entropy": (cross_entropy_terms, CLASSES),
    "class weights": (partial(cross_entropy_terms, weight=WEIGHT), CLASSES),
    "fraternal": (partial(fraternal_terms, weight=WEIGHT), CLASSES),
    "linear": (linear(), FEATURES),
    "linear with class weights": (partial(linear(), weight=WEIGHT), FEATURES),
    "adaptive softmax": (adaptive(), FEATURES),
}


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(
    target=st.lists(st.sampled_from([-100, *range(CLASSES)]), min_size=1, max_size=8),
    ignore_index=st.sampled_from([-100, 2]),
)
def test_of_classes(name, target, ignore_index):
    family, width = FAMILIES[name]
    terms = partial(family, ignore_index=ignore_index)
    target = torch.tensor(target)
    target[target == -100] = ignore_index
    counts = count_items(terms, target)
    found = terms(outputs(target, width), target, num_passes=2)
    valid = target[target != ignore_index]
    weighs = "weight" in getattr(family, "keywords", {})
    expected = WEIGHT[valid].sum().item() if weighs else len(valid)
    assert counts.kl.item() == found.kl_count.item() == len(valid)
    assert counts.nll.item() == found.nll_count.item() == pytest.approx(expected)


def test_of_probabilities():
    target = torch.rand(3, 4, CLASSES).softmax(-1)
    terms = partial(cross_entropy_terms, weight=WEIGHT)
    found = terms(torch.randn(6, 4, CLASSES), target, num_passes=2)
    assert [c.item() for c in count_items(terms, target)] == [12, 12]
    assert (found.nll_count.item(), found.kl_count.item()) == (12, 12)


@pytest.mark.parametrize(
    "terms", [binary_cross_entropy_terms, mse_terms, l1_terms, smooth_l1_terms]
)
@settings(max_examples=10, deadline=None)
@given(mask=st.one_of(st.none(), st.lists(st.booleans(), min_size=4, max_size=4)))
def test_of_elements(terms, mask):
    # -100.0 marks nothing: it is a number like any other.
    target = torch.full((4, 3), 1.0 if terms is binary_cross_entropy_terms else -100.0)
    mask = None if mask is None else torch.tensor(mask)[:, None]
    bound = partial(terms, mask=mask)
    counts = count_items(bound, target)
    found = bound(torch.randn(8, 3), target, num_passes=2)
    expected = 12 if mask is None else 3 * mask.sum().item()
    assert counts.nll.item() == counts.kl.item() == expected
    assert found.nll_count.item() == found.kl_count.item() == expected


def test_an_unsigned_target_has_no_index_of_minus_100():
    target = torch.tensor([156, 3], dtype=torch.uint8)  # 156 is -100 in eight bits
    assert count_items(cross_entropy_terms, target).kl.item() == 2


def test_options_of_an_inner_partial_count_too():
    terms = partial(partial(cross_entropy_terms, ignore_index=1), label_smoothing=0.1)
    assert count_items(terms, torch.tensor([0, 1, -100])).kl.item() == 2
    outer = partial(terms, ignore_index=-100)
    assert count_items(outer, torch.tensor([0, 1, -100])).kl.item() == 2


def test_of_terms_from_elsewhere_nobody_knows():
    assert count_items(lambda outputs, target, num_passes: None, torch.zeros(3)) is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6,), (3, 1), ()])
def test_one_likelihood_and_one_divergence_an_item(reduction, shape):
    count = torch.tensor(3.0)
    terms = ItemTerms(torch.ones(shape), torch.ones(3), nll_count=count, kl_count=count)
    with pytest.raises(ValueError, match=r"got nll of shape .* and kl of shape \(3,\)"):
        combine_terms(terms, alpha=1.0, num_passes=2, reduction=reduction)
