"""A part that is computed once, under the Trainer."""

import pytest
import torch
from transformers import BertForMultipleChoice

from models import VOCABULARY, Rows, image_rows, text_rows, tiny_bert, tiny_gpt2, tiny_vit
from regdrop import RDropConfig, share_prefix
from regdrop.integrations.transformers import RDropTrainer
from training import arguments, assert_same_rdrop_run, logged


def bert():
    """Return a BERT whose only dropout is its classifier's."""
    return tiny_bert(dropout=0.0, classifier_dropout=0.3)


def multiple_choice():
    torch.manual_seed(5)
    return BertForMultipleChoice(bert().config)


def choices(size=16):
    words = torch.randint(64, VOCABULARY, (size, 3, 7), generator=torch.Generator().manual_seed(1))
    return Rows(input_ids=words, labels=torch.arange(size) % 3)


def sentences():
    rows = text_rows()
    rows.columns["labels"] = rows.columns["input_ids"]
    return rows


def run(folder, model, rows, rdrop=None, until=None, **options):
    # With clipping, norms are logged.
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 6,
        "learning_rate": 0.05,
        "max_grad_norm": 1.0,
    }
    trainer = RDropTrainer(
        model=model,
        args=arguments(folder, **{**defaults, **options}),
        train_dataset=rows,
        eval_dataset=rows,
        rdrop=RDropConfig(alpha=2.0) if rdrop is None else rdrop,
    )
    if until is not None:
        share_prefix(model, until, check_every=3)
    trainer.train()
    return trainer


def note_rows(module):
    rows = []
    module.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len((*args, *kwargs.values())[0])),
        with_kwargs=True,
    )
    return rows


@pytest.mark.parametrize(
    ("build", "rows", "until"),
    [
        (bert, text_rows, "bert"),
        (bert, text_rows, "bert.encoder"),
        (bert, text_rows, "bert.embeddings"),
        (tiny_vit, image_rows, "vit.embeddings.patch_embeddings"),
        (tiny_gpt2, sentences, "transformer.wte"),
        (multiple_choice, choices, "bert"),
    ],
)
def test_the_run_is_that_of_plain_stacked_passes(tmp_path, build, rows, until):
    plain = run(tmp_path, build(), rows())
    assert_same_rdrop_run(run(tmp_path, build(), rows(), until=until), plain)


@pytest.mark.parametrize(
    "rdrop",
    [
        RDropConfig(alpha=2.0, num_passes=3),
        RDropConfig(alpha=2.0, fraction=0.5),
        RDropConfig(alpha=2.0, fraction=0.5, num_passes=3, backward_passes=1),
        RDropConfig(alpha=2.0, backward_passes=1),
        RDropConfig(alpha=2.0, num_passes=3, backward_passes=1),
        RDropConfig(alpha=2.0, every_n_steps=2, monitor_steps=1),
        RDropConfig(alpha=2.0, passes="sequential"),
    ],
    ids=["three", "half", "half of three", "one backward", "one of three", "second", "sequential"],
)
@pytest.mark.parametrize("build", [bert, multiple_choice])
def test_every_way_of_training_stays_the_same(tmp_path, rdrop, build):
    rows = text_rows() if build is bert else choices()
    plain = run(tmp_path, build(), rows, rdrop)
    assert_same_rdrop_run(run(tmp_path, build(), rows, rdrop, until="bert"), plain)


def test_rows_of_steps_of_one_pass_monitoring_and_evaluation(tmp_path):
    model = bert()
    rows = note_rows(model.bert.embeddings)
    rdrop = RDropConfig(alpha=2.0, every_n_steps=2, monitor_steps=1)
    options = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 16}
    trainer = run(tmp_path, model, text_rows(), rdrop, until="bert", **options)
    # The first batch without and with its labels, the checked first step, then one pass with its
    # monitor.
    assert rows == [8, 8, 16, 8, 8, 8, 8, 8, 8]
    rows.clear()
    with_sharing = trainer.evaluate()["eval_loss"]
    assert rows == [16]
    plain = run(tmp_path, bert(), text_rows(), rdrop, **options)
    assert plain.evaluate()["eval_loss"] == pytest.approx(with_sharing, rel=1e-5)


def test_accumulation_and_bfloat16(tmp_path):
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 3,
    }
    plain = run(tmp_path, bert(), text_rows(), **options)
    assert_same_rdrop_run(run(tmp_path, bert(), text_rows(), until="bert", **options), plain)
    mixed = run(tmp_path, bert(), text_rows(), until="bert", bf16=True, **options)
    assert logged(mixed, "loss") == pytest.approx(logged(plain, "loss"), rel=0.05)
    assert logged(mixed, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=0.1)


def test_checkpointing_that_the_arguments_switch_on_is_refused_in_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="uses gradient checkpointing"):
        run(tmp_path, bert(), text_rows(), until="bert", gradient_checkpointing=True)


def test_a_part_behind_dropout_is_refused_in_the_first_step(tmp_path):
    model = bert()
    model.bert.embeddings.dropout.p = 0.1
    with pytest.raises(ValueError, match=r"until='bert\.encoder'.*dropout acts before it"):
        run(tmp_path, model, text_rows(), until="bert.encoder")
