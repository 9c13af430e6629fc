"""Steps, losses and rules of alpha on numbers and outputs that a usual run does not have."""

import json
import timeit
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from regdrop import (
    AlphaController,
    RDropConfig,
    RDropCrossEntropyLoss,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_mse_loss,
    rdrop_step,
    repeat_batch,
    symmetric_kl,
)
from regdrop.loss import (
    ItemTerms,
    adaptive_softmax_terms,
    combine_terms,
    cross_entropy_terms,
    fraternal_terms,
)

X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
WAYS = [{}, {"passes": "sequential"}, {"backward_passes": 1}, {"fraction": 0.5}]


def auxiliary_terms(outputs, target, /, *, num_passes):
    own = cross_entropy_terms(outputs["logits"], target, num_passes=num_passes)
    return own._replace(nll=own.nll + outputs["auxiliary"])


@pytest.mark.parametrize("options", WAYS)
def test_outputs_may_hold_a_number_and_nothing(options):
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))

    def forward(x):
        return {"logits": net(x), "auxiliary": torch.tensor(2.0), "attention": None}

    config = RDropConfig(**options)
    torch.manual_seed(0)
    with_it = rdrop_step(forward, X, Y, config=config, step=0, loss=auxiliary_terms)
    torch.manual_seed(0)
    without = rdrop_step(net, X, Y, config=config, step=0)
    torch.testing.assert_close(with_it.nll, without.nll + 2)
    torch.testing.assert_close(with_it.kl, without.kl)


def test_losses_of_torch_are_refused_by_name():
    for loss in (F.cross_entropy, nn.CrossEntropyLoss()):
        with pytest.raises(TypeError, match="loss must be a name or a function of stacked outputs"):
            rdrop_step(nn.Linear(5, 3), X, Y, config=RDropConfig(), step=0, loss=loss)


@pytest.mark.parametrize(
    ("loss", "terms"),
    [
        (rdrop_cross_entropy, "cross_entropy_terms"),
        (partial(rdrop_cross_entropy, alpha=1.0), "cross_entropy_terms"),
        (RDropCrossEntropyLoss(1.0), "cross_entropy_terms"),
        (rdrop_mse_loss, "mse_terms"),
    ],
    ids=["function", "partial", "module", "mse"],
)
def test_losses_of_the_library_are_sent_to_their_terms(loss, terms):
    with pytest.raises(TypeError, match=rf"loss must .*; that is a whole loss: give .*\.{terms}$"):
        rdrop_step(nn.Linear(5, 3), X, Y, config=RDropConfig(), step=0, loss=loss)


def test_an_error_of_terms_of_ones_own_is_theirs():
    def terms(outputs, target, *, num_passes):
        return len(outputs, num_passes=num_passes)

    with pytest.raises(TypeError, match=r"len\(\) takes"):
        rdrop_step(nn.Linear(5, 3), X, Y, config=RDropConfig(), step=0, loss=terms)


def test_a_mean_that_is_divided_once_more_is_warned_about():
    def mean(outputs, target, *, num_passes):
        found = cross_entropy_terms(outputs, target, num_passes=num_passes)
        return ItemTerms(found.nll.mean(), found.kl.mean(), 1, 1)

    def total(outputs, target, *, num_passes):
        found = cross_entropy_terms(outputs, target, num_passes=num_passes)
        return ItemTerms(found.nll.sum(), found.kl.sum(), len(target), len(target))

    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))
    step = partial(rdrop_step, model, X, Y, config=RDropConfig(), step=0)
    with pytest.warns(UserWarning, match="nll_count=1 for .* as for a mean, and num_items=40"):
        step(loss=mean, num_items=40)
    step(loss=total, num_items=40)
    step(loss=mean)
    step(loss=mean, num_items=2)  # micro-batches


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_monitoring_is_refused_by_name_where_torch_transforms_the_step(transform):
    config = RDropConfig(alpha=0.0, num_passes=1, monitor_steps=1)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))

    def loss(x):
        return rdrop_step(model, x, Y, config=config, step=0).loss

    options = {"randomness": "different"} if transform is torch.func.vmap else {}
    with pytest.raises(ValueError, match=r"monitor_steps runs .* monitor_steps=None"):
        transform(loss, **options)(X[None] if options else X)


