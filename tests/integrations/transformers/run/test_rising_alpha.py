"""Alpha that rises in a run of the Trainer: ramps, rules, one pass while it is small."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback

from models import key_dropout, text_rows, tiny_bert
from processes import run_in_two_processes
from regdrop import AlphaController, RDropConfig
from regdrop.alpha import RULES
from regdrop.integrations.transformers import RDropTrainer
from training import arguments, assert_same_run, logged, parameters

AUTO = RDropConfig(alpha="auto")
LINEAR = RDropConfig(alpha=2.0, alpha_schedule="linear", alpha_warmup_ratio=1.0)
# The alphas of "auto" in a run of 8 steps.
RAMP = [3 + 7 * step / 8 for step in range(8)]
# Validation losses above those of training, and rising.
HIGH = {2: 1.3, 4: 1.5, 6: 1.6, 8: 1.7}
EVALUATED = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2}


class Losses(TrainerCallback):
    """Replaces the validation losses of a run by given ones."""

    def __init__(self, losses):
        self.losses = losses

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.losses is not None:
            metrics["eval_loss"] = self.losses[state.global_step]


def make(folder, rdrop, *, losses=None, validation=True, model=None, **options):
    # Every run sees the same masks, however its batches are cut.
    passes = 2 if rdrop.num_passes > 1 else 1
    return RDropTrainer(
        model=key_dropout(tiny_bert(dropout=0.3), passes) if model is None else model,
        args=arguments(folder, **{"max_steps": 8, **options}),
        rdrop=rdrop,
        train_dataset=text_rows(32),
        eval_dataset=text_rows(16) if validation else None,
        callbacks=[Losses(losses)],
    )


def train(*positional, resume=None, **named):
    trainer = make(*positional, **named)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Options(TrainerCallback):
    """Replaces the options of R-Drop from the third step on."""

    def __init__(self, **changes):
        self.changes = changes

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.trainer.rdrop = replace(self.trainer.rdrop, **self.changes)


def train_with_other_options(folder, rdrop, **changes):
    callback = Options(**changes)
    callback.trainer = make(folder, rdrop, max_steps=4)
    callback.trainer.add_callback(callback)
    callback.trainer.train()
    return logged(callback.trainer, "alpha")


@pytest.mark.parametrize("alpha", [3.0, "auto"])
def test_options_that_a_callback_replaces_are_those_of_the_next_step(tmp_path, alpha):
    found = train_with_other_options(tmp_path, RDropConfig(alpha=alpha), alpha=0.5)
    assert found[2:] == [0.5, 0.5]
    assert found[:2] == ([3.0, 3.0] if alpha == 3.0 else [3.0, 4.75])


def test_a_rule_that_did_not_begin_with_the_run_is_refused(tmp_path):
    changes = {"alpha": "auto", "alpha_rule": "stall"}
    gap = RDropConfig(alpha="auto", alpha_rule="gap", alpha_max=4.0)
    for began, given in ((RDropConfig(), changes), (AUTO, changes), (gap, {"alpha_max": 8.0})):
        with pytest.raises(ValueError, match=r"alpha_rule='\w+' must be given before training"):
            train_with_other_options(tmp_path, began, **given)


def test_the_ends_of_a_ramp_may_be_replaced_as_other_options(tmp_path):
    found = train_with_other_options(tmp_path, AUTO, alpha_start=0.0, alpha_max=8.0)
    assert found == [3.0, 4.75, 4.0, 6.0]


# --- ramps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [None, 2])
def test_auto_is_a_ramp_over_the_whole_run_however_its_length_is_given(tmp_path, epochs):
    length = {"max_steps": -1, "num_train_epochs": epochs} if epochs else {}
    found = train(tmp_path, AUTO, validation=False, **length)
    assert found.state.global_step == 8
    assert logged(found, "alpha") == pytest.approx(RAMP)
    ramp = RDropConfig(alpha=10.0, alpha_start=3.0, alpha_schedule="linear", alpha_warmup_steps=8)
    assert_same_run(found, train(tmp_path, ramp, validation=False))


def test_the_ramp_begins_where_it_is_said_to(tmp_path):
    auto = RDropConfig(alpha="auto", alpha_start=2.0, alpha_max=10.0)
    assert logged(train(tmp_path, auto), "alpha") == pytest.approx([2, 3, 4, 5, 6, 7, 8, 9])


def test_a_ratio_is_a_part_of_the_run(tmp_path):
    config = RDropConfig(
        alpha=6.0, alpha_schedule="linear", alpha_warmup_ratio=0.5, start_step=2, every_n_steps=2
    )
    found = logged(train(tmp_path, config), "alpha")
    # Logs without R-Drop keep the last alpha.
    assert found == pytest.approx([0, 0, 0, 0, 8, 8, 12, 12])


def test_a_step_by_hand_knows_the_length_of_the_run(tmp_path):
    trainer = make(tmp_path, AUTO)
    trainer.model.train()
    batch = torch.utils.data.default_collate([text_rows()[i] for i in range(8)])
    assert trainer.compute_loss(trainer.model, batch).requires_grad


# --- rules --------------------------------------------------------------------------------------


def test_a_rule_acts_at_the_evaluations_of_the_trainer(tmp_path):
    losses = {2: 3.0, 4: 3.1, 6: 3.0}
    trainer = train(
        tmp_path, replace(AUTO, alpha_rule="stall"), losses={**losses, 8: 2.0}, **EVALUATED
    )
    assert logged(trainer, "alpha") == [1, 1, 1, 1, 2, 2, 4, 4]
    assert len(logged(trainer, "eval_loss")) == 4


def test_other_evaluations_than_those_of_the_run_change_nothing(tmp_path):
    class Evaluating(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.evaluate(text_rows(4))

    rdrop = replace(AUTO, alpha_rule="stall")
    options = {"losses": dict.fromkeys(range(9), 3.0), **EVALUATED}
    trainer = make(tmp_path, rdrop, **options)
    trainer.add_callback(Evaluating())
    trainer.train()
    found = logged(trainer, "alpha")
    assert found == logged(train(tmp_path, rdrop, **options), "alpha")
    assert found[-1] == 4


@pytest.mark.parametrize("rule", ["gap", "kl-target"])
def test_rules_read_what_training_measured_since_the_last_evaluation(tmp_path, rule):
    rdrop = replace(AUTO, alpha_rule=rule, every_n_steps=2, fraction=0.5)
    trainer = train(tmp_path, rdrop, losses=HIGH, **EVALUATED)
    controller = AlphaController(8, rule=rule)
    nlls, kls = ([e.get(name) for e in trainer.state.log_history] for name in ("nll", "kl"))
    nlls = [x for x in nlls if x is not None]
    kls = [x for x in kls if x is not None]
    assert (len(nlls), len(kls)) == (8, 4)
    expected = []
    for step in range(8):
        expected.append(2 * controller.alpha)
        controller.update(step, nll=nlls[step], kl=kls[step // 2] if step % 2 == 0 else None)
        if step % 2 == 1:
            controller.update(step, validation_loss=HIGH[step + 1])
    assert logged(trainer, "alpha")[::2] == pytest.approx(expected[::2], rel=1e-5)
    assert len(set(expected[::2])) > 1


def test_accumulation_gives_a_rule_what_whole_batches_give(tmp_path):
    rdrop = replace(AUTO, alpha_rule="gap")
    whole = train(tmp_path, rdrop, losses=HIGH, **EVALUATED)
    split = train(
        tmp_path,
        rdrop,
        losses=HIGH,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **EVALUATED,
    )
    assert logged(split, "alpha") == pytest.approx(logged(whole, "alpha"), rel=1e-3, abs=1e-5)
    assert_same_run(split, whole, rtol=1e-4, atol=1e-5)
    assert len(set(logged(whole, "alpha"))) > 2


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_has_the_alphas_of_the_uninterrupted_one(tmp_path, rule, stop):
    """Also where the checkpoint is not at an evaluation, and the next one reads both sides."""
    is_restoring = rule == "restore"
    rdrop = replace(AUTO, alpha_rule=rule, single_pass_below=0.5, monitor_steps=2)
    options = {
        "losses": HIGH,
        "save_strategy": "steps",
        "save_steps": 2 if is_restoring else stop,
        "load_best_model_at_end": is_restoring,
        "logging_steps": 2,
        **EVALUATED,
    }
    whole = train(tmp_path / "a", rdrop, **options)
    checkpoint = tmp_path / "a" / f"checkpoint-{4 if is_restoring else stop}"
    again = train(tmp_path / "a", rdrop, resume=str(checkpoint), **options)
    for name in ("alpha", "kl", "nll", "passes"):
        assert logged(again, name) == pytest.approx(logged(whole, name), rel=1e-5)
    for x, y in zip(parameters(again), parameters(whole), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert len(set(logged(whole, "alpha"))) > 1


def test_the_weights_of_the_best_checkpoint_come_back_where_alpha_changes(tmp_path):
    seen = {}

    class Weights(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            seen[state.global_step] = [p.detach().clone() for p in model.parameters()]

    rdrop = replace(AUTO, alpha_rule="restore")
    options = {"save_strategy": "steps", "save_steps": 2, **EVALUATED}
    trainer = make(
        tmp_path,
        rdrop,
        losses={2: 3.0, 4: 3.1, 6: 2.0, 8: 2.5},
        load_best_model_at_end=True,
        **options,
    )
    trainer.add_callback(Weights())
    trainer.train()
    # The stall at 4 goes back to 2; the progress at 6 goes on from there.
    assert all(map(torch.equal, seen[4], seen[2]))
    assert not all(map(torch.equal, seen[6], seen[2]))
    with pytest.raises(ValueError, match="needs load_best_model_at_end=True"):
        train(tmp_path, rdrop, **EVALUATED)


def test_a_checkpoint_with_the_best_figure_keeps_its_own_weights(tmp_path):
    """Also where the validation loss, which the rule reads, says nothing good of them."""
    kept = {}

    class Figures(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, model, **kwargs):
            step = state.global_step
            metrics["eval_loss"] = {2: 3.0, 4: 3.1, 6: 3.2, 8: 3.3}[step]
            metrics["eval_accuracy"] = {2: 0.5, 4: 0.9, 6: 0.8, 8: 0.7}[step]
            kept[step] = [p.detach().clone() for p in model.parameters()]

    trainer = make(
        tmp_path,
        replace(AUTO, alpha_rule="restore"),
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        **EVALUATED,
    )
    trainer.add_callback(Figures())
    trainer.train()
    assert trainer.state.best_global_step == 4
    assert all(map(torch.equal, parameters(trainer), kept[4]))
    assert not all(map(torch.equal, kept[4], kept[2]))


class LikeDeepSpeed(RDropTrainer):
    """Loads the weights of a checkpoint past `_load_from_checkpoint`, as under DeepSpeed."""

    def _load_from_checkpoint(self, *args, **kwargs):
        Trainer._load_from_checkpoint(self, *args, **kwargs)


def resumable(tmp_path, **options):
    rdrop = replace(AUTO, alpha_rule="stall")
    options = {"losses": HIGH, "save_strategy": "steps", "save_steps": 4, **EVALUATED, **options}
    return rdrop, options, str(tmp_path / "checkpoint-4")


def test_the_state_of_a_rule_is_read_whoever_loads_the_weights(tmp_path):
    rdrop, options, checkpoint = resumable(tmp_path)
    whole = train(tmp_path, rdrop, **options)
    again = make(tmp_path, rdrop, **options)
    again.__class__ = LikeDeepSpeed
    again.train(resume_from_checkpoint=checkpoint)
    assert logged(again, "alpha") == logged(whole, "alpha")
    # A run that begins anew begins at 1.
    again.train()
    assert logged(again, "alpha") == logged(whole, "alpha")
    assert logged(whole, "alpha")[4] == 2


def test_an_evaluation_where_a_run_goes_on_counts_once(tmp_path):
    rdrop, options, checkpoint = resumable(tmp_path, eval_on_start=True)
    options["losses"] = {0: 1.0, **HIGH}
    whole = train(tmp_path, rdrop, **options)
    again = train(tmp_path, rdrop, resume=checkpoint, **options)
    assert logged(again, "alpha") == logged(whole, "alpha")
    assert logged(whole, "alpha")[2] == 1  # the loss of untrained weights is none to beat


def test_a_run_whose_alpha_rises_otherwise_than_its_checkpoints_is_told_so(tmp_path, caplog):
    options = {
        "validation": False,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 4,
    }
    before = replace(AUTO, alpha_start=0.0, alpha_max=16.0)
    train(tmp_path, before, **options)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, before, resume=str(tmp_path / "checkpoint-4"), **options)
        assert "goes on by" not in caplog.text
        train(tmp_path, AUTO, resume=str(tmp_path / "checkpoint-4"), **options)
    assert "alpha='auto' goes on by alpha_start=3.0, alpha_max=10.0" in caplog.text
    assert "the checkpoint's run had alpha_start=0.0, alpha_max=16.0" in caplog.text


def test_a_run_that_lost_its_validation_goes_on_by_the_ramp_and_says_so(tmp_path, caplog):
    rdrop, options, checkpoint = resumable(tmp_path)
    begun = train(tmp_path, rdrop, **options)
    with caplog.at_level(logging.WARNING):
        again = train(tmp_path, rdrop, resume=checkpoint, validation=False, eval_strategy="no")
    assert logged(again, "alpha") == [*logged(begun, "alpha")[:4], *RAMP[4:]]
    assert "there is no evaluation during training: alpha follows the ramp" in caplog.text


def test_a_run_that_had_no_validation_goes_on_by_the_ramp_and_says_so(tmp_path, caplog):
    rdrop, options, checkpoint = resumable(tmp_path)
    plain = {"save_strategy": "steps", "save_steps": 4}
    begun = train(tmp_path, rdrop, validation=False, eval_strategy="no", **plain)
    with caplog.at_level(logging.WARNING):
        again = train(tmp_path, rdrop, resume=checkpoint, **options)
    assert logged(again, "alpha") == logged(begun, "alpha") == RAMP
    assert "there is none in the run so far: alpha follows the ramp" in caplog.text


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_rule_whose_end_an_earlier_version_wrote_goes_on_as_it_was(tmp_path, caplog):
    rdrop, options, checkpoint = resumable(tmp_path)
    whole = train(tmp_path, rdrop, **options)
    resolved = {"alpha_start": 0.0, "alpha_max": 16.0}
    edit(Path(checkpoint) / "rdrop_config.json", lambda saved: saved.update(resolved))
    with caplog.at_level(logging.WARNING):
        again = train(tmp_path, rdrop, resume=checkpoint, **options)
    assert logged(again, "alpha") == logged(whole, "alpha")
    assert "goes on by" not in caplog.text


@pytest.mark.parametrize("rule", [None, AlphaController(8).state_dict()])
def test_a_run_that_was_a_ramp_goes_on_by_the_rule_that_it_is_given(tmp_path, caplog, rule):
    rdrop, options, checkpoint = resumable(tmp_path)
    begun = train(tmp_path, AUTO, **options)
    # An earlier version wrote the state of a ramp, too.
    state = Path(checkpoint) / "rdrop_state.json"
    edit(state, lambda saved: saved["planner"].update(rule=rule))
    with caplog.at_level(logging.WARNING):
        again = train(tmp_path, rdrop, resume=checkpoint, **options)
    assert logged(begun, "alpha") == RAMP
    # The first evaluation that the rule sees is progress, the second one is none.
    assert logged(again, "alpha") == [*RAMP[:4], 1, 1, 1, 1]
    assert again._planner.controller.alpha == 2
    assert "alpha='auto' goes on by alpha_rule='stall'" in caplog.text
    assert "follows the ramp" not in caplog.text


@pytest.mark.parametrize(
    ("rdrop", "told"),
    [
        (AUTO, "alpha is 5.8 here and was 6.5"),
        (LINEAR, "alpha is 0.8 here and was 1"),
        (replace(LINEAR, alpha_warmup_ratio=0.1), None),
        (replace(LINEAR, alpha_warmup_ratio=None, alpha_warmup_steps=8), None),
        (replace(AUTO, alpha_start=8.0, alpha_max=8.0), None),
        (replace(AUTO, start_step=6), None),
        (replace(AUTO, alpha_rule="stall"), None),
    ],
)
def test_a_run_that_goes_on_for_longer_than_it_was_to_is_told_of_its_alpha(
    tmp_path, caplog, rdrop, told
):
    _, options, checkpoint = resumable(tmp_path)
    train(tmp_path, rdrop, **options)
    length = "it is a part of the run, which has 10 steps and had 8 at the checkpoint"
    with caplog.at_level(logging.WARNING):
        train(tmp_path, rdrop, resume=checkpoint, **options)
        assert "is a part of the run" not in caplog.text
        options |= {"max_steps": 10, "losses": {**HIGH, 10: 1.8}}
        again = train(tmp_path, rdrop, resume=checkpoint, **options)
    assert ("is a part of the run" in caplog.text) is (told is not None)
    assert told is None or f"{told}: {length}" in caplog.text
    if rdrop == AUTO:
        assert logged(again, "alpha")[3:5] == pytest.approx([RAMP[3], 3 + 7 * 4 / 10])


def test_a_rule_that_had_to_follow_the_ramp_is_told_of_another_length_too(tmp_path, caplog):
    rdrop, options, checkpoint = resumable(tmp_path, eval_strategy="no")
    train(tmp_path, rdrop, validation=False, **options)
    options["max_steps"] = 10
    with caplog.at_level(logging.WARNING):
        train(tmp_path, rdrop, resume=checkpoint, validation=False, **options)
    assert "alpha is 5.8 here and was 6.5" in caplog.text


@pytest.mark.parametrize("case", ["no data", "no evaluation", "no loss"])
def test_without_a_validation_loss_alpha_follows_the_ramp_and_that_is_said_once(
    tmp_path, caplog, case
):
    class WithoutLoss(RDropTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            return {name: value for name, value in metrics.items() if name != "eval_loss"}

    options = {} if case == "no evaluation" else EVALUATED
    if case == "no data":
        options = {"eval_strategy": "no"}
    trainer = make(
        tmp_path,
        replace(AUTO, alpha_rule="stall"),
        validation=case != "no data",
        **options,
    )
    if case == "no loss":
        trainer.__class__ = WithoutLoss
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [r.getMessage() for r in caplog.records if "follows the validation loss" in r.message]
    assert len(said) == 1
    assert "alpha follows the ramp to 10" in said[0]
    assert logged(trainer, "alpha") == pytest.approx(
        [1, 1, *RAMP[2:]] if case == "no loss" else RAMP
    )


def test_of_several_validation_sets_the_first_tells(tmp_path):
    trainer = make(tmp_path, replace(AUTO, alpha_rule="gap"), **EVALUATED)
    trainer.eval_dataset = {"near": text_rows(16), "far": text_rows(8)}
    # A figure of one's own comes before the loss, and is none.
    trainer.compute_metrics = lambda prediction: {"zero_one_loss": 0.0}
    trainer.train()
    near = logged(trainer, "eval_near_loss")
    nll = logged(trainer, "nll")
    gaps = [max(0.0, 16 * (near[i] - sum(nll[2 * i : 2 * i + 2]) / 2)) for i in range(3)]
    assert logged(trainer, "alpha")[2::2] == pytest.approx(gaps, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("rule", ["ramp", "stall"])
def test_a_loss_before_training_has_an_alpha_where_the_length_of_the_run_is_given(tmp_path, rule):
    batch = default_collate([text_rows()[i] for i in range(4)])
    rdrop = replace(AUTO, alpha_rule=rule)
    trainer = make(tmp_path, rdrop, max_steps=-1)
    for step in (trainer.compute_loss, trainer.training_step):
        with pytest.raises(ValueError, match=r"once train\(\) has begun, or by max_steps of the"):
            step(trainer.model.train(), dict(batch))
    known = make(tmp_path, rdrop)
    assert known.compute_loss(known.model.train(), dict(batch)).isfinite()


def test_a_search_gives_every_trial_its_own_rule(tmp_path):
    trainer = make(tmp_path, AUTO)
    trainer._hp_search_setup({"rdrop.alpha_max": 8.0})
    trainer.train()
    assert logged(trainer, "alpha") == pytest.approx([3 + 5 * step / 8 for step in range(8)])


# --- one pass while alpha is small --------------------------------------------------------------


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_one_pass_while_alpha_is_small_and_the_passes_are_logged(tmp_path, scale):
    rows = []
    model = tiny_bert(dropout=0.3)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            rows.append(len(kwargs["input_ids"])) if module.training else None
        ),
        with_kwargs=True,
    )
    rdrop = replace(AUTO, single_pass_below=6.5, scale=scale)
    trainer = train(tmp_path, rdrop, model=model, logging_steps=2)
    assert rows == [8] * 4 + [16] * 4
    assert logged(trainer, "passes") == [1, 1, 2, 2]
    # The likelihood counts on all steps as in the other loss of two passes.
    first = logged(trainer, "loss")[0] / logged(trainer, "nll")[0]
    assert first == pytest.approx(2.0 if scale == "sum" else 1.0, rel=1e-5)
    assert len(logged(trainer, "kl")) == 2


def test_the_divergence_is_measured_where_a_step_has_one_pass(tmp_path):
    rdrop = replace(AUTO, single_pass_below=6.5)
    plain = train(tmp_path, rdrop, model=tiny_bert(dropout=0.3))
    monitored = train(tmp_path, replace(rdrop, monitor_steps=2), model=tiny_bert(dropout=0.3))
    assert all(map(torch.equal, parameters(plain), parameters(monitored)))
    steps = [entry["step"] for entry in monitored.state.log_history if "kl" in entry]
    assert steps == [1, 3, 5, 6, 7, 8]
    assert "passes" not in train(tmp_path, AUTO).state.log_history[0]


# --- several processes --------------------------------------------------------------------------


def _worker(rank, folder, options):
    half = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    trainer = train(folder, replace(AUTO, alpha_rule="gap"), **options, **half)
    torch.save((logged(trainer, "alpha"), parameters(trainer)), folder / f"{rank}.pt")
    again = make(folder, replace(AUTO, alpha_rule="gap"), **options, **half)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    planned = [again._planner.plan(again.rdrop, step).alpha for step in range(8)]
    torch.save((logged(again, "alpha"), planned), folder / f"again-{rank}.pt")


@pytest.mark.long
def test_all_processes_have_the_alphas_of_one(tmp_path):
    options = {"losses": HIGH, "save_strategy": "steps", "save_steps": 3, **EVALUATED}
    run_in_two_processes(_worker, tmp_path, options)
    one = train(tmp_path / "one", replace(AUTO, alpha_rule="gap"), **options)
    (alphas, weights), (_, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert alphas == pytest.approx(logged(one, "alpha"), rel=1e-3, abs=1e-5)
    assert len(set(alphas)) > 2
    for x, y, z in zip(weights, other, parameters(one), strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5)
    (again, planned), (_, planned_too) = (
        torch.load(tmp_path / f"again-{rank}.pt") for rank in (0, 1)
    )
    assert again == pytest.approx(alphas, rel=1e-5)
    assert planned == planned_too
