import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import BertForPreTraining, Trainer

import reference
from models import Rows, image_rows, text_rows, tiny_bert, tiny_vit
from regdrop import RDropConfig
from regdrop.integrations.transformers import Head, RDropTrainer, RDropTrainerMixin
from regdrop.loss import cross_entropy_terms
from training import BY_ITSELF, build, logged, parameters, train

ONE_PASS = RDropConfig(alpha=0.0, num_passes=1)


def run(folder, model=None, rows=None, rdrop=None, kind=RDropTrainer, **options):
    """Train for four steps, on sentences."""
    model = tiny_bert() if model is None else model
    rows = text_rows() if rows is None else rows
    return train(folder, model, rows, rdrop, kind, **{"max_steps": 4, **options})


def count_forwards(model, training=True):
    """Note the rows of every forward in a mode and the names of what it is given."""
    calls = []

    def note(module, args, kwargs):
        if module.training is training:
            calls.append((len(next(iter(kwargs.values()))), set(kwargs)))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


# --- without R-Drop it is the Trainer --------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "rows", "num_labels", "problem_type"),
    [
        (tiny_bert, text_rows, 3, None),
        (tiny_bert, text_rows, 3, "multi_label_classification"),
        (tiny_bert, text_rows, 1, "regression"),
        (tiny_vit, image_rows, 3, None),
    ],
)
def test_one_pass_is_the_plain_trainer_step_for_step(
    tmp_path, make, rows, num_labels, problem_type
):
    def trained(kind, rdrop=None):
        data = rows(16, num_labels, problem_type)
        return run(tmp_path, make(num_labels, problem_type), data, rdrop, kind)

    plain, ours = trained(Trainer), trained(RDropTrainer, ONE_PASS)
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    for x, y in zip(parameters(ours), parameters(plain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_one_pass_is_the_plain_trainer_under_accumulation_where_the_models_loss_is_exact(tmp_path):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    plain = run(tmp_path, tiny_vit(), image_rows(), kind=Trainer, **options)
    ours = run(tmp_path, tiny_vit(), image_rows(), ONE_PASS, **options)
    for x, y in zip(parameters(ours), parameters(plain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_our_gradient_is_right_under_accumulation_where_the_models_loss_is_not(tmp_path):
    def gradient_norm(kind, **options):
        model = tiny_bert(dropout=0.0)
        rdrop = ONE_PASS if kind is RDropTrainer else None
        # Where nothing limits the norm, none is logged.
        options = {"max_grad_norm": 1.0, "max_steps": 1, **options}
        return logged(run(tmp_path, model, rdrop=rdrop, kind=kind, **options), "grad_norm")[0]

    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    truth = gradient_norm(Trainer)
    assert gradient_norm(RDropTrainer) == pytest.approx(truth, rel=1e-5)
    assert gradient_norm(RDropTrainer, **split) == pytest.approx(truth, rel=1e-5)
    # BERT's own loss ignores the number of items in the window (seen in 5.23, not in 5.3).
    if Version(transformers.__version__) >= Version("5.23"):
        assert gradient_norm(Trainer, **split) == pytest.approx(4 * truth, rel=1e-4)


# --- training --------------------------------------------------------------------------------


def test_labels_are_not_sent_through_the_model_and_the_batch_is_stacked_once(tmp_path):
    model = tiny_bert()
    calls = count_forwards(model)
    run(tmp_path, model, rdrop=RDropConfig(), max_steps=2)
    assert [rows for rows, _ in calls] == [16, 16]
    assert all("labels" not in names for _, names in calls)


def test_logged_parts_are_means_over_all_items_since_the_last_log(tmp_path):
    outputs = []

    class Recording(RDropTrainer):
        def rdrop_head(self, model, inputs):
            def terms(logits, target, **options):
                if logits.requires_grad:  # and not when the first batch is looked at
                    outputs.append((logits.detach().clone(), target.clone()))
                return cross_entropy_terms(logits, target, **options)

            return replace(super().rdrop_head(model, inputs), terms=terms, takes_kernel=False)

    # Micro-batches of 4 and 2 items, ignored labels among them; one log in the end.
    rows = text_rows(10)
    rows.columns["labels"][[1, 4, 5]] = -100
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "logging_steps": 3}
    trainer = run(
        tmp_path, rows=rows, rdrop=RDropConfig(alpha=2.0), kind=Recording, max_steps=-1, **options
    )
    items = [item for logits, target in outputs for item in reference.rdrop_items(logits, target)]
    assert len(items) == 7
    assert logged(trainer, "nll") == [pytest.approx(np.mean([i[0] for i in items]), rel=1e-5)]
    assert logged(trainer, "kl") == [pytest.approx(np.mean([i[1] for i in items]), rel=1e-4)]
    assert logged(trainer, "alpha") == [2.0]


def test_loss_is_the_sum_of_its_logged_parts(tmp_path):
    trainer = run(tmp_path, rdrop=RDropConfig(alpha=3.0))
    for loss, nll, kl in zip(*(logged(trainer, n) for n in ("loss", "nll", "kl")), strict=True):
        assert loss == pytest.approx(nll + 3 / 2 * kl, rel=1e-4)


@pytest.mark.parametrize(
    "rdrop",
    [
        RDropConfig(alpha=2.0, backward_passes=1),
        RDropConfig(alpha=2.0, fraction=0.5),
        RDropConfig(alpha=2.0, fraction=0.25, backward_passes=1),
        RDropConfig(alpha=2.0, num_passes=3),
        RDropConfig(alpha=2.0, passes="sequential", dropout_rates=(0.1, 0.3)),
        RDropConfig(alpha=2.0, every_n_steps=3, start_step=2, monitor_steps=5),
        RDropConfig(alpha=2.0, scale="sum"),
    ],
    ids=lambda config: ",".join(
        f"{k}={v}" for k, v in config.to_dict().items() if v != getattr(RDropConfig(), k)
    ),
)
def test_every_way_of_training_fits_the_data(tmp_path, rdrop):
    trainer = run(tmp_path, rdrop=rdrop, max_steps=60, learning_rate=3e-3, **BY_ITSELF)
    nll = logged(trainer, "nll")
    assert np.mean(nll[-5:]) < 0.85 * np.mean(nll[:5])
    assert all(kl > 0 for kl in logged(trainer, "kl"))
    assert trainer.evaluate()["eval_loss"] < 0.6 * nll[0]


def test_steps_without_divergence_have_one_pass(tmp_path):
    model = tiny_bert()
    calls = count_forwards(model)
    run(tmp_path, model, rdrop=RDropConfig(every_n_steps=2, start_step=1))
    assert [rows for rows, _ in calls] == [8, 16, 8, 16]


def test_schedule_of_alpha_is_logged(tmp_path):
    rdrop = RDropConfig(alpha=2.0, alpha_schedule="linear", alpha_warmup_steps=2)
    assert logged(run(tmp_path, rdrop=rdrop), "alpha") == [0.0, 1.0, 2.0, 2.0]


def test_schedule_counts_optimiser_steps_not_micro_batches(tmp_path):
    model = tiny_bert()
    calls = count_forwards(model)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    run(tmp_path, model, rdrop=RDropConfig(start_step=1), **options)
    assert [rows for rows, _ in calls] == [4, 4, 8, 8]


def test_rates_of_the_passes_are_drawn_anew_each_step_and_come_back(tmp_path):
    model = tiny_bert(dropout=0.2)
    seen = []
    model.bert.register_forward_pre_hook(
        lambda module, args: seen.append(model.dropout.p) if module.training else None
    )
    rdrop = RDropConfig(passes="sequential", dropout_rates=(0.1, 0.4))
    run(tmp_path, model, rdrop=rdrop, max_steps=20)
    pairs = {tuple(pair) for pair in zip(seen[::2], seen[1::2], strict=True)}
    assert pairs == {(0.1, 0.4), (0.4, 0.1)}
    assert model.dropout.p == 0.2


@pytest.mark.parametrize("rdrop", [ONE_PASS, RDropConfig(start_step=2), RDropConfig()])
def test_a_monitored_run_is_the_same_run(tmp_path, rdrop):
    options = {"learning_rate": 1e-2, **BY_ITSELF}
    plain = run(tmp_path, rdrop=rdrop, **options)
    monitored = run(tmp_path, rdrop=replace(rdrop, monitor_steps=2), **options)
    assert all(map(torch.equal, parameters(plain), parameters(monitored)))
    assert logged(plain, "loss") == logged(monitored, "loss")
    steps = [e["step"] for e in monitored.state.log_history if "kl" in e]
    assert steps == {0.0: [1, 3]}.get(rdrop.alpha, [1, 3, 4] if rdrop.start_step else [1, 2, 3, 4])
    assert all(kl > 0 for kl in logged(monitored, "kl"))


def test_label_smoothing_is_that_of_the_trainer(tmp_path):
    def trained(kind, rdrop=None):
        model = tiny_bert(dropout=0.0)
        return run(tmp_path, model, rdrop=rdrop, kind=kind, label_smoothing_factor=0.2)

    plain, ours = trained(Trainer), trained(RDropTrainer, ONE_PASS)
    for x, y in zip(parameters(ours), parameters(plain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_number_to_predict(tmp_path):
    rows = text_rows(3, 1, "regression")
    trainer = run(
        tmp_path, tiny_bert(1), rows, RDropConfig(), per_device_train_batch_size=1, max_steps=3
    )
    assert all(np.isfinite(logged(trainer, "kl")))


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], lora_dropout=0.1)
    model = peft.get_peft_model(tiny_bert(dropout=0.0), config)
    frozen = model.base_model.model.bert.embeddings.word_embeddings.weight.clone()
    options = {"learning_rate": 1e-2, "max_steps": 6, **BY_ITSELF}
    trainer = run(tmp_path, model, rdrop=RDropConfig(alpha=2.0), **options)
    kl = logged(trainer, "kl")
    assert kl[0] == 0  # a new adapter adds nothing yet
    assert min(kl[1:]) > 0
    assert torch.equal(model.base_model.model.bert.embeddings.word_embeddings.weight, frozen)


# --- evaluation ------------------------------------------------------------------------------


def test_evaluation_and_prediction_are_those_of_the_trainer(tmp_path):
    model, rows = tiny_bert(), text_rows()
    ours = build(tmp_path, model, rows, RDropConfig(alpha=5.0), label_smoothing_factor=0.1)
    plain = build(tmp_path, model, rows, kind=Trainer, label_smoothing_factor=0.1)
    calls = count_forwards(model, training=False)
    assert ours.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert sum(rows for rows, _ in calls) == 2 * 16
    predictions = [t.predict(rows).predictions for t in (ours, plain)]
    assert np.array_equal(*predictions)


def test_outputs_of_a_training_step_can_be_asked_for(tmp_path):
    trainer = build(tmp_path, tiny_bert(), rdrop=RDropConfig())
    trainer.model.train()
    batch = torch.utils.data.default_collate([text_rows()[i] for i in range(4)])
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.requires_grad
    assert outputs.logits.shape == (8, 3)
    assert "labels" in batch


# --- what is saved, extended, warned about and refused ---------------------------------------


def test_the_config_is_saved_with_model_and_checkpoints(tmp_path):
    rdrop = RDropConfig(alpha=0.7, class_weight=(1.0, 2.0, 3.0))
    trainer = run(tmp_path, rdrop=rdrop, save_strategy="steps", save_steps=2)
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-2", "checkpoint-4", "final"):
        saved = json.loads((tmp_path / folder / "rdrop_config.json").read_text())
        assert RDropConfig.from_dict(saved) == rdrop


def test_the_mixin_extends_a_trainer_of_the_users_own(tmp_path):
    class Own(Trainer):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "eval_own": 1.0}

        def create_optimizer(self, *args, **kwargs):
            self.was_here = True
            return super().create_optimizer(*args, **kwargs)

    class OwnWithRDrop(RDropTrainerMixin, Own):
        pass

    trainer = run(tmp_path, rdrop=RDropConfig(), kind=OwnWithRDrop)
    assert trainer.was_here
    assert trainer.evaluate()["eval_own"] == 1.0
    assert logged(trainer, "kl")


def test_another_head_by_override(tmp_path):
    """Pretraining has two losses; this one trains the first alone."""

    class MaskedWords(RDropTrainer):
        def rdrop_head(self, model, inputs):
            batch = dict(inputs)
            labels = batch.pop("labels")
            return Head(batch, labels, cross_entropy_terms, lambda o: o.prediction_logits)

    rows = text_rows()
    rows.columns["labels"] = rows.columns["input_ids"].clone()
    rows.columns["labels"][:, :3] = -100
    model = BertForPreTraining(tiny_bert().config)
    trainer = run(tmp_path, model, rows, RDropConfig(), MaskedWords, max_steps=3)
    assert all(kl > 0 for kl in logged(trainer, "kl"))


def test_a_model_without_dropout_is_warned_about_once(tmp_path):
    with pytest.warns(UserWarning, match="R-Drop") as caught:
        run(tmp_path, tiny_bert(dropout=0.0), rdrop=RDropConfig())
    ours = [str(w.message) for w in caught if "R-Drop" in str(w.message)]
    assert len(ours) == 1
    assert "R-Drop has nothing to compare" in ours[0]


def test_another_run_looks_at_dropout_again(tmp_path):
    trainer = run(tmp_path, rdrop=RDropConfig())
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.model.config.hidden_dropout_prob = 0.0
    with pytest.warns(UserWarning, match="R-Drop has nothing to compare"):
        trainer.train()


def test_passes_that_are_the_same_despite_dropout_are_warned_about_once(tmp_path):
    model = tiny_bert()

    def restore(module, args):
        torch.manual_seed(0)

    model.bert.register_forward_pre_hook(restore)
    with pytest.warns(UserWarning, match="R-Drop") as caught:
        run(tmp_path, model, rdrop=RDropConfig(passes="sequential"))
    ours = [str(w.message) for w in caught if "R-Drop" in str(w.message)]
    assert len(ours) == 1
    assert "the KL between passes is exactly 0" in ours[0]


def test_a_model_with_dropout_is_not_warned_about(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, rdrop=RDropConfig())
    assert not [w for w in caught if "R-Drop" in str(w.message)]


def test_a_config_of_another_type_is_refused_before_training(tmp_path):
    with pytest.raises(TypeError, match="rdrop must be an RDropConfig, got dict"):
        build(tmp_path, tiny_bert(), text_rows(), {"alpha": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rdrop": RDropConfig(class_weight=(1.0, 2.0))}, "class_weight must have one entry"),
        (
            {"rdrop": RDropConfig(class_weight=(1.0,)), "model": tiny_bert(1)},
            "need single-label classification",
        ),
        (
            {"model": BertForPreTraining(tiny_bert().config)},
            "BertForPreTraining is not a class .*did not return a loss.*override rdrop_head",
        ),
        (
            {"rows": Rows(input_ids=torch.ones(8, 4).long(), labels=torch.zeros(8))},
            r"target must have the shape of one pass, \(8, 3\), got \(8,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_at_the_first_step(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run(tmp_path, **options)


def test_gradient_checkpointing_with_rates_of_the_passes_is_refused(tmp_path):
    rdrop = RDropConfig(passes="sequential", dropout_rates=(0.1, 0.4))
    with pytest.raises(ValueError, match="gradient checkpointing"):
        run(tmp_path, rdrop=rdrop, gradient_checkpointing=True)
