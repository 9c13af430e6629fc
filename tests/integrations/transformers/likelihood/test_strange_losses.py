"""Classes and losses of somebody's own that do in training, or later, what a first look misses."""

import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, Trainer

from models import Rows, text_rows, tiny_bert
from regdrop import RDropConfig
from regdrop.integrations.transformers import RDropTrainer, RDropTrainerMixin
from training import logged, said, train

ONE_PASS = RDropConfig(alpha=0.0, num_passes=1)
ROWS, FEATURES, CLASSES = 8, 6, 5


def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    return Rows(x=x, labels=torch.arange(ROWS) % CLASSES)


def run(folder, model, data, kind=RDropTrainer, collate=None, rdrop=None, **options):
    """Train a step, of four rows if nothing else is said."""
    further = {} if collate is None else {"data_collator": collate}
    torch.manual_seed(0)
    steps = {"max_steps": 1, "per_device_train_batch_size": 4, "remove_unused_columns": False}
    return train(folder, model, data, rdrop, kind, further, **{**steps, **options})


class Classifier(nn.Module):
    """A classifier by the name of its class, whose loss a subclass says."""

    def __init__(self, rate=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.config = BertConfig(num_labels=CLASSES)
        self.layer, self.dropout = nn.Linear(FEATURES, CLASSES), nn.Dropout(rate)

    def forward(self, x, labels=None):
        logits = self.layer(self.dropout(x))
        if labels is None:
            return {"logits": logits}
        return {"loss": self.loss(logits, labels), "logits": logits}


class MarginForSequenceClassification(Classifier):
    def loss(self, logits, labels):
        margin = 3 * F.one_hot(labels, CLASSES) if self.training else 0
        return F.cross_entropy(logits - margin, labels)


class SmoothForSequenceClassification(Classifier):
    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=0.3 if self.training else 0.0)


class NormedForSequenceClassification(Classifier):
    """With the term on the normaliser that keeps logits small."""

    def loss(self, logits, labels):
        entropy = F.cross_entropy(logits, labels)
        return entropy + 1e-3 * logits.logsumexp(-1).square().mean()


def first_loss(make, folder, kind=RDropTrainer, **options):
    return logged(run(folder, make(), rows(), kind, **options), "loss")


@pytest.mark.parametrize(
    "make",
    [
        MarginForSequenceClassification,
        SmoothForSequenceClassification,
        NormedForSequenceClassification,
    ],
)
def test_a_loss_that_is_another_in_training_is_minimised_as_it_is(make, tmp_path, caplog):
    expected = first_loss(make, tmp_path, Trainer)
    with caplog.at_level(logging.WARNING):
        found = first_loss(make, tmp_path, rdrop=ONE_PASS)
    assert found == pytest.approx(expected, rel=1e-5)
    assert any("has a loss of its own" in line for line in said(caplog))


def with_normaliser():
    """Return a model of the library whose forward adds a small term, for this object alone."""
    model = tiny_bert(dropout=0.0)
    original = model.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 1e-3 * output.logits.logsumexp(-1).square().mean()
        return output

    model.forward = forward
    return model


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_a_forward_that_was_replaced_is_no_longer_the_librarys(tmp_path, caplog, options):
    kept = {"remove_unused_columns": False, **options}
    expected = logged(run(tmp_path, with_normaliser(), text_rows(), Trainer, **kept), "loss")
    with caplog.at_level(logging.WARNING):
        found = run(tmp_path, with_normaliser(), text_rows(), rdrop=ONE_PASS, **kept)
        plain = run(tmp_path, tiny_bert(dropout=0.0), text_rows(), rdrop=ONE_PASS, **kept)
    assert logged(found, "loss") == pytest.approx(expected, rel=1e-5)
    assert len(said(caplog)) == 1
    assert "BertForSequenceClassification has a loss of its own" in said(caplog)[0]
    assert plain._source.own is None


def test_a_loss_in_training_alone_is_named(tmp_path):
    class TrainedForSequenceClassification(Classifier):
        def forward(self, x, labels=None):
            output = super().forward(x, labels)
            return output if self.training else {"logits": output["logits"]}

        def loss(self, logits, labels):
            return 5 * F.cross_entropy(logits, labels)

    with pytest.raises(ValueError, match="has a loss of its own, in training mode alone"):
        first_loss(TrainedForSequenceClassification, tmp_path, rdrop=ONE_PASS)


def test_a_loss_that_becomes_another_is_told(tmp_path, caplog):
    class GrowingForSequenceClassification(Classifier):
        weight = 0.0

        def loss(self, logits, labels):
            found = F.cross_entropy(logits, labels) + self.weight
            if self.training and torch.is_grad_enabled():
                self.weight += 1.0
            return found

    model = GrowingForSequenceClassification()
    original = model.forward

    def forward(x, labels=None):
        output = original(x, labels)
        model.weight = 3.0 if model.training and labels is None else model.weight
        return output

    model.forward = forward
    with caplog.at_level(logging.WARNING):
        run(tmp_path, model, rows(), rdrop=ONE_PASS, max_steps=2)
    assert any("in step 1 the loss of GrowingFor" in line for line in said(caplog))


class TwoTowers(nn.Module):
    """Scores every query against the documents of the batch; the collator numbers them."""

    def __init__(self, rate=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.document = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8)
        self.dropout = nn.Dropout(rate)

    def forward(self, x, labels=None):
        scores = self.query(self.dropout(x)) @ self.document(self.dropout(x)).T
        if labels is None:
            return {"logits": scores}
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


