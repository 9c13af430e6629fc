import pytest
import torch
from torch import nn

from regdrop.loss import adaptive_log_softmax, adaptive_softmax_terms, combine_terms
from regdrop.loss.cross_entropy import cross_entropy_terms

FEATURES, CLASSES = 12, 40


@pytest.fixture
def softmax():
    return nn.AdaptiveLogSoftmaxWithLoss(
        FEATURES, CLASSES, cutoffs=[6, 20], div_value=2.0, head_bias=True
    ).double()


def draw(num_passes=2, items=(4, 5)):
    hidden = torch.randn(
        num_passes * items[0], *items[1:], FEATURES, dtype=torch.float64, requires_grad=True
    )
    target = torch.randint(CLASSES, items)
    target[0, 0], target[0, 1], target[0, 2], target[-1, -1] = 0, 10, 30, -100
    return hidden, target


def loss_and_gradients(terms, num_passes, hidden, softmax):
    output = combine_terms(terms, alpha=1.7, num_passes=num_passes)
    parameters = [hidden, *softmax.parameters()]
    return output, torch.autograd.grad(output.loss, parameters)


@pytest.mark.parametrize(
    ("num_passes", "backward_passes"), [(2, None), (2, 1), (3, None), (3, 1), (3, 2)]
)
@pytest.mark.parametrize("chunk_size", [3, 100])
def test_the_chain_rule_is_the_divergence_of_the_full_distributions(
    softmax, num_passes, backward_passes, chunk_size
):
    hidden, target = draw(num_passes)
    options = {"num_passes": num_passes, "backward_passes": backward_passes}
    found = adaptive_softmax_terms(hidden, target, softmax, chunk_size=chunk_size, **options)
    log_p = adaptive_log_softmax(hidden.flatten(0, 1), softmax).view(*hidden.shape[:-1], CLASSES)
    expected = cross_entropy_terms(log_p, target, impl="eager", **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-12, atol=1e-12)
    output, gradients = loss_and_gradients(found, num_passes, hidden, softmax)
    reference, expected_gradients = loss_and_gradients(expected, num_passes, hidden, softmax)
    torch.testing.assert_close(output, reference, rtol=1e-12, atol=1e-12)
    assert output.kl > 1e-2
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_log_probabilities_and_likelihood_are_torchs(softmax):
    hidden, target = draw(1)
    flat = hidden.flatten(0, 1)
    log_p = adaptive_log_softmax(flat, softmax)
    torch.testing.assert_close(log_p, softmax.log_prob(flat))
    terms = adaptive_softmax_terms(hidden, target, softmax, num_passes=1, chunk_size=7)
    valid = target.flatten() != -100
    expected = -softmax(flat[valid], target.flatten()[valid]).output
    torch.testing.assert_close(terms.nll.flatten()[valid], expected)
    assert terms.nll.flatten()[~valid].tolist() == [0.0]
    assert terms.kl_count == valid.sum()


def test_a_tail_without_items_has_a_gradient_of_zero_under_one_pass(softmax):
    hidden, target = draw(1)
    target[:] = 2
    adaptive_softmax_terms(hidden, target, softmax, num_passes=1).nll.sum().backward()
    assert all(p.grad is not None for p in softmax.parameters())
    assert softmax.tail[1][0].weight.grad.abs().max() == 0


def test_nothing_counts_where_all_is_ignored(softmax):
    hidden, target = draw()
    target[:] = -100
    terms = adaptive_softmax_terms(hidden, target, softmax, num_passes=2)
    loss = combine_terms(terms, alpha=1.0, num_passes=2).loss
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().max() == 0


@pytest.mark.parametrize("num_passes", [2, 3, 6])
def test_a_class_of_the_least_finite_number_costs_what_torch_says(softmax, num_passes):
    hidden, target = draw(1)
    target[:] = 2
    softmax.head.bias.data[2] = torch.finfo(torch.float64).min
    expected = -softmax(hidden.flatten(0, 1), target.flatten()).output.view(target.shape)
    assert expected.isfinite().all()
    stacked = hidden.repeat(num_passes, 1, 1)
    terms = adaptive_softmax_terms(stacked, target, softmax, num_passes=num_passes)
    torch.testing.assert_close(terms.nll, expected)


def test_half_precision_is_computed_in_float32(softmax):
    hidden, target = draw()
    half = hidden.detach().bfloat16()
    terms = adaptive_softmax_terms(half, target, softmax.bfloat16(), num_passes=2)
    assert terms.nll.dtype == terms.kl.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: (h, t.repeat(2, 1)), "target was stacked too"),
        (lambda h, t: (h, t[:, :3]), "target must have the shape of one pass without"),
        (lambda h, t: (h, t.float()), "target must hold class indices, got torch.float32"),
        (lambda h, t: (h, t + CLASSES), "from 0 to 39 or ignore_index=-100, got"),
    ],
)
def test_what_does_not_fit_is_named(softmax, change, message):
    hidden, target = change(*draw())
    with pytest.raises((TypeError, ValueError), match=message):
        adaptive_softmax_terms(hidden, target, softmax, num_passes=2)
