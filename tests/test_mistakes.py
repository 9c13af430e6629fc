"""Fifteen mistakes that implementations of R-Drop have made, each a test that would catch it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from models import image_rows, text_rows, tiny_bert, tiny_vit
from regdrop import (
    RDropConfig,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_mse_loss,
    repeat_batch,
)
from training import build, train

IMPLEMENTATIONS = pytest.mark.parametrize("impl", ["eager", "chunked"])


def make(batch=4, classes=5, num_passes=2):
    logits = torch.randn(num_passes * batch, classes, dtype=torch.float64) * 2
    return logits, torch.randint(0, classes, (batch,))


@IMPLEMENTATIONS
def test_mistake_1_divergence_of_raw_logits_or_of_a_softmax_of_a_softmax(impl):
    logits, target = make()
    kl = rdrop_cross_entropy(logits, target, alpha=1.0, impl=impl).kl
    p, q = logits.softmax(-1).chunk(2)
    true = F.kl_div(p.log(), q, reduction="batchmean") + F.kl_div(q.log(), p, reduction="batchmean")
    torch.testing.assert_close(kl, true / 2)
    # It depends on the distributions alone: a constant added to a row's logits is nothing.
    moved = rdrop_cross_entropy(logits + torch.randn(8, 1), target, alpha=1.0, impl=impl).kl
    torch.testing.assert_close(moved, kl)


@IMPLEMENTATIONS
@pytest.mark.parametrize("num_passes", [2, 3])
def test_mistake_2_likelihood_of_one_pass_only(impl, num_passes):
    logits, target = make(num_passes=num_passes)
    logits.requires_grad_()
    options = {"num_passes": num_passes, "scale": "sum", "impl": impl}
    loss = rdrop_cross_entropy(logits, target, alpha=0.0, **options).loss
    each = [F.cross_entropy(logits[i * 4 : i * 4 + 4], target) for i in range(num_passes)]
    torch.testing.assert_close(loss, sum(each))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient.abs().sum(-1) > 0).all()


@IMPLEMENTATIONS
def test_mistake_3_divergence_of_ignored_positions(impl):
    logits, target = make(6)
    target[[0, 4]] = -100
    kept = torch.tensor([1, 2, 3, 5])
    output = rdrop_cross_entropy(logits, target, alpha=1.0, impl=impl)
    alone = rdrop_cross_entropy(
        logits.view(2, 6, 5)[:, kept].reshape(8, 5), target[kept], alpha=1.0, impl=impl
    )
    torch.testing.assert_close(output, alone)
    changed = logits.clone()
    changed[[0, 4, 6, 10]] = 1e4
    torch.testing.assert_close(rdrop_cross_entropy(changed, target, alpha=1.0, impl=impl), output)


@IMPLEMENTATIONS
def test_mistake_4_shift_of_causal_models_forgotten_in_the_divergence(impl):
    """Shifted by padding the labels, the last position counts in neither term."""
    logits = torch.randn(2 * 2, 4, 5, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 4))
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    output = rdrop_cross_entropy(logits, shifted, alpha=1.0, impl=impl)
    sliced = logits[:, :-1].reshape(-1, 5)
    torch.testing.assert_close(
        output, rdrop_cross_entropy(sliced, labels[:, 1:].flatten(), alpha=1.0, impl=impl)
    )


@IMPLEMENTATIONS
def test_mistake_5_mean_over_classes(impl):
    """Classes that nobody predicts leave the divergence what it is."""
    logits, target = make()
    more = F.pad(logits, (0, 1000), value=-60.0)
    for name in ("kl", "loss"):
        torch.testing.assert_close(
            getattr(rdrop_cross_entropy(more, target, alpha=1.0, impl=impl), name),
            getattr(rdrop_cross_entropy(logits, target, alpha=1.0, impl=impl), name),
        )


@IMPLEMENTATIONS
def test_mistake_6_sum_over_the_batch(impl):
    """The same items twice are the same loss; halves of a window add up to the whole."""
    logits, target = make()
    whole = rdrop_cross_entropy(logits, target, alpha=2.0, impl=impl)
    twice = rdrop_cross_entropy(
        logits.view(2, 4, 5).repeat(1, 3, 1).view(-1, 5), target.repeat(3), alpha=2.0, impl=impl
    )
    torch.testing.assert_close(twice, whole)
    halves = [
        rdrop_cross_entropy(
            logits.view(2, 4, 5)[:, part].reshape(-1, 5),
            target[part],
            alpha=2.0,
            num_items=4,
            impl=impl,
        ).loss
        for part in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(halves), whole.loss)


@IMPLEMENTATIONS
def test_mistake_7_one_side_detached(impl):
    logits, target = make()
    logits.requires_grad_()

    def divergence(x):
        both = rdrop_cross_entropy(x, target, alpha=1.0, impl=impl).loss
        return both - rdrop_cross_entropy(x, target, alpha=0.0, impl=impl).loss

    assert torch.autograd.gradcheck(divergence, logits)
    (gradient,) = torch.autograd.grad(divergence(logits), logits)
    assert (gradient.abs().sum(-1) > 0).all()


def test_mistake_8_two_passes_in_evaluation(tmp_path):
    model, rows = tiny_bert(dropout=0.5), text_rows()
    ours = build(tmp_path, model, rows, RDropConfig(alpha=9.0))
    sizes = []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(output.logits)))
    metrics = ours.evaluate()
    assert sum(sizes) == len(rows)
    with torch.no_grad():
        plain = model.eval()(**rows.columns).loss.item()
    assert metrics["eval_loss"] == pytest.approx(plain, rel=1e-5)


def test_mistake_9_callers_batch_changed(tmp_path):
    batch = {"input_ids": torch.arange(6).view(3, 2), "labels": torch.tensor([0, 1, 2])}
    before = copy.deepcopy(batch)
    repeat_batch(batch)
    ours = build(tmp_path, tiny_bert().train(), text_rows(), RDropConfig())
    ours.compute_loss(ours.model, batch)
    assert list(batch) == list(before)
    assert all(torch.equal(batch[name], before[name]) for name in before)


def test_mistake_10_label_smoothing_class_weights_and_problem_type_bypassed(tmp_path):
    model, rows = tiny_bert().train(), text_rows()
    weight = (1.0, 4.0, 0.5)
    rdrop = RDropConfig(alpha=2.0, class_weight=weight)
    ours = build(tmp_path, model, rows, rdrop, label_smoothing_factor=0.3)
    torch.manual_seed(1)
    loss = ours.compute_loss(model, dict(rows.columns))
    torch.manual_seed(1)
    labels = rows.columns["labels"]
    stacked = repeat_batch({k: v for k, v in rows.columns.items() if k != "labels"})
    expected = reference.rdrop_loss(
        model(**stacked).logits,
        labels,
        alpha=2.0,
        scale="mean",
        weight=torch.tensor(weight),
        label_smoothing=0.3,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_mistake_10_problem_type_that_the_labels_tell(tmp_path):
    rows = text_rows(8, 3, "multi_label_classification")
    model = tiny_bert(3, problem_type=None, dropout=0.0).train()
    ours = build(tmp_path, model, rows, RDropConfig(alpha=0.0, num_passes=1))
    loss = ours.compute_loss(model, dict(rows.columns))
    torch.testing.assert_close(loss, model(**rows.columns).loss)
    assert model.config.problem_type == "multi_label_classification"


def test_mistake_11_labels_sent_through_the_model(tmp_path):
    names = []
    model = tiny_vit()

    def note(module, args, kwargs):
        if module.training:
            names.append(set(kwargs))

    model.register_forward_pre_hook(note, with_kwargs=True)
    train(tmp_path, model, image_rows(), RDropConfig())
    assert names == [{"pixel_values"}] * 2


def test_mistake_12_two_models_instead_of_two_masks(tmp_path):
    """Both passes go through the same parameters, which get the sum of both gradients."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 5)).double()
    x, target = torch.randn(4, 3, dtype=torch.float64), torch.randint(0, 5, (4,))
    logits = model(repeat_batch(x))
    assert not torch.equal(*logits.chunk(2))
    expected = torch.autograd.grad(
        rdrop_cross_entropy(logits, target, alpha=1.0, impl="eager").loss,
        list(model.parameters()),
        retain_graph=True,
    )
    found = torch.autograd.grad(
        rdrop_cross_entropy(logits, target, alpha=1.0).loss, list(model.parameters())
    )
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), model(x))


