"""What the first batch tells of a loss that somebody else computes."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from regdrop import symmetric_kl
from regdrop.heads import Head
from regdrop.integrations.transformers.evaluation import with_shorter_masks
from regdrop.integrations.transformers.likelihood.probing import probe_own_loss
from regdrop.loss import cross_entropy_terms
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
        ((4, 3), torch.eye(3, dtype=torch.long)[[0, 1, 2, 0]], ("classes", None, -1)),
        ((4, 3), torch.arange(12).view(4, 3) % 2, ("labels", None, -1)),
        ((4, 3), torch.arange(12.0).view(4, 3) % 2, ("labels", None, -1)),
        ((4, 1), torch.tensor([0.5, 2.0, 3.0, -1.0]), ("numbers", None, -1)),
    ],
    ids=[
        "classes",
        "positions",
        "second",
        "shares",
        "one-hot",
        "whole labels",
        "labels",
        "numbers",
    ],
)
def test_shapes_tell_how_logits_are_compared(logits, labels, expected):
    weight = nn.Parameter(torch.randn(logits))
    model = nn.ParameterList([weight])

    def compute(inputs, items):
        # Nothing of the labels: shapes alone tell.
        return weight.square().mean(), {"logits": weight * inputs["x"].mean()}

    batch = {"x": torch.randn(4, FEATURES), "y": labels}
    options = {"head": None, "label_names": ["y"], "counts_items": False}
    with pytest.raises(ValueError, match="the loss does not depend on the model's output 'logits'"):
        probe_own_loss(model, compute, batch, **options)
    found = probe_own_loss(model, compute, batch, asks_slope=False, **options).divergence
    assert (found.kind, found.mask, found.class_dim) == expected
    assert found.label == (None if found.kind == "classes" else "y")
    assert found.logits == "logits"


# --- the slope of the loss --------------------------------------------------------------------


class Scores(nn.Module):
    """Scores of rows, or of their positions."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(FEATURES, width)

    def forward(self, x, **_):
        return {"logits": self.out(x)}


def found_of(criterion, width, batch, head=None):
    """Return what is found of a loss of scores and the batch."""
    model = Scores(width)

    def compute(inputs, items):
        output = model(**inputs)
        return criterion(output["logits"], inputs), output

    options = {"head": head, "label_names": ["labels"], "counts_items": False}
    return probe_own_loss(model, compute, batch, **options)


def divergence_of(*args, **kwargs):
    """Return how the scores are compared."""
    return found_of(*args, **kwargs).divergence


def focal_labels(logits, inputs):
    chance, labels = logits.sigmoid(), inputs["labels"].float()
    nll = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return ((labels - chance).abs() ** 2 * nll).mean()


def softmax_of_one_hot(logits, inputs):
    return -(inputs["labels"] * logits.log_softmax(-1)).sum(-1).mean()


def with_normaliser(logits, inputs):
    small = 1e-3 * logits.logsumexp(-1).square().mean()
    return softmax_of_one_hot(logits, inputs) + small


MULTI_HOT = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]])
ONE_HOT = torch.eye(3, dtype=torch.long)[[0, 1, 2, 1]]


@pytest.mark.parametrize(
    ("criterion", "labels", "kind"),
    [
        (focal_labels, MULTI_HOT, "labels"),
        (focal_labels, MULTI_HOT.bool(), "labels"),
        (focal_labels, MULTI_HOT.float(), "labels"),
        (focal_labels, ONE_HOT, "labels"),
        (focal_labels, ONE_HOT.float(), "labels"),
        (softmax_of_one_hot, ONE_HOT, "classes"),
        (softmax_of_one_hot, ONE_HOT.float(), "classes"),
        (with_normaliser, ONE_HOT, "classes"),
    ],
)
def test_the_slope_tells_yes_or_no_from_one_of_several_classes(criterion, labels, kind):
    batch = {"x": torch.randn(4, FEATURES), "labels": labels}
    found = divergence_of(criterion, 3, batch)
    assert found.kind == kind
    target = found.head(batch, 4).target
    assert kind == "classes" or torch.equal(target, labels.float())


@pytest.mark.parametrize(
    "criterion",
    [
        lambda z, batch: F.mse_loss(z, batch["labels"].float()),
        lambda z, batch: F.poisson_nll_loss(z, batch["labels"]),
    ],
    ids=["ratings", "counts"],
)
def test_whole_numbers_of_the_logits_shape_are_numbers_where_no_softmax_is(criterion):
    labels = torch.tensor([[1, 5, 3], [2, 2, 4], [5, 1, 1], [3, 4, 2]])
    found = divergence_of(criterion, 3, {"x": torch.randn(4, FEATURES), "labels": labels})
    assert (found.kind, found.label) == ("numbers", "labels")


