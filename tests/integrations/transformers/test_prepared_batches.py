"""A `_prepare_inputs` of one's own that makes the labels, or changes them."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from models import text_rows, tiny_bert
from regdrop import RDropConfig
from regdrop.integrations.transformers import RDropTrainer, RDropTrainerMixin
from training import NamedRows, Plain, assert_same_rdrop_run, assert_same_run, number_rows, train

ONE_PASS = RDropConfig(alpha=0.0, num_passes=1)
SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
OPTIONS = {**SPLIT, "remove_unused_columns": False}


class Renaming(Trainer):
    """Its model's labels have another name in the data."""

    def _prepare_inputs(self, inputs):
        batch = super()._prepare_inputs(inputs)
        batch["labels"] = batch.pop("targets")
        return batch


class RenamingRDrop(RDropTrainerMixin, Renaming):
    pass


def rows(label="targets"):
    return number_rows(torch.arange(16) % 3, label=label)


def texts():
    columns = dict(text_rows().columns)
    return NamedRows(targets=columns.pop("labels"), **columns)


@pytest.mark.parametrize("likelihood", ["auto", "model"])
def test_labels_that_are_made_of_another_column_are_counted(tmp_path, likelihood):
    def run(kind, data):
        config = RDropConfig(alpha=2.0, likelihood=likelihood)
        return train(tmp_path, Plain(F.cross_entropy), data, config, kind, **OPTIONS)

    assert_same_rdrop_run(run(RenamingRDrop, rows()), run(RDropTrainer, rows("labels")))


def test_one_pass_of_a_known_model_is_the_trainers_own(tmp_path):
    def run(kind, rdrop=None):
        model = tiny_bert(dropout=0.0)
        return train(tmp_path, model, texts(), rdrop, kind, remove_unused_columns=False)

    assert_same_run(run(RenamingRDrop, ONE_PASS), run(Renaming), rtol=1e-4)


class Ignoring(RDropTrainer):
    """Takes the labels of some rows away, in place, and draws random numbers."""

    def _prepare_inputs(self, inputs):
        batch = super()._prepare_inputs(inputs)
        batch["x"] = batch["x"] + 0.1 * torch.randn_like(batch["x"])
        batch["labels"] -= 1
        batch["labels"][batch["labels"] < 0] = -100
        return batch


class Noting(Ignoring):
    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append({name: value.clone() for name, value in inputs.items()})
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_labels_are_counted_as_they_are_changed_and_the_run_is_as_without(tmp_path):
    def run(kind, data):
        return train(tmp_path, Plain(F.cross_entropy, dropout=0.0), data, ONE_PASS, kind, **SPLIT)

    data = rows("labels")
    labels = data.columns["labels"].clone()
    changed = run(Noting, data)
    x, found = (torch.cat([batch[name] for batch in changed.seen]) for name in ("x", "labels"))
    assert torch.equal(found, torch.where(labels == 0, -100, labels - 1))
    # The same batches without a `_prepare_inputs`.
    data = number_rows(found)
    data.columns["x"] = x
    assert_same_run(changed, run(RDropTrainer, data), ("loss", "nll"))


class Late(RDropTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs["labels"] = inputs.pop("targets")
        return super().training_step(model, inputs, num_items_in_batch)


def test_labels_that_are_made_too_late_are_named(tmp_path):
    model = Plain(F.cross_entropy, needs_labels=True)
    with pytest.raises(ValueError, match=r"have none of \['labels'\] .* or in _prepare_inputs, or"):
        train(tmp_path, model, rows(), RDropConfig(), Late, **OPTIONS)
