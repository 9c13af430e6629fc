"""What the first batch tells of a loss that somebody else computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regdrop.integrations.transformers.probing import probe_own_loss
from training import FEATURES, Plain


def halves(scores):
    better, worse = scores.flatten().chunk(2)
    return -F.logsigmoid(better - worse).mean()


def neighbours(scores):
    better, worse = scores.flatten().view(-1, 2).unbind(1)
    return -F.logsigmoid(better - worse).mean()


def rows(scores):
    return -F.logsigmoid(scores).mean()


@pytest.mark.parametrize(
    ("criterion", "is_rowwise"), [(halves, False), (neighbours, True), (rows, True)]
)
def test_a_new_head_that_scores_all_alike_does_not_hide_what_its_loss_is(criterion, is_rowwise):
    """Each of these is log 2 for scores of 0, of one pass and of two."""
    model = Plain(F.mse_loss, width=1)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(8, FEATURES)

    def compute(inputs, items):
        output = model(inputs["x"])
        return criterion(output["scores"]), output

    def probe(inputs):
        options = {"head": None, "label_names": ["labels"], "counts_items": False}
        return probe_own_loss(model, compute, inputs, **options)

    assert probe({"x": x, "labels": torch.ones(8)}).is_rowwise is is_rowwise
    assert not any(parameter.any() for parameter in model.parameters())
    if criterion is halves:
        assert probe({"x": x}).divergence.kind == "margins"
    else:
        with pytest.raises(ValueError, match="no labels of that shape tell how passes are compare"):
            probe({"x": x})


@pytest.mark.parametrize("says", [None, True, False])
@pytest.mark.parametrize("divides", [True, False])
def test_a_divisor_shows_by_twice_as_many_items(divides, says):
    """What the loss says of itself is believed; it is tried only where it says nothing."""
    model = nn.Sequential(nn.Linear(FEATURES, 3), nn.Dropout(0.5))
    before = [parameter.clone() for parameter in model.parameters()]
    given = []

    def compute(inputs, items):
        given.append(None if items is None else items.item())
        logits = model(inputs["x"])
        if items is None or not divides:
            return F.cross_entropy(logits, inputs["y"]), logits
        return F.cross_entropy(logits, inputs["y"], reduction="sum") / items, logits

    batch = {"x": torch.randn(4, FEATURES), "y": torch.tensor([0, 1, 2, 0])}
    options = {"head": None, "label_names": ["y"], "counts_items": says}
    found = probe_own_loss(model, compute, batch, **options)
    assert found.counts_items is (divides if says is None else says)
    assert found.is_rowwise
    assert (found.divergence.kind, found.divergence.mask) == ("classes", "y")
    assert (set(given) == {None}) is (says is False)
    # Dropout and parameters are as they were.
    assert model.training
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        ((4, 3), torch.tensor([0, 1, 2, 0]), ("classes", "y", -1)),
        ((4, 5, 3), torch.zeros(4, 5, dtype=torch.long), ("classes", "y", -1)),
        ((4, 3, 5), torch.zeros(4, 5, dtype=torch.long), ("classes", "y", 1)),
        ((4, 3), torch.full((4, 3), 1 / 3), ("classes", None, -1)),
        ((4, 3), torch.arange(12.0).view(4, 3) % 2, ("labels", None, -1)),
        ((4, 1), torch.tensor([0.5, 2.0, 3.0, -1.0]), ("numbers", None, -1)),
    ],
    ids=["classes", "positions", "second", "shares", "labels", "numbers"],
)
def test_shapes_tell_how_logits_are_compared(logits, labels, expected):
    weight = nn.Parameter(torch.randn(logits))
    model = nn.ParameterList([weight])

    def compute(inputs, items):
        # Nothing of the labels: shapes alone tell.
        return weight.square().mean(), {"logits": weight * inputs["x"].mean()}

    batch = {"x": torch.randn(4, FEATURES), "y": labels}
    options = {"head": None, "label_names": ["y"], "counts_items": False}
    found = probe_own_loss(model, compute, batch, **options).divergence
    assert (found.kind, found.mask, found.class_dim) == expected
    assert found.label == (None if found.kind == "classes" else "y")
    assert found.logits == "logits"
