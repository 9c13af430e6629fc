"""Heads of one's own by `rdrop_head`: their counts, and the model's own loss beside them."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from models import (
    image_rows,
    key_dropout,
    text_rows,
    tiny_bert,
    tiny_bert_of,
    tiny_gpt2,
    tiny_vit,
    token_rows,
)
from regdrop import RDropConfig, symmetric_kl
from regdrop.integrations.transformers import Head, RDropTrainer
from regdrop.loss import ItemCounts, ItemTerms, cross_entropy_terms
from training import assert_same_run, logged, record_scores, said, train

ONE_PASS = RDropConfig(alpha=0.0, num_passes=1)
SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def own(terms, count=None, logits="logits"):
    """Return a trainer whose head has those terms."""

    class Own(RDropTrainer):
        def rdrop_head(self, model, inputs):
            batch = dict(inputs)
            target = batch.pop("labels")
            read = lambda output: getattr(output, logits)  # noqa: E731
            return Head(batch, target, terms, read, count=count)

    return Own


def focal_terms(logits, target, /, *, num_passes):
    entropy = F.cross_entropy(logits, target.repeat(num_passes), reduction="none")
    nll = ((1 - (-entropy).exp()) ** 2 * entropy).view(num_passes, -1).mean(0)
    kl = (
        symmetric_kl(logits, num_passes=num_passes, reduction="none") if num_passes > 1 else 0 * nll
    )
    count = torch.tensor(float(len(nll)))
    return ItemTerms(nll, kl, count, count)


def sequence_terms(logits, target, /, *, num_passes):
    """Return one item a sequence, the sum over its words, as a loss of whole sequences is."""
    labels = target.repeat(num_passes, 1)
    entropy = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    nll = entropy.sum(1).view(num_passes, -1).mean(0)
    kl = 0 * nll
    if num_passes > 1:
        kl = symmetric_kl(logits, num_passes=num_passes, reduction="none").sum(1)
    count = torch.tensor(float(len(nll)))
    return ItemTerms(nll, kl, count, count)


def words():
    rows = token_rows()
    rows.columns["labels"] = rows.columns["labels"].clamp(min=0)
    return rows


def test_soft_labels(tmp_path):
    rows = image_rows()
    labels = torch.rand(16, 3, generator=torch.Generator().manual_seed(2)).softmax(-1)
    rows.columns["labels"] = labels
    model = tiny_vit()
    seen = record_scores(model, "logits")
    trainer = train(
        tmp_path, model, rows, RDropConfig(alpha=2.0), own(cross_entropy_terms), max_steps=1
    )
    nll = F.cross_entropy(seen[0], labels[:8].repeat(2, 1))
    kl = symmetric_kl(seen[0])
    assert logged(trainer, "nll") == [pytest.approx(nll.item(), rel=1e-5)]
    assert logged(trainer, "loss") == [pytest.approx((nll + kl).item(), rel=1e-5)]


def test_one_item_a_sequence(tmp_path):
    def run(rdrop, **options):
        model = key_dropout(tiny_bert_of("ForTokenClassification")(dropout=0.3))
        seen = record_scores(model, "logits")
        kind = own(sequence_terms)
        return train(tmp_path, model, words(), rdrop, kind, **options), seen

    config = RDropConfig(alpha=2.0)
    whole, seen = run(config)
    labels = words().columns["labels"]
    nll = F.cross_entropy(seen[0].transpose(1, 2), labels[:8].repeat(2, 1), reduction="none").sum(1)
    kl = symmetric_kl(seen[0], reduction="none").sum(1).mean()
    assert logged(whole, "nll")[0] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert logged(whole, "loss")[0] == pytest.approx((nll.mean() + kl).item(), rel=1e-5)
    # Their count, found on the first batch, is that of the window.
    assert_same_run(run(config, **SPLIT)[0], whole, rtol=1e-4)


def test_a_number_to_predict_may_be_minus_100(tmp_path):
    def run(kind, rdrop=None):
        rows = text_rows(16, 1, "regression")
        rows.columns["labels"][::2] = -100.0
        options = {"learning_rate": 1e-4}
        return train(tmp_path, tiny_bert(1), rows, rdrop, kind, **options)

    assert_same_run(run(RDropTrainer, ONE_PASS), run(Trainer))


@pytest.mark.parametrize("backward_passes", [1, 2])
def test_terms_that_know_nothing_of_backward_passes(tmp_path, backward_passes):
    def run(passes):
        config = RDropConfig(num_passes=3, backward_passes=passes)
        with pytest.warns(UserWarning, match="R-Drop has nothing to compare"):
            return train(tmp_path, tiny_bert(dropout=0.0), text_rows(), config, own(focal_terms))

    assert_same_run(run(backward_passes), run(None))


# --- the model's own loss beside it -----------------------------------------------------------


def test_a_forgotten_causal_shift_is_refused(tmp_path):
    kind = own(cross_entropy_terms)
    with pytest.raises(ValueError, match=r"rdrop_head gives .*a causal model needs its labels mov"):
        train(tmp_path, tiny_gpt2(), token_rows(), RDropConfig(), kind)


def test_a_causal_shift_that_is_not_forgotten_is_not(tmp_path, caplog):
    class Moved(RDropTrainer):
        def rdrop_head(self, model, inputs):
            batch = dict(inputs)
            target = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
            return Head(batch, target, cross_entropy_terms)

    def run(kind):
        return train(tmp_path, tiny_gpt2(), token_rows(), RDropConfig(), kind)

    with caplog.at_level(logging.WARNING):
        ours = run(Moved)
    assert said(caplog) == []
    assert_same_run(ours, run(RDropTrainer))


def test_another_loss_of_ones_own_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, tiny_bert(), text_rows(), RDropConfig(), own(focal_terms))
    assert len(said(caplog)) == 1
    assert "rdrop_head gives an NLL of" in said(caplog)[0]
    assert "the former is minimised" in said(caplog)[0]


# --- counts -----------------------------------------------------------------------------------


def halved_terms(logits, target, /, *, num_passes):
    """Return terms that count every second word alone."""
    terms = cross_entropy_terms(logits[:, ::2], target[:, ::2], num_passes=num_passes)
    return ItemTerms(*terms)


def count_every_second(target):
    count = (target[:, ::2] != -100).sum()
    return ItemCounts(count, count)


def count_all(target):
    count = (target != -100).sum()
    return ItemCounts(count, count)


def test_a_count_that_no_rule_tells_is_asked_for(tmp_path):
    model = tiny_bert_of("ForTokenClassification")
    with pytest.raises(ValueError, match=r"count must be given for the Head of rdrop_head: its te"):
        train(tmp_path, model(), token_rows(), RDropConfig(), own(halved_terms))
    kind = own(halved_terms, count_every_second)
    whole = train(tmp_path, key_dropout(model()), token_rows(), RDropConfig(), kind)
    parts = train(tmp_path, key_dropout(model()), token_rows(), RDropConfig(), kind, **SPLIT)
    assert_same_run(parts, whole, rtol=1e-4)


@pytest.mark.parametrize("terms", [halved_terms, cross_entropy_terms])
def test_a_count_that_is_not_the_terms_own_is_refused_on_the_first_batch(tmp_path, terms):
    count = count_all if terms is halved_terms else count_every_second
    model = tiny_bert_of("ForTokenClassification")()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"count of rdrop_head's Head must give what its terms co"):
        train(tmp_path, model, token_rows(), RDropConfig(), own(terms, count))
    assert all(map(torch.equal, before, model.parameters()))


def test_a_count_that_fits_the_first_batch_alone_is_refused_later(tmp_path):
    """The first eight rows have all of their labels, so that words and numbers count alike."""
    rows = token_rows()
    rows.columns["labels"][:8].clamp_(min=0)

    def terms(logits, target, /, *, num_passes):
        return ItemTerms(*cross_entropy_terms(logits, target, num_passes=num_passes))

    def numbers(target):
        count = torch.tensor(target.numel())
        return ItemCounts(count, count)

    model = tiny_bert_of("ForTokenClassification")()
    with pytest.raises(ValueError, match=r"count of rdrop_head's Head must give what its terms co"):
        train(tmp_path, model, rows, RDropConfig(), own(terms, numbers))


def test_a_part_of_a_known_head_may_be_replaced(tmp_path):
    class Smoothed(RDropTrainer):
        def rdrop_head(self, model, inputs):
            head = super().rdrop_head(model, inputs)

            def terms(logits, target, /, *, num_passes):
                return cross_entropy_terms(
                    logits, target, num_passes=num_passes, label_smoothing=0.2
                )

            return replace(head, terms=terms, takes_kernel=False)

    ours = train(tmp_path, tiny_bert(), text_rows(), RDropConfig(), Smoothed)
    plain = train(tmp_path, tiny_bert(), text_rows(), RDropConfig(), label_smoothing_factor=0.2)
    assert_same_run(ours, plain)


class Shifting(RDropTrainer):
    """Brings batches to where the model reads them, as the Trainer brings them to a GPU."""

    def _prepare_inputs(self, inputs):
        away = int(inputs["input_ids"].min()) >= 1_000
        ids = inputs["input_ids"] - 1_000 if away else inputs["input_ids"]
        return super()._prepare_inputs({**inputs, "input_ids": ids})


@pytest.mark.parametrize("likelihood", ["auto", "model"])
def test_the_first_batch_is_looked_at_where_the_model_is(tmp_path, likelihood):
    def run(kind, offset):
        rows = text_rows(16, 3)
        rows.columns["input_ids"] = rows.columns["input_ids"] + offset
        config = replace(ONE_PASS, likelihood=likelihood)
        return train(tmp_path, tiny_bert(3), rows, config, kind, **SPLIT)

    assert_same_run(run(Shifting, 1_000), run(RDropTrainer, 0))
