from dataclasses import asdict, replace
from pathlib import Path

import pytest

from regdrop import RDropConfig, find_dropout
from regdrop.experiments import build_arms
from regdrop.experiments.arms import Arm, optional_arms
from regdrop.experiments.recording.settings import check_same_config, resolved_config
from regdrop.experiments.running import run
from regdrop.experiments.studies.definitions import study_arms
from regdrop.experiments.studies.variations import with_settings
from regdrop.tasks.images.presets import DIGITS


def test_five_arms_differ_in_what_their_names_say():
    arms = build_arms(DIGITS)
    assert list(arms) == ["baseline", "baseline-2x", "alpha-0", "rdrop", "rdrop-one-backward"]
    single = RDropConfig(alpha=0, num_passes=1, monitor_steps=DIGITS.training.logging_steps)
    assert arms["baseline"].rdrop == arms["baseline-2x"].rdrop == single
    assert (arms["alpha-0"].rdrop.alpha, arms["alpha-0"].rdrop.num_passes) == (0, 2)
    assert arms["rdrop"].rdrop.alpha == DIGITS.rdrop.alpha > 0
    assert arms["rdrop"].rdrop.backward_passes is None
    assert arms["rdrop-one-backward"].rdrop.backward_passes == 1
    assert {arm.rdrop.scale for arm in arms.values()} == {"mean"}


def test_matched_dropout_is_one_pass_with_the_odds_of_alpha():
    arm = optional_arms(DIGITS)["matched-dropout"]
    assert arm.rdrop.num_passes == 1
    assert arm.dropout_odds == 1 + DIGITS.rdrop.alpha
    # The same grid of alphas serves both arms.
    tuned = with_settings(arm, {"rdrop.alpha": 7, "training.learning_rate": 1e-3})
    assert (tuned.dropout_odds, tuned.rdrop) == (8, arm.rdrop)
    assert tuned.training.learning_rate == 1e-3
    settings = resolved_config(DIGITS, arm)
    with pytest.raises(ValueError, match="other settings \\(dropout_odds\\)"):
        check_same_config(
            Path("record.json"),
            settings,
            resolved_config(DIGITS, tuned) | {"training": settings["training"]},
        )


@pytest.mark.parametrize(
    ("options", "odds", "said"),
    [
        ({"alpha": 0.3}, 1.3, "times 1.3"),
        ({"alpha": 8, "alpha_schedule": "linear", "alpha_warmup_ratio": 1.0}, 5, "times 5"),
        ({"alpha": 8, "alpha_schedule": "cosine", "alpha_warmup_ratio": 0.5}, 7, "times 6.99"),
        ({"alpha": "auto"}, 7.5, "times 7.5"),
        ({"alpha": "auto", "alpha_start": 4.0, "alpha_max": 16.0}, 11, "times 11"),
        ({"alpha": "auto", "alpha_rule": "stall"}, 9.5, "times 9.5, for alpha in the middle"),
        (
            {"alpha": "auto", "alpha_rule": "gap", "alpha_max": 0.5},
            1.5,
            "times 1.5, for alpha in the middle between 0.5 and 0.5",
        ),
    ],
)
def test_matched_dropout_goes_by_the_mean_of_alpha_over_the_run(options, odds, said):
    task = replace(DIGITS, rdrop=RDropConfig(**options))
    arm = optional_arms(task)["matched-dropout"]
    assert arm.dropout_odds == pytest.approx(odds, rel=1e-3)
    assert said in arm.description
    if options["alpha"] == 0.3:  # the runs of a constant that are finished remain its runs
        assert arm.dropout_odds == 1 + 0.3


def test_two_thirds_of_a_batch_hold_whole_micro_batches():
    training = replace(DIGITS.training, batch_size=32, gradient_accumulation_steps=4)
    arm = optional_arms(replace(DIGITS, training=training))["two-thirds-batch"]
    assert (arm.training.batch_size, arm.training.max_steps) == (20, training.max_steps)
    assert arm.rdrop.alpha == DIGITS.rdrop.alpha


@pytest.mark.slow
def test_a_run_trains_with_the_odds_of_its_arm(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "build_trainer", lambda *args, **_: seen.append(args[5]) or 1 / 0)
    arm = replace(optional_arms(DIGITS)["matched-dropout"], dropout_odds=3.0)
    with pytest.raises(ZeroDivisionError):
        run.train_run(DIGITS, arm, 0, run.RunPaths.alone(tmp_path))
    sources = [s for s in find_dropout(seen[0]) if s.rate and not s.name.startswith("config.")]
    rates = {source.rate for source in sources}
    odds = 3 * DIGITS.dropout / (1 - DIGITS.dropout)
    assert list(rates) == [pytest.approx(odds / (1 + odds))]


def test_equal_compute_means_twice_the_updates_and_nothing_else():
    arms = build_arms(DIGITS)
    once, twice = (asdict(arms[name].training) for name in ("baseline", "baseline-2x"))
    assert twice.pop("max_steps") == 2 * once.pop("max_steps")
    assert once == twice
    assert all(arms[name].training == DIGITS.training for name in ("alpha-0", "rdrop"))


def test_a_rule_that_goes_back_to_the_best_checkpoint_needs_one():
    task = DIGITS
    restoring = RDropConfig(alpha="auto", alpha_rule="restore")
    averaging = replace(task.training, average_checkpoints=2)
    Arm("one", "", restoring, task.training)
    Arm("averaged", "", RDropConfig(alpha="auto", alpha_rule="stall"), averaging)
    with pytest.raises(ValueError, match=r"goes back.*average_checkpoints=2 keeps"):
        Arm("both", "", restoring, averaging)
    for averaged, has_rule in ((replace(task, training=averaging), False), (task, True)):
        arms = study_arms("alpha-schedules", averaged)
        assert any(arm.rdrop.alpha_rule == "restore" for arm in arms) is has_rule
        assert any(arm.rdrop.alpha_rule == "stall" for arm in arms)


def test_every_arm_computes_the_loss_as_the_task_says():
    rdrop = RDropConfig(alpha=1.0, impl="chunked", fused_linear=True, class_weight=(1.0, 2.0))
    task = replace(DIGITS, rdrop=rdrop)
    for name, arm in {**build_arms(task), **optional_arms(task)}.items():
        assert arm.rdrop.class_weight == (1.0, 2.0)
        if name != "fraternal":  # it compares logits
            assert (arm.rdrop.impl, arm.rdrop.fused_linear) == ("chunked", True)
    own = replace(DIGITS, rdrop=RDropConfig(alpha=1.0, likelihood="model"))
    assert {arm.rdrop.likelihood for arm in build_arms(own).values()} == {"model"}