@pytest.mark.parametrize("dtype", [torch.float, torch.long])
def test_shares_of_classes_may_be_all_zero_in_rows_that_do_not_count(dtype):
    labels = ONE_HOT.to(dtype).index_fill(0, torch.tensor([1]), 0)
    batch = {"x": torch.randn(4, FEATURES), "labels": labels}
    assert divergence_of(softmax_of_one_hot, 3, batch).kind == "classes"


def test_one_yes_or_no_an_item_may_be_padded():
    labels = torch.randint(2, (4, 6))
    labels[:2, 3:] = -100

    def criterion(logits, inputs):
        kept = inputs["labels"] != -100
        return focal_labels(logits[..., 0][kept], {"labels": inputs["labels"][kept]})

    batch = {**positions(), "labels": labels}
    found = divergence_of(criterion, 1, batch)
    assert found.kind == "labels"
    assert found.head(batch, 4).counts().kl == 18


def test_labels_that_do_not_count_have_no_divergence():
    labels = MULTI_HOT.masked_fill(torch.eye(4, 3, dtype=torch.bool), -100)

    def criterion(logits, inputs):
        kept = inputs["labels"] != -100
        return focal_labels(logits[kept], {"labels": inputs["labels"][kept]})

    batch = {"x": torch.randn(4, FEATURES), "labels": labels}
    found = divergence_of(criterion, 3, batch)
    assert found.kind == "labels"
    head = found.head(batch, 4)
    assert head.counts().kl == 9
    logits = torch.randn(8, 3)
    a, b = (half[labels != -100] for half in logits.chunk(2))
    kl = (a.sigmoid() - b.sigmoid()) * (a - b) / 2
    terms = head.terms(logits, head.target, num_passes=2)
    torch.testing.assert_close(terms.kl.sum() / terms.kl_count, kl.mean())


def positions(size=4, length=6):
    x = torch.randn(size, length, FEATURES)
    return {"x": x, "attention_mask": torch.ones(size, length, dtype=torch.long)}


def active(inputs):
    return inputs["attention_mask"].bool()


def test_a_mask_that_the_loss_obeys_tells_which_yes_or_no_counts():
    def criterion(logits, inputs):
        kept = active(inputs)
        return focal_labels(logits[..., 0][kept], {"labels": inputs["labels"][kept]})

    batch = {**positions(), "labels": torch.randint(2, (4, 6))}
    found = divergence_of(criterion, 1, batch)
    assert (found.kind, found.mask) == ("labels", "attention_mask")
    batch["attention_mask"][0, 2:] = 0
    assert found.head(batch, 4).counts().kl == 20
    # As many labels as positions, by chance.
    several = {**positions(4, 3), "x": torch.randn(4, FEATURES), "labels": MULTI_HOT}
    assert divergence_of(focal_labels, 3, several).mask is None


def test_a_mask_is_obeyed_where_padding_is_on_the_left():
    """A row without a position has no mean."""

    def criterion(logits, inputs):
        kept, labels = active(inputs), inputs["labels"].float()
        nll = F.binary_cross_entropy_with_logits(logits[..., 0], labels, reduction="none")
        return ((nll * kept).sum(1) / kept.sum(1)).mean()

    batch = {**positions(), "labels": torch.randint(2, (4, 6))}
    batch["attention_mask"][:, :3] = 0
    assert divergence_of(criterion, 1, batch).mask == "attention_mask"


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float])
def test_a_shorter_mask_has_half_the_ones_of_its_longest_row(dtype):
    mask = torch.tensor([[0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1]]).to(dtype)
    ((name, batch),) = with_shorter_masks({"some_mask": mask}, mask.shape)
    shorter = torch.tensor([[0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0]]).to(dtype)
    assert name == "some_mask"
    assert torch.equal(batch[name], shorter)
    # A row of one position cannot be halved.
    assert not list(with_shorter_masks({"some_mask": mask[:1]}, mask[:1].shape))


