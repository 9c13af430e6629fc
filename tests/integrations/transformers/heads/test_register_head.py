"""Heads that users register: by class, by the end of a name, in place of what was known."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import tiny_bert_of, token_rows
from regdrop import RDropConfig, rdrop_cross_entropy
from regdrop.heads import Head, UnknownHeadError
from regdrop.integrations.transformers import find_head, register_head
from regdrop.integrations.transformers.heads import registry
from regdrop.loss import mse_terms
from training import Plain, logged, number_rows, record_scores, said, train

LABELS = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    for name in ("_OF_CLASS", "_OF_ENDING"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


class Scorer(Plain):
    """A model of one's own, whose loss has weights that no name tells."""


class HeirOfScorer(Scorer):
    """Another one, which predicts the same."""


def classes_of_scores(batch):
    return replace(batch.classes(batch.pop()), outputs=lambda output: output["scores"])


def scorer(kind=Scorer):
    return kind(lambda scores, labels: 3 * F.cross_entropy(scores, labels))


@pytest.mark.parametrize("kind", [Scorer, HeirOfScorer])
def test_a_head_of_a_class_is_minimised_and_its_difference_said(tmp_path, kind, caplog):
    register_head(Scorer, classes_of_scores)
    model = scorer(kind)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    seen = record_scores(model)
    with caplog.at_level(logging.WARNING):
        trainer = train(tmp_path, model, number_rows(LABELS), RDropConfig(alpha=2.0), max_steps=1,
                        remove_unused_columns=False)  # fmt: skip
    expected = rdrop_cross_entropy(seen[0], LABELS[:8], alpha=2.0, scale="mean")
    assert logged(trainer, "loss") == [pytest.approx(expected.loss.item(), rel=1e-4)]
    assert any("the former is minimised" in line for line in said(caplog))
    assert any(not torch.equal(p, start[name]) for name, p in model.state_dict().items())


def test_without_one_a_class_is_not_known():
    with pytest.raises(UnknownHeadError, match=r"got Scorer.*register_head says it for a class"):
        find_head(scorer(), {"x": torch.ones(2, 6), "labels": LABELS[:2]})


def test_a_longer_end_of_a_name_comes_before_a_shorter_one():
    model = tiny_bert_of("ForTokenClassification")()
    batch = token_rows().columns

    def numbers(batch):
        return Head(batch.inputs, batch.pop().float(), mse_terms)

    known = find_head(model, batch).terms
    register_head("BertForTokenClassification", numbers)
    assert find_head(model, batch).terms is mse_terms
    register_head("TokenClassification", lambda batch: pytest.fail("a shorter end"))
    assert find_head(model, batch).terms is mse_terms
    register_head(type(model), lambda batch: replace(numbers(batch), terms=known))
    assert find_head(model, batch).terms is known


def test_a_kind_is_a_class_or_a_name():
    with pytest.raises(TypeError, match="kind must be a class or the end of a class's name, got L"):
        register_head(nn.Linear(2, 2), classes_of_scores)
