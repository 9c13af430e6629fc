"""The batch by which a trainer learns what a model of one's own minimises: one with labels."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import BartConfig, BartForSequenceClassification

from models import LENGTH, VOCABULARY, key_dropout, text_rows, tiny_bert_of, token_rows
from regdrop import RDropConfig
from regdrop.integrations.transformers.likelihood.selection import _can_be_sent
from regdrop.integrations.transformers.likelihood.source import is_of_library
from training import assert_same_outcome, build, logged, outcome, said, train

sys.path.insert(0, str(Path(__file__).parents[2]))

from sharded_runs import in_two_processes

LOGGED = ("loss", "nll", "kl")


class Tagger(nn.Module):
    """A model that no name tells, whose loss is a mean over the labels of its batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.words, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.dropout(self.words(input_ids)))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def rows_without(*items):
    rows = token_rows()
    for item in items:
        rows.columns["labels"][item] = -100
    return rows


def tag(folder, rows, config, **options):
    model = key_dropout(Tagger())
    return outcome(train(folder, model, rows, config, learning_rate=0.03, **options), LOGGED)


@pytest.mark.parametrize("config", [RDropConfig(alpha=3.0, class_weight=(1.0, 2.0, 3.0))])
def test_it_is_the_first_of_a_window_that_has_a_label(tmp_path, caplog, config):
    rows = rows_without(slice(0, 4))
    whole = tag(tmp_path, rows, config)
    caplog.clear()
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    parts = tag(tmp_path, rows, config, **options)
    assert_same_outcome(parts, whole, least_kl=1e-3)
    assert any("is cross entropy" in line for line in said(caplog))


def tag_in_one_of_two(folder, rows, config):
    options = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    return tag(folder, rows, config, **options)


@pytest.mark.parametrize(
    "unlabelled",
    [
        pytest.param(slice(0, 4), marks=pytest.mark.long, id="first"),
        pytest.param(slice(4, 8), marks=pytest.mark.slow, id="second"),
    ],
)
def test_two_processes_look_at_one_batch(tmp_path, unlabelled):
    """Also where one of them begins with a batch that tells nothing."""
    config = RDropConfig(alpha=3.0, class_weight=(1.0, 2.0, 3.0))
    rows = rows_without(unlabelled)
    found = in_two_processes(tmp_path, tag_in_one_of_two, rows, config)
    assert_same_outcome(found, tag(tmp_path, rows, config), least_kl=1e-3)


def test_a_batch_that_cannot_be_sent_is_examined_where_it_is():
    """Such as one with the mask of flex attention, which holds a function."""
    words = torch.ones(2, 3)
    assert _can_be_sent({"input_ids": words, "name": "a"})
    assert not _can_be_sent({"input_ids": words, "mask": lambda: None})
    assert not _can_be_sent([words])


def test_a_model_whose_parts_accelerate_moves_is_still_the_librarys():
    model = tiny_bert_of("ForTokenClassification")()
    assert is_of_library(model)
    add_hook_to_module(model, ModelHook())
    assert is_of_library(model)
    model.forward = lambda **inputs: None
    del model._old_forward
    assert not is_of_library(model)


def test_a_mean_over_no_item_is_no_part_of_the_log(tmp_path):
    model = tiny_bert_of("ForTokenClassification")()
    config = RDropConfig(alpha=3.0, likelihood="model")
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = train(tmp_path, model, rows_without(slice(4, 8)), config, **options)
    assert torch.tensor(logged(trainer, "nll")).isfinite().all()


def test_several_forwards_that_leave_out_layers_are_refused_under_ddp(tmp_path):
    """DistributedDataParallel would say that a variable is marked ready twice."""
    sizes = {"d_model": 16, "vocab_size": VOCABULARY, "num_labels": 3, "eos_token_id": 2}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_ffn_dim": 16, f"{side}_attention_heads": 2}
    model = BartForSequenceClassification(BartConfig(**sizes, encoder_layerdrop=0.5))
    model.find_unused_parameters = True  # as the module that DDP wraps around it has
    rows = text_rows()
    words = rows.columns["input_ids"]
    words[words == 2] = 3
    words[:, LENGTH - 1] = 2  # one end a text
    trainer = build(tmp_path, model, rows, RDropConfig(alpha=1.0, passes="sequential"))
    with pytest.raises(ValueError, match="passes must be 'stacked', or backward_passes 1, under"):
        trainer.train()