@pytest.mark.parametrize("is_moved", [True, False])
def test_a_mask_of_ones_own_tells_which_words_count(is_moved):
    """As in losses of sampled words, which have no labels."""

    def criterion(logits, inputs):
        words, kept = inputs["words"], inputs["completion_mask"].bool()
        if is_moved:
            logits, words, kept = logits[:, :-1], words[:, 1:], kept[:, 1:]
        return -logits.log_softmax(-1).gather(-1, words[..., None])[..., 0][kept].square().mean()

    batch = {**positions(), "words": torch.randint(5, (4, 6))}
    batch["completion_mask"] = torch.ones(4, 6, dtype=torch.long)
    batch["completion_mask"][:, :2] = 0
    found = divergence_of(criterion, 5, batch)
    assert (found.kind, found.mask, found.is_shifted) == ("classes", "completion_mask", is_moved)


@pytest.mark.parametrize(
    ("criterion", "labels"),
    [
        (lambda z, batch: (z - batch["x"][:, :3]).square().mean(), {}),
        (lambda z, batch: (z - 1).square().mean(), {"labels": torch.randn(4, 2)}),
    ],
    ids=["no labels", "of another shape"],
)
def test_a_loss_that_is_none_of_classes_is_refused_where_nothing_tells_what_it_is(
    criterion, labels
):
    with pytest.raises(ValueError, match=r"is none of classes .*'logits', of shape \(4, 3\).*got"):
        divergence_of(criterion, 3, {"x": torch.randn(4, FEATURES), **labels})


def test_one_against_the_rest_has_the_divergence_of_a_yes_or_no_for_each_class():
    def criterion(logits, inputs):
        return F.binary_cross_entropy_with_logits(logits, F.one_hot(inputs["labels"], 3).float())

    batch = {"x": torch.randn(4, FEATURES), "labels": torch.tensor([0, 1, 2, 0])}
    divergence = divergence_of(criterion, 3, batch)
    assert divergence.kind == "yes or no"
    assert "each class a yes or no" in str(divergence)
    head = divergence.head(batch, 4)
    logits = torch.randn(8, 3)
    first, second = logits.sigmoid().chunk(2)
    a, b = logits.chunk(2)
    expected = ((first - second) * (a - b)).mean(-1) / 2
    terms = head.terms(logits, head.target, num_passes=2)
    torch.testing.assert_close(terms.kl, expected)
    assert terms.kl_count == 4


