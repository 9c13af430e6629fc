"""Items without a label: they count in the divergence, and not in the likelihood."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import reference
from implementations import CPP, TRITON
from regdrop import RDropCrossEntropyLoss, linear_rdrop_cross_entropy, rdrop_cross_entropy
from regdrop.kernels import Projection
from regdrop.loss import (
    count_items,
    cross_entropy_terms,
    fraternal_terms,
    linear_cross_entropy_loss,
    linear_cross_entropy_terms,
)

ALL = ["eager", "chunked", TRITON, CPP]
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.1, 1.0], dtype=torch.float64)
OPTIONS = [
    {},
    {"weight": WEIGHT},
    {"label_smoothing": 0.1},
    {"weight": WEIGHT, "label_smoothing": 0.2},
    {"num_items": 11},
    {"num_items": 11, "num_weight": 4.5},
    {"scale": "sum"},
]


def make(num_passes=2, seed=0):
    """Return logits of six items, and a target with one ignored and two unlabelled ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_passes * 6, 7, generator=generator, dtype=torch.float64) * 2
    return logits, torch.tensor([3, -1, -100, 6, -1, 0])


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("num_passes", [2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_is_that_of_the_formula(impl, num_passes, options):
    logits, target = make(num_passes)
    arguments = {"alpha": 1.7, "num_passes": num_passes, "unlabelled_index": -1, **options}
    expected = reference.rdrop_loss(logits, target, **arguments)
    output = rdrop_cross_entropy(logits, target, impl=impl, **arguments)
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_gradient_is_that_of_the_labelled_likelihood_and_the_whole_divergence(impl, options):
    logits, target = make()
    leaf = logits.clone().requires_grad_()
    arguments = {"unlabelled_index": -1, "impl": impl, "scale": "sum", **options}
    rdrop_cross_entropy(leaf, target, alpha=0.0, **arguments).loss.backward()
    unlabelled = (target < 0).repeat(2)
    assert (leaf.grad[unlabelled] == 0).all()
    assert (leaf.grad[~unlabelled] != 0).all()

    leaf.grad = None
    rdrop_cross_entropy(leaf, target, alpha=1.3, **arguments).loss.backward()
    other = logits.clone().requires_grad_()
    p, q = (half.log_softmax(-1) for half in other.chunk(2))
    kl = ((p.exp() - q.exp()) * (p - q)).sum(-1)[target != -100].sum() / 5 / 2
    ignoring = torch.where(target == -1, -100, target)
    nll = sum(F.cross_entropy(z, ignoring, **options) for z in other.chunk(2))
    (nll + 1.3 * kl).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("impl", ["eager", "chunked", CPP])
def test_gradcheck(impl):
    logits, target = make(3)

    def loss(z):
        options = {"num_passes": 3, "unlabelled_index": -1, "weight": WEIGHT}
        return rdrop_cross_entropy(z, target, alpha=0.7, impl=impl, **options).loss

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_without_labels_has_the_divergence_alone(impl, reduction):
    logits, _ = make()
    target = torch.tensor([-1, -1, -100, -1, -1, -1])
    leaf = logits.clone().requires_grad_()
    options = {"unlabelled_index": -1, "reduction": reduction, "impl": impl, "weight": WEIGHT}
    output = rdrop_cross_entropy(leaf, target, alpha=2.0, **options)
    rows = [half.tolist() for half in logits.chunk(2)]
    kl = torch.tensor([reference.symmetric_kl([r[n] for r in rows]) for n in range(6)]).double()
    kl[2] = 0
    expected = {"mean": kl.sum() / 5, "sum": kl.sum(), "none": kl}[reduction]
    torch.testing.assert_close(
        output.loss.detach(), expected, check_dtype=False, rtol=1e-6, atol=1e-9
    )
    assert output.nll.item() == 0
    output.loss.sum().backward()
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad[[2, 8]] == 0).all()


@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_a_masked_class_0_does_not_reach_an_unlabelled_item(impl):
    logits, target = make()
    logits[:, 0] = -torch.inf
    target[5] = 1
    leaf = logits.requires_grad_()
    options = {"unlabelled_index": -1, "impl": impl}
    output = rdrop_cross_entropy(leaf, target, alpha=1.0, **options)
    assert torch.isfinite(output.loss)
    output.loss.backward()
    assert torch.isfinite(leaf.grad).all()


def test_accumulation_with_both_denominators_equals_one_batch():
    logits, target = make()
    options = {"alpha": 1.0, "unlabelled_index": -1, "weight": WEIGHT}
    whole = rdrop_cross_entropy(logits, target, **options).loss
    terms = partial(cross_entropy_terms, unlabelled_index=-1, weight=WEIGHT)
    counts = count_items(terms, target)
    assert counts.kl.item() == 5
    assert counts.nll.item() == pytest.approx(WEIGHT[[3, 6, 0]].sum().item())
    first, second = logits.chunk(2)
    totals = {"num_items": counts.kl, "num_weight": counts.nll}
    parts = [
        rdrop_cross_entropy(torch.cat([first[i], second[i]]), target[i], **options, **totals).loss
        for i in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def linear(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(s, generator=generator).double() for s in ((12, 5), (7, 5)))
    return hidden.requires_grad_(), weight.requires_grad_(), make()[1]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_fused_layer_is_the_same(reduction, chunk_size, options):
    hidden, weight, target = linear()
    if reduction != "mean":
        options = {name: x for name, x in options.items() if not name.startswith("num_")}
    options = {"alpha": 1.7, "unlabelled_index": -1, "reduction": reduction, **options}
    expected = rdrop_cross_entropy(F.linear(hidden, weight), target, impl="eager", **options)
    options["class_weight"] = options.pop("weight", None)
    found = linear_rdrop_cross_entropy(hidden, weight, target, chunk_size=chunk_size, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    upstream = torch.linspace(-1, 2, found.loss.numel()).double().view(found.loss.shape)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, (hidden, weight), upstream),
        torch.autograd.grad(expected.loss, (hidden, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_fused_layer_with_a_part_of_the_items_in_the_second_pass():
    hidden, weight, target = linear()
    items = torch.tensor([4, 0, 2])
    states = torch.cat([hidden[:6], hidden[6:9]])
    options = {"projection": Projection(weight), "unlabelled_index": -1}
    found = linear_cross_entropy_loss(
        states, target, alpha=1.5, num_passes=2, items=items, **options
    ).loss
    whole = linear_cross_entropy_terms(states[:6], target, num_passes=1, **options)
    both = torch.cat([states[:6][items], states[6:]])
    part = linear_cross_entropy_terms(both, target[items], num_passes=2, **options)
    expected = whole.nll.sum() / 3 + 1.5 / 2 * part.kl.sum() * 2 / 5
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_fraternal_dropout_counts_them_in_the_difference():
    logits, target = make()
    terms = fraternal_terms(logits, target, num_passes=2, unlabelled_index=-1)
    difference = (logits[:6] - logits[6:]).square().mean(-1)
    difference[2] = 0
    torch.testing.assert_close(terms.kl, difference)
    assert (terms.nll == 0).tolist() == [False, True, True, False, True, False]
    assert (terms.nll_count.item(), terms.kl_count.item()) == (3, 5)


def test_module_is_the_function():
    logits, target = make()
    module = RDropCrossEntropyLoss(1.0, unlabelled_index=-1)
    expected = rdrop_cross_entropy(logits, target, alpha=1.0, unlabelled_index=-1)
    torch.testing.assert_close(module(logits, target).loss, expected.loss)
    with pytest.raises(ValueError, match="unlabelled_index must differ from ignore_index=-100"):
        RDropCrossEntropyLoss(1.0, unlabelled_index=-100)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (-100, ValueError, "unlabelled_index must differ from ignore_index=-100"),
        (3, ValueError, r"unlabelled_index must be no class \(0 to 6\), got 3"),
        (True, TypeError, "unlabelled_index must be an integer, got bool"),
        (-2, ValueError, "or ignore_index=-100 or unlabelled_index=-2, got -1"),
    ],
)
def test_bad_index_is_named(index, error, message):
    logits, target = make()
    with pytest.raises(error, match=message):
        rdrop_cross_entropy(logits, target, alpha=1.0, unlabelled_index=index)
    hidden, weight, target = linear()
    with pytest.raises(error, match=message):
        linear_rdrop_cross_entropy(hidden, weight, target, alpha=1.0, unlabelled_index=index)


def test_probabilities_have_no_index():
    logits, _ = make()
    with pytest.raises(ValueError, match="unlabelled_index needs class indices"):
        rdrop_cross_entropy(logits, logits[:6].softmax(-1), alpha=1.0, unlabelled_index=-1)
