"""Features of the Trainer with R-Drop: search, records, cards, batch sizes that are tried."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback

import reference
from models import (
    VOCABULARY,
    key_dropout,
    text_rows,
    tiny_bert,
    tiny_bert_of,
    tiny_gpt2,
    token_rows,
)
from processes import run_in_two_processes
from regdrop import RDropConfig, symmetric_kl
from regdrop.integrations.transformers import RDropTrainer, RDropTrainerMixin
from training import (
    Plain,
    arguments,
    assert_same_run,
    build,
    logged,
    number_rows,
    record_scores,
    train,
)

ONE_PASS = RDropConfig(alpha=0.0, num_passes=1)


def test_a_base_that_says_its_loss_is_a_mean_of_each_batch(tmp_path):
    """Trainers of rewards and preferences say so; ours is one of the whole window."""

    class Base(Trainer):
        loss_is_scaled_for_ga = False

    class Mixed(RDropTrainerMixin, Base):
        pass

    def run(**options):
        return train(tmp_path, tiny_bert(dropout=0.0), text_rows(), ONE_PASS, Mixed, **options)

    parts = run(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_run(parts, run())


@pytest.mark.parametrize(
    ("rdrop", "cost"),
    [
        (ONE_PASS, 1),
        (RDropConfig(), 2),
        (RDropConfig(every_n_steps=2), 1.5),
        (RDropConfig(passes="sequential", backward_passes=1), 4 / 3),
    ],
)
def test_the_operations_of_a_run_are_those_of_all_passes(tmp_path, rdrop, cost):
    rows = text_rows()
    plain = train(tmp_path, tiny_bert(), rows, None, Trainer, max_steps=4)
    ours = train(tmp_path, tiny_bert(), rows, rdrop, max_steps=4)
    assert ours.state.total_flos == pytest.approx(cost * plain.state.total_flos, rel=1e-5)


@pytest.mark.parametrize("build_model", [tiny_bert, tiny_bert_of("ForTokenClassification")])
def test_a_model_that_returns_tuples(tmp_path, build_model):
    rows = text_rows if build_model is tiny_bert else token_rows

    def run(kind, rdrop=None):
        model = build_model()
        model.config.return_dict = False
        return train(tmp_path, model, rows(), rdrop, kind)

    plain, ours = run(Trainer), run(RDropTrainer, ONE_PASS)
    assert_same_run(ours, plain, rtol=1e-4)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    assert min(logged(run(RDropTrainer, RDropConfig()), "kl")) > 0


# --- hyperparameter search --------------------------------------------------------------------


def search(folder, space, rdrop=None, n_trials=3, **options):
    optuna = pytest.importorskip("optuna")
    seen = []

    class Noting(RDropTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen.append((self.rdrop.alpha, self.rdrop.scale, self.args.learning_rate))
            return loss

    trainer = Noting(
        model_init=lambda trial: tiny_bert(),
        args=arguments(folder, max_steps=1),
        train_dataset=text_rows(),
        eval_dataset=text_rows(),
        rdrop=rdrop,
    )
    best = trainer.hyperparameter_search(
        hp_space=space,
        n_trials=n_trials,
        direction="minimize",
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
        **options,
    )
    return trainer, best, seen


def test_each_trial_of_a_search_trains_with_its_alpha(tmp_path):
    drawn = []

    def space(trial):
        found = {
            "rdrop.alpha": trial.suggest_float("rdrop.alpha", 0.1, 5.0),
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2),
        }
        drawn.append((found["rdrop.alpha"], found["learning_rate"]))
        return found

    _, best, seen = search(tmp_path, space, RDropConfig(alpha=9.0, scale="sum"))
    assert len(drawn) == 3
    assert len(set(drawn)) == 3
    assert [(alpha, rate) for alpha, _, rate in seen] == drawn
    assert {scale for _, scale, _ in seen} == {"sum"}
    assert best.hyperparameters["rdrop.alpha"] in [alpha for alpha, _ in drawn]


def test_a_trial_without_options_of_ours_has_those_of_the_trainer(tmp_path):
    def space(trial):
        if trial.number == 0:
            return {"rdrop.alpha": trial.suggest_float("rdrop.alpha", 1.0, 2.0)}
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)}

    _, _, seen = search(tmp_path, space, RDropConfig(alpha=9.0), n_trials=2)
    assert 1.0 <= seen[0][0] <= 2.0
    assert seen[1][0] == 9.0


def test_a_search_over_an_option_that_does_not_exist_is_an_error(tmp_path):
    def space(trial):
        return {"rdrop.alfa": trial.suggest_float("rdrop.alfa", 0.1, 5.0)}

    with pytest.raises(ValueError, match=r"RDropConfig has no option \['alfa'\]"):
        search(tmp_path, space)


def best_of(alphas, name="rdrop.alpha", option=None, target=3.0):
    """Return the space of a search over these alphas in turn, and the figure that finds one."""
    alphas, drawn = list(alphas), []

    def space(trial):
        alpha = trial.suggest_float(name, *[alphas[trial.number]] * 2)
        drawn.append(alpha)
        return {"rdrop.alpha": alpha if option is None else option(alpha)}

    return space, lambda metrics: abs(drawn[-1] - target)


@pytest.mark.parametrize("name", ["rdrop.alpha", "strength"])
def test_the_best_of_a_search_trains_where_the_arguments_have_it(tmp_path, name):
    """Hugging Face's way to train with the best: set each on the Trainer's arguments."""
    space, figure = best_of([1.0, 3.0, 7.0], name)
    given = RDropConfig(alpha=0.5, scale="sum")
    trainer, best, seen = search(tmp_path, space, given, compute_objective=figure)
    seen.clear()
    trainer.train()
    assert [(alpha, scale) for alpha, scale, _ in seen] == [(0.5, "sum")]
    for own, value in best.hyperparameters.items():
        setattr(trainer.args, own, value)
    seen.clear()
    for _ in range(2):
        trainer.train()
    assert [(alpha, scale) for alpha, scale, _ in seen] == [(3.0, "sum")] * 2
    assert trainer._planner.plan(trainer.rdrop, 0).alpha == 3.0


def test_the_best_of_a_search_whose_option_is_computed(tmp_path):
    space, figure = best_of([0.0, 1.0, 2.0], "power", lambda x: 2.0**x, target=1.0)
    trainer, best, seen = search(tmp_path, space, compute_objective=figure)
    trainer.args.power = best.hyperparameters["power"]
    seen.clear()
    trainer.train()
    assert [alpha for alpha, *_ in seen] == [2.0]


def test_a_second_search_begins_with_the_options_as_given(tmp_path):
    space, figure = best_of([1.0, 3.0, 7.0])
    trainer, best, seen = search(tmp_path, space, RDropConfig(alpha=0.5), compute_objective=figure)
    setattr(trainer.args, "rdrop.alpha", best.hyperparameters["rdrop.alpha"])
    seen.clear()
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"rdrop.scale": trial.suggest_categorical("rdrop.scale", ["sum"])},
        n_trials=1,
        backend="optuna",
    )
    assert [(alpha, scale) for alpha, scale, _ in seen] == [(0.5, "sum")]


def test_options_that_are_put_into_a_trainer_after_a_search_are_kept(tmp_path):
    space, _ = best_of([1.0, 3.0])
    trainer, best, seen = search(tmp_path, space, RDropConfig(alpha=0.5), n_trials=2)
    setattr(trainer.args, "rdrop.alpha", best.hyperparameters["rdrop.alpha"])
    trainer.rdrop = RDropConfig(alpha=4.0)
    seen.clear()
    for _ in range(2):
        trainer.train()
    assert [alpha for alpha, *_ in seen] == [4.0, 4.0]


def test_arguments_of_a_search_leave_another_trainer_as_it_was_given(tmp_path):
    args = arguments(tmp_path, max_steps=1)
    setattr(args, "rdrop.alpha", 3.0)
    trainer = RDropTrainer(tiny_bert(), args, train_dataset=text_rows(), rdrop=ONE_PASS)
    trainer.train()
    assert logged(trainer, "alpha") == [0.0]


# --- records ----------------------------------------------------------------------------------


class Tracker(TrainerCallback):
    """Records what the Trainer's own trackers do: the model's config, when training begins."""

    def __init__(self):
        self.recorded = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.recorded.append(model.config.to_dict())


def test_trackers_see_the_options_and_no_saved_config_has_them(tmp_path):
    tracker = Tracker()
    rdrop = RDropConfig(alpha=0.7, scale="sum")
    further = {"callbacks": [tracker]}
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = train(tmp_path, tiny_bert(), text_rows(), rdrop, further=further, **options)
    trainer.save_model(str(tmp_path / "final"))
    (config,) = tracker.recorded
    shown = {name: config[f"rdrop_{name}"] for name in rdrop.to_dict()}
    assert shown == rdrop.to_dict()
    for folder in ("checkpoint-1", "checkpoint-2", "final"):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        assert not [name for name in saved if name.startswith("rdrop")]
    assert not [name for name in trainer.model.config.to_dict() if name.startswith("rdrop")]


def test_a_model_without_a_config_has_nothing_to_show_and_trains(tmp_path):
    trainer = train(tmp_path, _Scores(), text_rows(), RDropConfig(), max_steps=1)
    assert logged(trainer, "kl")[0] > 0


class _Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(80, 3)
        self.dropout = torch.nn.Dropout(0.3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.dropout(self.words(input_ids)).mean(1)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class AsClass:
    width = 3


class Slots:
    __slots__ = ("use_cache", "width")


# Those to which entries can be added have R-Drop's options too while trackers look.
CONFIGS = {
    "class": (AsClass, False),
    "slots": (Slots(), False),
    "namespace": (SimpleNamespace(width=3), True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_any_kind_has_no_entry_of_ours_after_training(tmp_path, name):
    config, is_shown = CONFIGS[name]
    seen = []

    class Looking(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append("rdrop_alpha" in dir(config))

    model = _Scores()
    model.config = config
    train(tmp_path, model, text_rows(), further={"callbacks": [Looking()]}, max_steps=1)
    assert seen == [is_shown]
    assert not [own for own in dir(config) if own.startswith("rdrop")]


def test_the_model_card_lists_the_options_that_differ(tmp_path):
    rdrop = RDropConfig(alpha=0.7, backward_passes=1)
    trainer = train(tmp_path, tiny_bert(), text_rows(), rdrop)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    parts = card.split("The following hyperparameters were used during training:")
    assert len(parts) == 2
    lines = [line for line in parts[1].splitlines() if line.startswith("- rdrop")]
    assert lines == [
        "- rdrop (regularized dropout, arXiv 2106.14448): alpha=0.7, backward_passes=1"
    ]


def test_parts_of_an_attempt_that_ran_out_of_memory_are_not_logged(tmp_path):
    model = tiny_bert()
    seen = record_scores(model, "logits")
    calls = []

    class Failing(RDropTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            calls.append(len(inputs["labels"]))
            loss = super().training_step(model, inputs, num_items_in_batch)
            if len(calls) == 2:
                seen.clear()
                raise RuntimeError("CUDA out of memory.")
            return loss

    rows = text_rows(20)
    options = {"auto_find_batch_size": True, "max_steps": 2, "logging_steps": 2}
    trainer = train(tmp_path, model, rows, RDropConfig(alpha=2.0), Failing, **options)
    assert calls == [8, 8, 7, 7]
    assert [len(scores) for scores in seen] == [14, 14]
    labels = rows.columns["labels"]
    items = [
        item
        for scores, target in zip(seen, labels[:14].split(7), strict=True)
        for item in reference.rdrop_items(scores, target)
    ]
    assert logged(trainer, "nll") == [pytest.approx(np.mean([i[0] for i in items]), rel=1e-4)]
    assert logged(trainer, "kl") == [pytest.approx(np.mean([i[1] for i in items]), rel=1e-4)]


# --- two processes ----------------------------------------------------------------------------

EVALUATED = {"bert": (tiny_bert, text_rows), "gpt2": (tiny_gpt2, token_rows), "plain": None}


def evaluate(folder, name, **options):
    if EVALUATED[name] is None:
        torch.manual_seed(3)
        model, rows = _Scores(), text_rows
    else:
        build_model, rows = EVALUATED[name]
        model = build_model()
    trainer = build(folder, model, rows(), RDropConfig(), **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


def _worker(rank, folder):
    options = {
        "ddp_backend": "gloo",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.0,
    }
    found = {name: evaluate(folder, name, **options) for name in EVALUATED}
    if rank == 0:
        torch.save(found, folder / "found.pt")


@pytest.mark.long
def test_the_evaluation_of_two_processes_is_that_of_one(tmp_path):
    run_in_two_processes(_worker, tmp_path)
    two = torch.load(tmp_path / "found.pt", weights_only=False)
    for name in EVALUATED:
        before, after = evaluate(tmp_path, name, learning_rate=0.0, per_device_eval_batch_size=4)
        assert before == pytest.approx(after)
        assert two[name] == pytest.approx((before, after), rel=1e-5)


@pytest.mark.parametrize("is_filtered", [True, False])
def test_a_micro_batch_that_is_not_finite_is_left_out_of_the_log_as_of_the_loss(
    tmp_path, is_filtered
):
    rows = number_rows(torch.arange(24) % 3, size=24)
    rows.columns["x"][9, 0] = float("nan")
    options = {"learning_rate": 0.0, "max_steps": 3, "logging_steps": 3}
    options["logging_nan_inf_filter"] = is_filtered
    model = Plain(F.cross_entropy)
    trainer = train(tmp_path, model, rows, RDropConfig(), **options)
    found = [logged(trainer, name)[0] for name in ("loss", "nll", "kl")]
    assert [np.isfinite(x) for x in found] == [is_filtered] * 3


@pytest.mark.parametrize("first", ["mixed", "unlabelled"])
@pytest.mark.parametrize("kind", ["classes", "words"])
def test_items_without_a_label_train_beside_labelled_ones(tmp_path, kind, first):
    """The KL of all items, the likelihood of the labelled ones, under accumulation too."""
    rows = text_rows() if kind == "classes" else token_rows(num_labels=VOCABULARY)
    labels = rows.columns["labels"]
    labels[1 if first == "mixed" else 0 :: 2] = -1
    if first == "unlabelled":
        labels[:8] = -1
    rdrop = RDropConfig(alpha=2.0, unlabelled_index=-1)
    build = tiny_bert if kind == "classes" else tiny_gpt2

    def run(**options):
        return train(tmp_path, key_dropout(build(dropout=0.3)), rows, rdrop, **options)

    whole = run(max_steps=1, per_device_train_batch_size=16)
    parts = run(max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert_same_run(parts, whole, rtol=1e-4)
    model, batch = (
        key_dropout(build(dropout=0.3)).train(),
        default_collate([rows[i] for i in range(len(rows))]),
    )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**{k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in inputs.items()}).logits
    target = batch["labels"]
    if kind == "words":
        logits, target = logits[:, :-1], target[:, 1:]
    target = target.reshape(-1)
    passes = logits.reshape(2, -1, logits.shape[-1])
    counted, labelled = target != -100, target >= 0
    kl = symmetric_kl(passes[:, counted].flatten(0, 1))
    nll = F.cross_entropy(passes[:, labelled].flatten(0, 1), target[labelled].repeat(2))
    assert logged(whole, "nll") == [pytest.approx(nll.item(), rel=1e-4)]
    assert logged(whole, "kl") == [pytest.approx(kl.item(), rel=1e-3)]