@pytest.mark.parametrize("weight", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_chances_are_told_whatever_a_yes_weighs(weight, scale):
    def criterion(logits, inputs):
        return F.binary_cross_entropy_with_logits(
            scale * logits, inputs["labels"], pos_weight=torch.tensor(weight)
        )

    batch = {"x": torch.randn(4, FEATURES), "labels": torch.randint(2, (4, 3)).float()}
    assert divergence_of(criterion, 3, batch).kind == "labels"


@pytest.mark.parametrize("distance", [F.mse_loss, F.l1_loss, F.smooth_l1_loss])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_values_from_0_to_1_are_told_too(distance, scale):
    def criterion(logits, inputs):
        return distance(logits, inputs["labels"])

    batch = {"x": scale * torch.randn(4, FEATURES), "labels": torch.rand(4, 3)}
    assert divergence_of(criterion, 3, batch).kind == "numbers"


@pytest.mark.parametrize("mark", [-1.0, -100.0, torch.nan])
def test_a_mark_of_a_missing_yes_or_no_does_not_count(mark):
    def criterion(logits, inputs):
        known = (inputs["labels"] >= 0) & (inputs["labels"] <= 1)
        return F.binary_cross_entropy_with_logits(logits[known], inputs["labels"][known])

    labels = torch.randint(2, (4, 3)).float()
    batch = {"x": torch.randn(4, FEATURES), "labels": labels}
    labels[1, 2] = mark
    divergence = divergence_of(criterion, 3, batch)
    assert divergence.kind == "labels"
    assert divergence.head(batch, 4).counts().kl == 11


@pytest.mark.parametrize("ignored", [-1, 7])
def test_rows_whose_label_does_not_count(ignored):
    def criterion(logits, inputs):
        entropy = F.cross_entropy(logits, inputs["labels"], ignore_index=ignored)
        return entropy + 0.1 * logits[inputs["labels"] != ignored].square().mean()

    batch = {"x": torch.randn(4, FEATURES), "labels": torch.tensor([0, ignored, 2, ignored])}
    divergence = divergence_of(criterion, 3, batch)
    assert (divergence.kind, divergence.is_shifted) == ("classes", False)
    assert divergence.head(batch, 4).counts().kl == 2
    # The first batch may have none of them.
    later = {**batch, "labels": torch.tensor([0, 1, 2, 0])}
    assert divergence_of(criterion, 3, later).head(batch, 4).counts().kl == 2


def test_thresholds_are_no_classes_whatever_labels_come_first():
    def criterion(logits, inputs):
        above = inputs["labels"][:, None] > torch.arange(3)
        return F.binary_cross_entropy_with_logits(logits, above.float())

    for labels in ([0, 1, 2, 3], [3, 3, 3, 3], [0, 0, 0, 0]):
        batch = {"x": torch.randn(4, FEATURES), "labels": torch.tensor(labels)}
        with pytest.raises(ValueError, match="the loss is none of classes"):
            divergence_of(criterion, 3, batch)


def test_rows_against_columns_are_classes_both_ways():
    def criterion(logits, inputs):
        which = torch.arange(len(logits))
        return F.cross_entropy(logits, which) + F.cross_entropy(3 * logits.T, which)

    assert divergence_of(criterion, 4, {"x": torch.randn(4, FEATURES)}).kind == "classes"


def test_a_head_that_the_batch_contradicts_is_not_kept():
    labels = MULTI_HOT
    batch = {"x": torch.randn(4, FEATURES), "labels": labels}
    rows = Head({"x": batch["x"]}, labels.reshape(-1), cross_entropy_terms)
    assert divergence_of(focal_labels, 3, batch, rows).kind == "labels"
    narrow = Head({"x": batch["x"]}, torch.tensor([0, 1, 2, 7]), cross_entropy_terms)
    assert divergence_of(focal_labels, 3, batch, narrow).kind == "labels"
    fitting = Head({"x": batch["x"]}, torch.tensor([0, 1, 2, 0]), cross_entropy_terms)
    assert divergence_of(focal_labels, 3, batch, fitting) is None


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_shapes_tell_where_a_reentrant_checkpoint_refuses_to_give_a_slope():
    def criterion(logits, inputs):
        return checkpoint(focal_labels, logits, inputs, use_reentrant=True)

    batch = {"x": torch.randn(4, FEATURES), "labels": MULTI_HOT}
    assert divergence_of(criterion, 3, batch).kind == "labels"


def test_a_slope_for_which_memory_is_missing_is_said(monkeypatch):
    def grad(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.autograd, "grad", grad)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        divergence_of(focal_labels, 3, {"x": torch.randn(4, FEATURES), "labels": MULTI_HOT})


def test_a_head_for_whose_terms_memory_is_missing_is_not_left_for_another():
    def terms(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    batch = {"x": torch.randn(4, FEATURES), "labels": torch.tensor([0, 1, 2, 1])}
    head = Head(batch, batch["labels"], terms, outputs=lambda output: output["scores"])
    model = Plain(F.cross_entropy)

    def compute(inputs, items):
        output = model(**inputs)
        return output["loss"], output

    options = {"head": head, "label_names": ["labels"], "counts_items": False}
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        probe_own_loss(model, compute, batch, **options)


# --- chance -----------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Has chance of its own, that nobody knows as dropout."""

    def __init__(self, draw):
        super().__init__()
        self.out, self.draw = nn.Linear(FEATURES, 3), draw

    def forward(self, x):
        return self.out(self.draw(x) if self.training else x)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.4),
        lambda x: x + 0.3 * torch.randn_like(x),
        lambda x: x * random.random(),
        lambda x: x * np.random.rand(),
    ],
    ids=["dropout", "noise", "python", "numpy"],
)
def test_chance_does_not_make_rows_depend_on_each_other(draw):
    model, given = Noisy(draw), []

    def compute(inputs, items):
        if model.training:
            given.append(len(inputs["x"]))
        logits = model(inputs["x"])
        return F.cross_entropy(logits, inputs["labels"], label_smoothing=0.1), logits

    batch = {"x": torch.randn(4, FEATURES), "labels": torch.tensor([0, 1, 2, 0])}
    before = torch.get_rng_state()
    options = {"head": None, "label_names": ["labels"], "counts_items": False}
    assert probe_own_loss(model, compute, batch, **options).is_rowwise
    assert given == [4, 4]
    assert torch.equal(torch.get_rng_state(), before)


# --- do rows depend on each other ---------------------------------------------------------------


def correlation(logits, inputs):
    z, y = (x.flatten() - x.mean() for x in (logits, inputs["labels"]))
    return 1 - (z * y).sum() / (z.norm() * y.norm() + 1e-8)


def root(logits, inputs):
    return F.mse_loss(logits, inputs["labels"]).sqrt()


def concordance(logits, inputs):
    z, y = logits, inputs["labels"]
    both = ((z - z.mean()) * (y - y.mean())).mean()
    spread = z.var(correction=0) + y.var(correction=0)
    return 1 - 2 * both / (spread + (z.mean() - y.mean()) ** 2)