def test_counts_of_terms_may_be_numbers():
    terms = cross_entropy_terms(torch.randn(12, 3), Y, num_passes=2)
    expected = combine_terms(terms, alpha=1.0, num_passes=2)
    counted = ItemTerms(terms.nll, terms.kl, len(Y), len(Y))
    torch.testing.assert_close(combine_terms(counted, alpha=1.0, num_passes=2), expected)


@pytest.mark.parametrize("options", WAYS)
def test_a_batch_without_items_is_nothing(options):
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))
    output = rdrop_step(net, X[:0], Y[:0], config=RDropConfig(**options), step=0)
    assert output.loss == 0


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_a_total_of_one_element_gives_a_number(impl):
    logits, total = torch.randn(12, 3), torch.tensor([6])
    expected = rdrop_cross_entropy(logits, Y, alpha=1.0, num_items=6).loss
    found = rdrop_cross_entropy(logits, Y, alpha=1.0, num_items=total, impl=impl).loss
    torch.testing.assert_close(found, expected)
    assert rdrop_mse_loss(logits, logits[:6], alpha=1.0, num_items=total).loss.shape == ()


def test_an_alpha_of_numpy_has_the_gradient_of_the_number():
    gradients = []
    for alpha in (2.0, np.float32(2), np.int64(2)):
        logits = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        rdrop_cross_entropy(logits, Y, alpha=alpha).loss.backward()
        gradients.append(logits.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_a_weight_with_a_gradient_is_refused():
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="weight must not require a gradient"):
        rdrop_cross_entropy(torch.randn(12, 3), Y, alpha=1.0, weight=weight)


def test_a_batch_of_gradients_is_refused_by_name():
    logits = torch.randn(12, 3, requires_grad=True)
    loss = rdrop_cross_entropy(logits, Y, alpha=1.0, reduction="none").loss
    directions = torch.eye(6)
    with pytest.raises(RuntimeError, match=r"or RDropConfig\(impl='eager'\)"):
        torch.autograd.grad(loss, logits, directions, is_grads_batched=True, retain_graph=True)
    loss = rdrop_cross_entropy(logits, Y, alpha=1.0, reduction="none", impl="eager").loss
    (found,) = torch.autograd.grad(loss, logits, directions, is_grads_batched=True)
    assert found.shape == (6, 12, 3)


def test_ignored_labels_of_a_small_type_are_those():
    """A byte of 156 is -100 in the type of the labels, and a class all the same."""
    logits, target = torch.randn(4, 200), torch.tensor([156, 3], dtype=torch.uint8)
    expected = fraternal_terms(logits, target.long(), num_passes=2)
    torch.testing.assert_close(fraternal_terms(logits, target, num_passes=2), expected)
    assert expected.kl[0] > 0


def test_fraternal_dropout_leaves_masked_classes_out():
    logits = torch.randn(4, 3)
    logits[:, 2] = -torch.inf
    logits.requires_grad_()
    terms = fraternal_terms(logits, torch.tensor([0, 1]), num_passes=2)
    terms.kl.sum().backward()
    assert terms.kl.isfinite().all()
    assert logits.grad.isfinite().all()
    with pytest.raises(TypeError, match="target must hold class indices"):
        fraternal_terms(logits, torch.rand(2, 3), num_passes=2)


@pytest.mark.parametrize("mask", [-torch.inf, torch.inf])
def test_a_label_masked_in_every_pass_costs_nothing(mask):
    logits, target = torch.randn(4, 3), torch.ones(2, 3)
    logits[:, 2], target[:, 2] = mask, float(mask > 0)
    logits.requires_grad_()
    output = rdrop_binary_cross_entropy_with_logits(logits, target, alpha=1.0, reduction="sum")
    output.loss.backward()
    expected = rdrop_binary_cross_entropy_with_logits(
        logits.detach()[:, :2], target[:, :2], alpha=1.0, reduction="sum"
    )
    torch.testing.assert_close(output.loss.detach(), expected.loss)
    assert bool((logits.grad[:, 2] == 0).all())