def in_the_batch(samples):
    x = torch.stack([sample["x"] for sample in samples])
    return {"x": x, "labels": torch.arange(len(x))}


@pytest.mark.filterwarnings("ignore:R-Drop has nothing to compare")
def test_rows_that_are_scored_against_each_other_are_not_stacked(tmp_path, caplog):
    expected = first_loss(lambda: TwoTowers(0.0), tmp_path, Trainer, collate=in_the_batch)
    with caplog.at_level(logging.WARNING):
        found = first_loss(
            lambda: TwoTowers(0.0),
            tmp_path,
            rdrop=RDropConfig(alpha=1.0),
            collate=in_the_batch,
        )
    assert found == pytest.approx(expected, rel=1e-5)
    reason = "passes run one after the other, not stacked: the outputs of its rows depend on"
    assert any(reason in line for line in said(caplog))


@pytest.mark.filterwarnings("ignore:R-Drop has nothing to compare")
def test_a_table_of_as_many_rows_as_the_batch_is_not_stacked(tmp_path):
    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(FEATURES, FEATURES)

        def forward(self, x, prototypes, labels=None):
            logits = self.layer(x) @ prototypes.T
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    table = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(3))

    def collate(samples):
        x = torch.stack([sample["x"] for sample in samples])
        labels = torch.tensor([sample["labels"] % 4 for sample in samples])
        return {"x": x, "prototypes": table, "labels": labels}

    expected = first_loss(Prototypes, tmp_path, Trainer, collate=collate)
    found = first_loss(Prototypes, tmp_path, rdrop=RDropConfig(), collate=collate)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rdrop", [ONE_PASS, RDropConfig(), RDropConfig(passes="sequential")])
def test_a_forward_that_writes_into_its_input(rdrop, tmp_path):
    class InPlaceForSequenceClassification(Classifier):
        def forward(self, x, labels=None):
            return super().forward(x.sub_(0.5).div_(2.0), labels)

        def loss(self, logits, labels):
            return F.cross_entropy(logits, labels)

    def collate(samples):
        x = torch.stack([sample["x"] for sample in samples])
        return {"x": x, "labels": torch.tensor([sample["labels"] for sample in samples])}

    options = {"collate": collate}
    expected = first_loss(InPlaceForSequenceClassification, tmp_path, Trainer, **options)
    found = first_loss(InPlaceForSequenceClassification, tmp_path, rdrop=rdrop, **options)
    assert found == pytest.approx(expected, rel=1e-5)


def text(length=5):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, 20, (ROWS, length), generator=generator)
    return Rows(input_ids=words, labels=torch.arange(ROWS) % 2)


def test_a_training_step_that_forgets_the_count(tmp_path):
    class Forgets(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs)

    class RDropForgets(RDropTrainerMixin, Forgets):
        pass

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    losses = []
    for kind, rdrop in ((Forgets, None), (RDropForgets, ONE_PASS)):
        trainer = run(tmp_path, tiny_bert(), text(), kind, rdrop=rdrop, **options)
        losses.append(logged(trainer, "loss")[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_labels_that_change_after_they_were_counted_are_named(tmp_path):
    class Masks(RDropTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs["labels"] = torch.full_like(inputs["labels"], -100)
            return super().training_step(model, inputs, num_items_in_batch)

    with pytest.raises(ValueError, match="4 items, got 0 in compute_loss: change labels in the da"):
        run(tmp_path, tiny_bert(), text(), Masks)


def test_an_evaluation_in_training_mode_is_one_pass(tmp_path):
    class MonteCarlo(RDropTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            model.train()
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    trainer = run(tmp_path, tiny_bert(), text(), MonteCarlo, rdrop=RDropConfig(alpha=1.0))
    assert trainer.predict(text()).predictions.shape[0] == ROWS


def test_a_second_run_looks_at_its_own_loss(tmp_path):
    trainer = run(tmp_path, tiny_bert(), text(), rdrop=ONE_PASS)
    first = logged(trainer, "loss")[-1]
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: (
        7 * F.cross_entropy(outputs["logits"], labels)
    )
    trainer.train()
    assert logged(trainer, "loss")[-1] > 3 * first


def test_batches_that_are_no_mapping_are_named(tmp_path):
    def collate(samples):
        return tuple(torch.stack([sample["input_ids"] for sample in samples]) for _ in range(2))

    with pytest.raises(TypeError, match="a batch must be a mapping from names to tensors, got tup"):
        run(tmp_path, tiny_bert(), text(), collate=collate)


def test_probabilities_are_no_scores(tmp_path):
    class Shares(Classifier):
        def forward(self, x, labels=None):
            shares = self.layer(x).softmax(-1)
            loss = None if labels is None else F.nll_loss(shares.log(), labels)
            return {"loss": loss, "probabilities": shares}

    with pytest.raises(ValueError, match="'probabilities' holds probabilities, which sum to 1"):
        first_loss(Shares, tmp_path, rdrop=RDropConfig(likelihood="model"))


def test_an_auxiliary_loss_that_is_only_reported(tmp_path):
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(FEATURES, CLASSES)

        def forward(self, x, labels=None):
            logits = self.layer(x)
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return type("Output", (dict,), {"aux_loss": logits.mean()})(loss=loss, logits=logits)

    expected = first_loss(Watched, tmp_path, Trainer)
    assert first_loss(Watched, tmp_path, rdrop=ONE_PASS) == pytest.approx(expected, rel=1e-5)