def with_correlation(logits, inputs):
    return F.mse_loss(logits, inputs["labels"]) + correlation(logits, inputs)


def absolute(logits, inputs):
    return F.l1_loss(logits, inputs["labels"])


def weighted(logits, inputs):
    weight = inputs["labels"].abs()
    return (weight * (logits - inputs["labels"]) ** 2).sum() / weight.sum()


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("rows", [4, 8, 16])
@pytest.mark.parametrize(
    ("criterion", "is_rowwise"),
    [
        (correlation, False),
        (root, False),
        (concordance, False),
        (with_correlation, False),
        (absolute, True),
        (weighted, True),
    ],
)
def test_a_loss_of_the_whole_batch_is_none_of_its_rows(criterion, is_rowwise, rows, scale):
    """Two equal passes have the correlation of one, and the root of a mean is nearly a mean."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.rand(rows, 1, generator=generator) * scale
    batch = {"x": torch.randn(rows, FEATURES, generator=generator), "labels": labels}
    assert found_of(criterion, 1, batch).is_rowwise is is_rowwise


@pytest.mark.parametrize("rows", [8, 16])
def test_the_hardest_half_of_a_batch_depends_on_its_other_rows(rows):
    labels = torch.arange(rows) % 3
    batch = {"x": torch.randn(rows, FEATURES), "labels": labels}

    def hardest(logits, inputs):
        nll = F.cross_entropy(logits, inputs["labels"], reduction="none")
        return nll.topk(len(nll) // 2).values.mean()

    assert not found_of(hardest, 3, batch).is_rowwise


def test_labels_of_positions_and_masks_make_no_rows_depend_on_each_other():
    labels = torch.tensor(
        [[0, 1, 2, -100], [1, 2, -100, -100], [2, 0, 1, 0], [1, -100, -100, -100]]
    )
    mask = (labels != -100).long()
    batch = {"x": torch.randn(4, 4, FEATURES), "labels": labels, "attention_mask": mask}

    def of_labels(logits, inputs):
        return F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())

    def of_mask(logits, inputs):
        nll = F.cross_entropy(
            logits.flatten(0, 1), inputs["labels"].flatten().clamp(min=0), reduction="none"
        )
        counted = inputs["attention_mask"].flatten()
        return (nll * counted).sum() / counted.sum()

    assert found_of(of_labels, 3, batch).is_rowwise
    assert found_of(of_mask, 3, batch).is_rowwise


def test_a_mask_and_ignored_labels_together_make_no_rows_depend_on_each_other():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    labels = torch.randint(3, (4, 4), generator=torch.Generator().manual_seed(0))
    batch = {"x": torch.randn(4, 4, FEATURES), "labels": labels, "attention_mask": mask}

    def active(logits, inputs):
        is_active = inputs["attention_mask"].flatten() == 1
        target = torch.where(is_active, inputs["labels"].flatten(), -100)
        return F.cross_entropy(logits.flatten(0, 1), target)

    assert found_of(active, 3, batch).is_rowwise


@pytest.mark.parametrize("seed", range(5))
def test_rounding_of_half_precision_makes_no_rows_depend_on_each_other(seed):
    torch.manual_seed(seed)
    model = nn.Linear(FEATURES, 3).bfloat16()

    def compute(inputs, items):
        logits = model(inputs["x"])
        return F.cross_entropy(logits, inputs["labels"]), logits

    batch = {"x": torch.randn(8, FEATURES).bfloat16(), "labels": torch.arange(8) % 3}
    options = {"head": None, "label_names": ["labels"], "counts_items": False}
    assert probe_own_loss(model, compute, batch, **options).is_rowwise


# --- numbers from 0 to 1 ------------------------------------------------------------------------


def huber(logits, inputs):
    return F.huber_loss(logits, inputs["labels"], delta=0.3)


def hinge(logits, inputs):
    return (1 - logits * (2 * inputs["labels"] - 1)).clamp(min=0).mean()


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("levels", [1, 4, 1000])
@pytest.mark.parametrize(
    ("criterion", "kind"),
    [(root, "numbers"), (huber, "numbers"), (absolute, "numbers"), (focal_labels, "labels")],
)
def test_numbers_from_0_to_1_are_chances_where_the_loss_draws_a_sigmoid_to_them(
    criterion, kind, levels, width
):
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(levels + 1, (8, width), generator=generator) / levels
    batch = {"x": torch.randn(8, FEATURES, generator=generator), "labels": labels}
    assert divergence_of(criterion, width, batch).kind == kind


def test_a_hinge_is_one_of_yes_or_no():
    labels = MULTI_HOT.float()
    batch = {"x": torch.randn(4, FEATURES), "labels": labels}
    assert divergence_of(hinge, 3, batch).kind == "labels"


# --- what else is said of a loss ----------------------------------------------------------------


def note_of(compute_of, model=None, missing=False):
    model = model or nn.Sequential(nn.Linear(FEATURES, 3), nn.Dropout(0.5))
    batch = {"x": torch.randn(4, FEATURES), "labels": torch.tensor([0, 1, 2, 0])}
    batch["x"][0, 0] = torch.nan if missing else 0.0
    options = {"head": None, "label_names": ["labels"], "counts_items": False}
    return probe_own_loss(model, compute_of(model), batch, **options).note


def plainly(model):
    def compute(inputs, items):
        logits = model(inputs["x"])
        return F.cross_entropy(logits, inputs["labels"]), logits

    return compute


def mixed_up(model):
    def compute(inputs, items):
        x, order = inputs["x"], torch.randperm(len(inputs["x"]))
        share = torch.rand(()) if model.training else torch.ones(())
        logits = model(share * x + (1 - share) * x[order])
        return F.cross_entropy(logits, inputs["labels"]), logits

    return compute


def run_twice(model):
    def compute(inputs, items):
        first, second = model(inputs["x"]), model(inputs["x"])
        return F.cross_entropy(first, inputs["labels"]) + F.mse_loss(first, second), first

    return compute


class OwnDropout(nn.Module):
    """Dropout that no module tells of."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(FEATURES, 3)

    def forward(self, x):
        return self.out(F.dropout(x, 0.5, self.training))