def test_mistake_13_softmax_on_labels_that_are_no_classes():
    """Each label is a Bernoulli variable of its own, each prediction a number of its own."""
    logits = torch.randn(4, 3, dtype=torch.float64)
    target = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    p, q = logits.sigmoid().chunk(2)
    kl = sum(
        a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log() for a, b in ((p, q), (q, p))
    ).mean()
    found = rdrop_binary_cross_entropy_with_logits(logits, target, alpha=1.0).kl
    torch.testing.assert_close(found, kl / 2)
    predictions, numbers = torch.tensor([1.0, 2.0, 4.0, 2.0]), torch.zeros(2)
    assert rdrop_mse_loss(predictions, numbers, alpha=1.0).kl == 4.5


@IMPLEMENTATIONS
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_mistake_14_logged_likelihood_of_two_passes_and_the_square_of_a_perplexity(impl, scale):
    logits, target = make()
    nll = rdrop_cross_entropy(logits, target, alpha=1.0, scale=scale, impl=impl).nll
    torch.testing.assert_close(nll, F.cross_entropy(logits, target.repeat(2)))


def test_mistake_14_in_the_log_of_the_trainer(tmp_path):
    ours = build(tmp_path, tiny_bert(dropout=0.01), text_rows(), RDropConfig(scale="sum"))
    before = ours.evaluate()["eval_loss"]
    ours.train()
    first = next(entry for entry in ours.state.log_history if "nll" in entry)
    assert first["nll"] == pytest.approx(before, rel=0.3)
    assert first["loss"] == pytest.approx(2 * first["nll"] + first["kl"], rel=1e-4)
    assert np.exp(first["nll"]) < 1.5 * np.exp(before)


def test_mistake_15_no_active_dropout_and_no_word_about_it(tmp_path):
    ours = build(tmp_path, tiny_bert(dropout=0.0), text_rows(), RDropConfig())
    with pytest.warns(UserWarning, match="R-Drop has nothing to compare"):
        ours.train()