def test_an_adaptive_softmax_takes_labels_of_any_integer_type():
    softmax, hidden = nn.AdaptiveLogSoftmaxWithLoss(5, 4, [2]), torch.randn(6, 5)
    labels = torch.tensor([0, 3, 1])
    expected = adaptive_softmax_terms(hidden, labels, softmax, num_passes=2)
    found = adaptive_softmax_terms(hidden, labels.to(torch.uint8), softmax, num_passes=2)
    torch.testing.assert_close(found, expected)


def test_texts_as_torchs_own_loader_gives_them_are_repeated():
    rows = [(torch.randn(3), f"row {i}", i) for i in range(4)]
    x, names, numbers = repeat_batch(next(iter(DataLoader(rows, batch_size=4))))
    assert (len(x), len(numbers)) == (8, 8)
    assert list(names) == [f"row {i}" for i in range(4)] * 2
    size = (3, 224)
    assert repeat_batch((torch.zeros(2, 3), size))[1] == size


@pytest.mark.parametrize("rule", ["gap", "kl-target"])
@pytest.mark.parametrize("strange", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_step_that_overflowed_says_nothing_of_alpha(rule, strange, kind):
    alphas = []
    for last in (0.5, strange):
        controller = AlphaController(40, rule=rule, alpha_max=8.0)
        for step in range(9):
            controller.update(step, nll=kind(0.5), kl=kind(0.5))
        controller.update(9, nll=kind(last), kl=kind(last), validation_loss=1.0)
        controller.update(10, nll=kind(0.5), kl=kind(0.5), validation_loss=0.9)
        alphas.append(controller.alpha)
    assert alphas[0] == alphas[1]


def test_a_step_of_numpy_can_be_saved():
    controller = AlphaController(10)
    controller.update(np.int64(3), nll=0.5)
    assert json.loads(json.dumps(controller.state_dict()))["next_step"] == 4


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("classes", [3, 10])
def test_a_model_in_evaluation_mode_is_told_whatever_rounding_does(size, classes):
    torch.manual_seed(size)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, classes)).eval()
    y = torch.zeros(size, dtype=torch.long)
    with pytest.warns(UserWarning, match="nothing to compare"):
        [rdrop_step(model, torch.randn(size, 5), y, config=RDropConfig(), step=s) for s in range(3)]


def test_dropped_weights_are_sent_to_sequential_passes():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Dropout(0.5))
    x, y = torch.randn(4, 6), torch.arange(4) % 3
    assert rdrop_step(model, x, y, config=RDropConfig(), step=0).kl == 0
    with pytest.warns(UserWarning, match="once per forward, .* passes='sequential'"):
        rdrop_step(model, x, y, config=RDropConfig(), step=1)
    assert rdrop_step(model, x, y, config=RDropConfig(passes="sequential"), step=2).kl > 0


def test_a_small_divergence_of_dropout_is_none_of_rounding():
    """A new head scores all classes nearly alike, whatever dropout does before it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)), torch.randn(6, 5)
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            output = rdrop_step(model, x, Y, config=RDropConfig(), step=step)
            assert 0 < output.kl < 1e-6


def test_a_function_that_names_a_large_vocabulary_costs_no_time():
    words = {f"word {i}": [i] for i in range(200_000)}
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))

    def forward(x):
        return net(x) + len(words) * 0

    def step():
        rdrop_step(forward, X, Y, config=RDropConfig(), step=0)

    assert min(timeit.repeat(step, number=1, repeat=5)) < 0.05


def test_symmetric_kl_of_nothing_is_nothing():
    assert symmetric_kl(torch.zeros(0, 3)) == 0