def test_a_batch_that_a_loss_changes_by_chance_is_told_of():
    assert "It changes its batch by chance" in note_of(mixed_up)
    assert note_of(plainly) is None
    assert note_of(plainly, OwnDropout()) is None
    # Numbers that are missing are the same twice.
    assert note_of(plainly, missing=True) is None


def test_a_loss_that_runs_the_model_twice_is_told_of():
    assert "It runs the model 2 times for one batch" in note_of(run_twice)


# --- which output and which items a loss reads --------------------------------------------------


class Several(nn.Module):
    """Scores of pairs of rows, as models of pictures and texts return them, and the rows."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(FEATURES, 4)

    def forward(self, x, **_):
        rows = self.out(x)
        scores = rows @ rows.T
        return {"logits": rows.detach() + 0 * rows, "logits_a": scores.t(), "logits_b": scores}


def test_the_scores_that_the_loss_reads_are_compared():
    """What it returns beside them may be of the same shape, or be made of them."""
    model = Several()

    def compute(inputs, items):
        output = model(**inputs)
        return F.cross_entropy(output["logits_b"], torch.arange(4)), output

    options = {"head": None, "label_names": [], "counts_items": False}
    found = probe_own_loss(model, compute, {"x": torch.randn(4, FEATURES)}, **options)
    assert (found.divergence.kind, found.divergence.logits) == ("classes", "logits_b")


@pytest.mark.parametrize(
    "copy",
    [torch.Tensor.double, torch.clone, lambda x: x.view(2, 2, 3), lambda x: x.unsqueeze(1)[:, 0]],
    ids=["double", "clone", "view", "indexed"],
)
def test_a_copy_of_what_the_loss_reads_is_compared(copy, request):
    """As autocast returns one in single precision."""
    model = Scores(3)

    def compute(inputs, items):
        logits = model(inputs["x"].flatten(0, -2))["logits"]
        return 2 * F.cross_entropy(logits, inputs["labels"].flatten()), {"logits": copy(logits)}

    is_view = "view" in request.node.name
    labels = torch.tensor([[0, 1], [2, 0]]) if is_view else torch.tensor([0, 1, 2, 0])
    batch = {"x": torch.randn(*labels.shape, FEATURES), "labels": labels}
    options = {"head": None, "label_names": ["labels"], "counts_items": False}
    if "indexed" in request.node.name:
        with pytest.raises(ValueError, match="the loss does not depend on"):
            probe_own_loss(model, compute, batch, **options)
        return
    assert probe_own_loss(model, compute, batch, **options).divergence.kind == "classes"


def test_a_loss_whose_margins_are_met_is_not_taken_for_one_of_another_output():
    def met(logits, inputs):
        return F.multi_margin_loss(1e3 * logits, logits.argmax(-1), margin=1e-3)

    batch = {"x": torch.randn(4, FEATURES), "labels": torch.tensor([0, 1, 2, 0])}
    assert divergence_of(met, 3, batch).kind == "classes"


def test_an_output_of_the_labels_shape_is_compared_under_any_name():
    model = Scores(3)

    def compute(inputs, items):
        found = model(inputs["x"])["logits"]
        output = {"spectrum": found, "state": found.mean(-1, keepdim=True)}
        return F.l1_loss(found, inputs["labels"]) * 2, output

    batch = {"x": torch.randn(4, FEATURES), "labels": torch.randn(4, 3)}
    options = {"head": None, "label_names": ["labels"], "counts_items": False}
    found = probe_own_loss(model, compute, batch, **options).divergence
    assert (found.kind, found.logits) == ("numbers", "spectrum")
    options["label_names"] = []
    batch["target"] = batch.pop("labels")
    with pytest.raises(ValueError, match="or give label_names in the Trainer's arguments"):
        probe_own_loss(
            model, lambda b, n: compute({**b, "labels": b["target"]}, n), batch, **options
        )


class Pixels(nn.Module):
    """Classes of coarse pixels in dimension 1."""

    def __init__(self, width=3):
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Conv2d(2, width, 1)

    def forward(self, x, **_):
        return {"logits": self.out(x)}


def divergence_under(model, criterion, batch):
    def compute(inputs, items):
        output = model(**inputs)
        return criterion(output["logits"], inputs), output

    options = {"head": None, "label_names": ["labels"], "counts_items": False}
    return probe_own_loss(model, compute, batch, **options).divergence


def enlarged(logits, inputs):
    whole = F.interpolate(logits, size=inputs["labels"].shape[1:], mode="bilinear")
    return F.cross_entropy(whole, inputs["labels"], ignore_index=255)


def test_the_slope_tells_the_dimension_of_the_classes():
    labels = torch.randint(3, (4, 8, 8), generator=torch.Generator().manual_seed(0))
    batch = {"x": torch.randn(4, 2, 4, 4), "labels": labels}
    found = divergence_under(Pixels(), enlarged, batch)
    assert (found.kind, found.class_dim) == ("classes", 1)
    found.head(batch, 4).terms(
        torch.randn(8, 3, 4, 4), torch.ones(4, dtype=torch.bool), num_passes=2
    )


@pytest.mark.parametrize("size", [3, 4])
def test_a_label_that_the_loss_leaves_out_does_not_count(size):
    """As many pixels a side as classes: shapes alone would not tell the dimension."""
    labels = torch.randint(3, (4, size, size), generator=torch.Generator().manual_seed(0))
    labels[:, 0] = 255
    batch = {"x": torch.randn(4, 2, size, size), "labels": labels}
    found = divergence_under(Pixels(), enlarged, batch)
    assert (found.mask, found.ignore_index, found.class_dim) == ("labels", 255, 1)
    assert torch.equal(found.head(batch, 4).target, labels != 255)
    whole = {**batch, "labels": labels.clamp(max=2)}
    found = divergence_under(Pixels(), enlarged, whole)
    # The first batch has none of them.
    assert torch.equal(found.head(batch, 4).target, labels != 255)


def test_the_slope_for_other_labels_tells_the_dimension_of_the_classes():
    """Of a loss of each class by itself, whose slope does not sum to 0 over the classes."""
    labels = torch.randint(3, (4, 8, 8), generator=torch.Generator().manual_seed(0))

    def by_class(logits, inputs):
        whole = F.interpolate(logits, size=(8, 8), mode="bilinear")
        target = F.one_hot(inputs["labels"], 3).movedim(-1, 1).float()
        return F.binary_cross_entropy_with_logits(whole, target)

    batch = {"x": torch.randn(4, 2, 4, 4), "labels": labels}
    found = divergence_under(Pixels(), by_class, batch)
    assert (found.kind, found.class_dim) == ("classes", 1)


def test_a_term_that_reads_no_label_does_not_hide_the_classes():
    teacher = 4 * torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    batch = {"x": torch.randn(8, FEATURES), "labels": torch.arange(8), "teacher": teacher}

    def distilled(logits, inputs):
        return F.cross_entropy(logits, inputs["labels"]) + F.mse_loss(logits, inputs["teacher"])

    assert divergence_under(Scores(10), distilled, batch).kind == "classes"


@pytest.mark.parametrize("seed", range(6))
def test_a_class_that_is_certain_is_none_that_does_not_count(seed):
    torch.manual_seed(seed)
    batch = {"x": 300 * torch.randn(4, 6, FEATURES), "labels": torch.randint(3, (4, 6))}

    def focal(logits, inputs):
        nll = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="none")
        return ((1 - (-nll).exp()) ** 2 * nll).mean()

    assert divergence_under(Scores(3), focal, batch).ignore_index == -100


@pytest.mark.parametrize("shape", [(6, 4, 3), (24, 3)], ids=["time first", "flat"])
def test_logits_whose_rows_are_not_first_are_refused(shape):
    model = Scores(3)

    def compute(inputs, items):
        logits = model(inputs["x"])["logits"].movedim(1, 0).reshape(shape)
        return logits.square().mean(), {"logits": logits}

    batch = {"x": torch.randn(4, 6, FEATURES), "labels": torch.zeros(4, 6, dtype=torch.long)}
    options = {"head": None, "label_names": ["labels"], "counts_items": False}
    with pytest.raises(ValueError, match="must have the 4 rows of the batch as its first"):
        probe_own_loss(model, compute, batch, **options)


def test_two_numbers_of_1_are_values_where_the_loss_draws_the_logits_to_them():
    batch = {"x": torch.randn(2, FEATURES), "labels": torch.ones(2, 1)}
    assert divergence_of(huber, 1, batch).kind == "numbers"


def test_words_that_are_padded_by_a_word_do_not_count():
    labels = torch.tensor([[1, 2, 0, 0], [2, 1, 1, 0], [1, 1, 2, 2], [2, 0, 0, 0]])
    batch = {"x": torch.randn(4, 4, FEATURES), "labels": labels}

    def padded(logits, inputs):
        chance = logits.softmax(-1)
        nll = F.nll_loss(
            (chance + 1e-3).log().flatten(0, 1), inputs["labels"].flatten(), ignore_index=0
        )
        return nll

    found = divergence_under(Scores(3), padded, batch)
    assert (found.mask, found.ignore_index) == ("labels", 0)


def test_a_mask_of_any_name_tells_which_items_count():
    covered = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    words = torch.randint(3, (int(covered.sum()),))
    batch = {"x": torch.randn(4, 5, FEATURES), "covered": covered, "labels": words}

    def of_covered(logits, inputs):
        return F.cross_entropy(logits[inputs["covered"]], words)

    found = divergence_under(Scores(3), of_covered, batch)
    assert found.mask == "covered"


@pytest.mark.parametrize("is_shifted", [False, True])
def test_words_behind_a_picture_are_the_last_positions(is_shifted):
    labels = torch.tensor([[0, 1, 2, -100], [1, 2, -100, -100], [2, 0, 1, 0], [1, 2, 0, -100]])
    batch = {"x": torch.randn(4, 9, FEATURES), "labels": labels}

    def behind(logits, inputs):
        scores, target = logits[:, -4:], inputs["labels"]
        if is_shifted:
            scores, target = scores[:, :-1], target[:, 1:]
        return 2 * F.cross_entropy(scores.flatten(0, 1), target.flatten())

    found = divergence_under(Scores(3), behind, batch)
    assert (found.mask, found.is_tail, found.is_shifted) == ("labels", True, is_shifted)
    head = found.head(batch, 4)
    stacked = torch.randn(8, 9, 3)
    kl = head.terms(head.outputs({"logits": stacked}), head.target, num_passes=2).kl
    counted = labels != -100
    if is_shifted:
        counted = F.pad(counted[:, 1:], (0, 1), value=False)
    expected = symmetric_kl(stacked[:, -4:], mask=counted, reduction="sum")
    assert kl.sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_features_are_no_scores_of_classes():
    """A loss may have its last layer inside, and return what that reads."""
    model = Scores(5)
    weight = torch.randn(3, 5)
    batch = {"x": torch.randn(8, FEATURES), "labels": torch.arange(8) % 3}
    with pytest.raises(ValueError, match="the loss is none of classes"):
        divergence_under(model, lambda z, b: F.cross_entropy(z @ weight.T, b["labels"]), batch)


def test_logarithms_of_chances_are_scores():
    labels = torch.tensor([[0.3, 0.6, 0.0], [1.0, 0.0, 0.0], [0.0, 0.3, 0.3], [0.0, 0.0, 0.0]])
    batch = {"x": torch.randn(4, FEATURES), "labels": labels}
    model = Scores(3)

    def compute(inputs, items):
        output = {"logits": model(inputs["x"])["logits"].log_softmax(-1)}
        return -(output["logits"] * inputs["labels"]).sum(-1).mean(), output

    options = {"head": None, "label_names": ["labels"], "counts_items": False}
    assert probe_own_loss(model, compute, batch, **options).divergence.kind == "classes"
