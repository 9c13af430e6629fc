import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from regdrop import RDropConfig


def test_defaults_are_two_stacked_passes_on_the_baselines_scale():
    assert RDropConfig().to_dict() == {
        "alpha": 1.0,
        "num_passes": 2,
        "backward_passes": None,
        "fraction": 1.0,
        "every_n_steps": 1,
        "rescale": True,
        "start_step": 0,
        "alpha_schedule": "constant",
        "alpha_warmup_steps": 0,
        "alpha_warmup_ratio": None,
        "alpha_start": None,
        "alpha_rule": "ramp",
        "alpha_max": None,
        "alpha_min": 1.0,
        "single_pass_below": None,
        "dropout_rates": None,
        "passes": "stacked",
        "scale": "mean",
        "class_weight": None,
        "unlabelled_index": None,
        "likelihood": "auto",
        "monitor_steps": None,
        "fused_linear": "auto",
        "impl": "auto",
        "method": "rdrop",
        "noise": 1e-5,
    }


def test_json_and_back_is_the_same_config():
    config = RDropConfig(
        alpha=2,
        passes="sequential",
        dropout_rates=(0.1, 0.3),
        class_weight=(1.0, 2.0),
        alpha_schedule="cosine",
        alpha_warmup_steps=10,
    )
    assert RDropConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_alpha_that_nobody_chose_goes_through_json_too():
    config = RDropConfig(
        alpha="auto", alpha_rule="stall", alpha_max=8, alpha_min=3, single_pass_below=2
    )
    assert RDropConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    ramp = RDropConfig(alpha=4.0, alpha_schedule="linear", alpha_warmup_ratio=0.5, alpha_start=2.0)
    assert RDropConfig.from_dict(json.loads(json.dumps(ramp.to_dict()))) == ramp


def test_a_config_that_was_saved_before_there_was_a_rule_loads():
    saved = RDropConfig(alpha=3.0, alpha_schedule="linear", alpha_warmup_steps=9).to_dict()
    names = ("alpha_warmup_ratio", "alpha_start", "alpha_rule", "alpha_max", "alpha_min")
    names += ("single_pass_below",)
    for name in names:
        del saved[name]
    assert RDropConfig.from_dict(saved).to_dict() == {
        **saved,
        "alpha_warmup_ratio": None,
        "alpha_start": None,
        "alpha_rule": "ramp",
        "alpha_max": None,
        "alpha_min": 1.0,
        "single_pass_below": None,
    }


# What version 0.2 wrote beside a checkpoint, but for options that are as they are now.
SAVED = {
    **{"alpha_schedule": "constant", "alpha_warmup_steps": 0, "alpha_warmup_ratio": None},
    **{"alpha_rule": "ramp", "alpha_max": 16.0, "alpha_min": 1.0, "single_pass_below": None},
    **{"num_passes": 2, "every_n_steps": 1, "rescale": True, "start_step": 0, "scale": "mean"},
}


def test_options_that_an_earlier_version_saved_are_what_they_were():
    assert RDropConfig.from_dict({"alpha": 1.0, **SAVED}) == RDropConfig()
    ramp = RDropConfig(alpha="auto", alpha_start=0.0, alpha_max=16.0)
    assert RDropConfig.from_dict({"alpha": "auto", **SAVED}) == ramp
    later = {"alpha": "auto", "alpha_start": 0.0, **SAVED}
    assert RDropConfig.from_dict(later) == ramp
    stall = RDropConfig.from_dict({**later, "alpha_rule": "stall"})
    assert stall == RDropConfig(alpha="auto", alpha_rule="stall", alpha_max=16.0)
    assert replace(stall, alpha_rule="ramp").highest_alpha == 16
    # What was unpickled never saw its options.
    before = RDropConfig(alpha=2.0)
    object.__setattr__(before, "alpha_start", 0.0)
    object.__setattr__(before, "alpha_max", 16.0)
    assert replace(before, fraction=0.5) == RDropConfig(alpha=2.0, fraction=0.5)


def test_options_that_are_no_mapping_are_named():
    with pytest.raises(TypeError, match="options must be a mapping, got list"):
        RDropConfig.from_dict([])


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({}, (3.0, 10.0)),
        ({"alpha_max": 2.0}, (2.0, 2.0)),
        ({"alpha_start": 1.0}, (1.0, 10.0)),
        ({"alpha_rule": "stall"}, (None, None)),
        ({"alpha_rule": "stall", "alpha_max": 16.0}, (None, 16.0)),
    ],
)
def test_saved_options_say_between_which_numbers_alpha_rises(options, ends):
    config = RDropConfig(alpha="auto", **options)
    saved = config.to_dict()
    assert (saved["alpha_start"], saved["alpha_max"]) == ends
    assert RDropConfig.from_dict(saved).to_dict() == saved


def test_another_alpha_leaves_what_reads_it_behind():
    auto = RDropConfig(
        alpha="auto",
        alpha_rule="gap",
        alpha_max=8.0,
        alpha_min=2.0,
        single_pass_below=2.0,
        fraction=0.5,
    )
    assert auto.with_alpha(0.0) == RDropConfig(alpha=0.0, fraction=0.5)
    ramp = RDropConfig(alpha="auto", alpha_start=3.0, alpha_max=10.0)
    assert ramp.with_alpha(6.0) == RDropConfig(alpha=6.0)


@pytest.mark.parametrize(
    ("options", "highest"),
    [
        ({"alpha": 2.0}, 2),
        ({"alpha": 2.0, "alpha_schedule": "linear", "alpha_warmup_steps": 9}, 2),
        (
            {
                "alpha": 2.0,
                "alpha_start": 5.0,
                "alpha_schedule": "linear",
                "alpha_warmup_steps": 9,
            },
            5,
        ),
        ({"alpha": "auto"}, 10),
        ({"alpha": "auto", "alpha_max": 12.0}, 12),
        ({"alpha": "auto", "alpha_rule": "stall"}, 16),
        ({"alpha": "auto", "alpha_rule": "stall", "alpha_max": 12.0}, 12),
    ],
)
def test_the_highest_alpha_of_a_run(options, highest):
    assert RDropConfig(**options).highest_alpha == highest


def test_no_step_of_a_ramp_has_more_than_another_alpha():
    ramp = RDropConfig(alpha=4.0, alpha_schedule="linear", alpha_warmup_steps=9, alpha_start=2.0)
    assert ramp.with_alpha(6.0) == replace(ramp, alpha=6.0)
    assert ramp.with_alpha(0.0) == replace(ramp, alpha=0.0, alpha_start=0.0)


def test_numbers_of_numpy_are_those_of_python():
    given = RDropConfig(alpha=np.float32(0.5), num_passes=np.int64(3), fraction=np.float64(0.5))
    plain = RDropConfig(alpha=0.5, num_passes=3, fraction=0.5)
    assert json.dumps(given.to_dict()) == json.dumps(plain.to_dict())
    with pytest.raises(TypeError, match="num_passes must be an integer, got float"):
        RDropConfig(num_passes=np.float32(2))


def test_a_config_is_frozen_and_hashable():
    config = RDropConfig(class_weight=[1, 2])
    assert {config: 1}[RDropConfig(class_weight=(1.0, 2.0))] == 1
    with pytest.raises(FrozenInstanceError):
        config.alpha = 2.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -1}, ValueError, "alpha must be finite and at least 0, got -1"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"alpha": float("inf")}, ValueError, "alpha must be finite"),
        ({"alpha": "1"}, TypeError, "alpha must be a number, got str '1'; or 'auto'"),
        ({"alpha": True}, TypeError, "alpha must be a number, got bool"),
        ({"num_passes": 0}, ValueError, "num_passes must be at least 1, got 0"),
        ({"num_passes": 2.0}, TypeError, "num_passes must be an integer, got float"),
        ({"num_passes": 1}, ValueError, r"num_passes=1 needs alpha=0, got alpha=1\.0"),
        ({"backward_passes": 0}, ValueError, "backward_passes must be at least 1, got 0"),
        ({"backward_passes": 3}, ValueError, "backward_passes must be at most num_passes=2, got 3"),
        ({"fraction": 0}, ValueError, "fraction must be above 0 and at most 1, got 0"),
        ({"fraction": 1.1}, ValueError, r"fraction must be finite and from 0 to 1, got 1\.1"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be at least 1, got 0"),
        ({"start_step": -1}, ValueError, "start_step must be at least 0, got -1"),
        ({"monitor_steps": 0}, ValueError, "monitor_steps must be at least 1, got 0"),
        ({"rescale": "yes"}, ValueError, r"rescale must be one of \(True, False\), got 'yes'"),
        ({"alpha_schedule": "step"}, ValueError, "alpha_schedule must be one of .* got 'step'"),
        ({"alpha_schedule": "linear"}, ValueError, "needs alpha_warmup_steps above 0"),
        ({"alpha_warmup_steps": 5}, ValueError, "alpha_warmup_steps=5 needs alpha_schedule="),
        (
            {"alpha_warmup_ratio": 0.5},
            ValueError,
            r"alpha_warmup_ratio=0\.5 needs alpha_schedule='linear' or 'cosine', got 'constant'",
        ),
        (
            {"alpha_schedule": "linear", "alpha_warmup_ratio": 0},
            ValueError,
            "alpha_warmup_ratio must be above 0 and at most 1, got 0",
        ),
        (
            {"alpha_schedule": "linear", "alpha_warmup_ratio": 1.5},
            ValueError,
            r"alpha_warmup_ratio must be finite and from 0 to 1, got 1\.5",
        ),
        (
            {"alpha_schedule": "linear", "alpha_warmup_ratio": True},
            TypeError,
            "alpha_warmup_ratio must be a number, got bool",
        ),
        (
            {"alpha_schedule": "linear", "alpha_warmup_ratio": 0.5, "alpha_warmup_steps": 3},
            ValueError,
            r"given once, got alpha_warmup_steps=3 and alpha_warmup_ratio=0\.5",
        ),
        ({"alpha": "auto", "num_passes": 1}, ValueError, "needs alpha=0, got alpha='auto'"),
        (
            {"alpha": "auto", "alpha_schedule": "linear", "alpha_warmup_ratio": 1.0},
            ValueError,
            "alpha='auto' is a schedule itself: it excludes alpha_schedule='linear'",
        ),
        (
            {"alpha": "auto", "alpha_warmup_steps": 5},
            ValueError,
            "alpha='auto' is a schedule itself: it excludes alpha_warmup_steps=5; give .* a number",
        ),
        (
            {"alpha": "auto", "alpha_warmup_ratio": 0.5},
            ValueError,
            "alpha='auto' is a schedule itself: it excludes alpha_warmup_ratio=0.5; give .* number",
        ),
        ({"alpha": "auto", "alpha_rule": "best"}, ValueError, "alpha_rule must be one of"),
        ({"alpha_rule": "stall"}, ValueError, "alpha_rule='stall' needs alpha='auto'"),
        (
            {"alpha": "auto", "alpha_rule": "kl-target", "method": "fraternal"},
            ValueError,
            "reads the KL, which method='fraternal' does not compute",
        ),
        (
            {"alpha": "auto", "alpha_rule": "kl-target", "single_pass_below": 2.0},
            ValueError,
            r"single_pass_below=2\.0 needs monitor_steps",
        ),
        ({"alpha": 2.0, "alpha_max": 8.0}, ValueError, r"alpha_max=8\.0 needs alpha='auto'"),
        ({"alpha": "auto", "alpha_max": 0}, ValueError, "alpha_max must be above 0, got 0"),
        ({"alpha": "auto", "alpha_min": 0}, ValueError, "alpha_min must be above 0, got 0"),
        (
            {"alpha": "auto", "alpha_rule": "stall", "alpha_min": 8.0, "alpha_max": 4.0},
            ValueError,
            r"alpha_min must be at most alpha_max=4\.0, got 8\.0",
        ),
        ({"alpha": 2.0, "alpha_min": 3.0}, ValueError, r"alpha_min=3\.0 needs alpha='auto'"),
        (
            {"alpha": "auto", "alpha_min": 3.0},
            ValueError,
            r"alpha_min=3\.0 needs an alpha_rule that reads the validation loss",
        ),
        ({"alpha_start": -1}, ValueError, "alpha_start must be finite and at least 0, got -1"),
        (
            {"alpha_start": 2.0},
            ValueError,
            r"alpha_start=2\.0 needs alpha_schedule='linear' or 'cosine', or alpha='auto'",
        ),
        (
            {"alpha": "auto", "alpha_start": 20.0},
            ValueError,
            r"alpha_start must be at most alpha_max=10\.0: alpha='auto' rises, got 20\.0",
        ),
        (
            {"alpha": "auto", "alpha_rule": "stall", "alpha_start": 2.0},
            ValueError,
            r"alpha_start=2\.0 needs alpha_rule='ramp', got 'stall', which begins at alpha_min",
        ),
        (
            {
                **{"alpha": 0, "num_passes": 1, "alpha_start": 2.0},
                **{"alpha_schedule": "linear", "alpha_warmup_steps": 2},
            },
            ValueError,
            r"num_passes=1 needs alpha_start=0, got alpha_start=2\.0",
        ),
        ({"single_pass_below": -1}, ValueError, "single_pass_below must be finite and at least 0"),
        (
            {"alpha": 0.0, "num_passes": 1, "single_pass_below": 0.0},
            ValueError,
            r"single_pass_below=0\.0 needs num_passes above 1",
        ),
        (
            {"alpha": 2.0, "single_pass_below": 3.0},
            ValueError,
            r"single_pass_below must be at most alpha=2\.0, else no step has R-Drop, got 3\.0",
        ),
        (
            {"alpha": "auto", "single_pass_below": 11},
            ValueError,
            r"single_pass_below must be at most alpha_max=10\.0",
        ),
        (
            {"alpha": "auto", "alpha_rule": "stall", "single_pass_below": 11},
            ValueError,
            r"must be at most alpha_max=10\.0, .* where there is no evaluation and alpha follows",
        ),
        ({"passes": "parallel"}, ValueError, "passes must be one of .* got 'parallel'"),
        ({"scale": "none"}, ValueError, "scale must be one of .* got 'none'"),
        ({"dropout_rates": (0.1, 0.2)}, ValueError, "dropout_rates needs passes='sequential'"),
        (
            {"dropout_rates": (0.1,), "passes": "sequential"},
            ValueError,
            "one rate for each of num_passes=2",
        ),
        (
            {"dropout_rates": (0.1, 1.0), "passes": "sequential"},
            ValueError,
            r"dropout_rates must be from 0 up to 1, got 1\.0",
        ),
        ({"class_weight": (1, -1)}, ValueError, "class_weight must be finite and at least 0"),
        ({"fused_linear": "always"}, ValueError, "fused_linear must be one of"),
        ({"likelihood": "own"}, ValueError, "likelihood must be one of .* got 'own'"),
        (
            {"likelihood": "model", "class_weight": (1.0, 2.0)},
            ValueError,
            "class_weight needs an NLL that regdrop computes",
        ),
        (
            {"likelihood": "model", "unlabelled_index": -1},
            ValueError,
            "unlabelled_index needs an NLL that regdrop computes",
        ),
        (
            {"likelihood": "model", "method": "r3f"},
            ValueError,
            "method='r3f' needs likelihood='auto', got 'model'",
        ),
        ({"unlabelled_index": 1.0}, TypeError, "unlabelled_index must be an integer, got float"),
        ({"impl": "fast"}, ValueError, "impl must be one of .* got 'fast'"),
        ({"impl": "eager", "fused_linear": True}, ValueError, "impl='eager' keeps full logits"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        RDropConfig(**options)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match=r"RDropConfig has no option \['beta'\]; it has"):
        RDropConfig.from_dict({"alpha": 1, "beta": 2})


def test_a_misspelt_option_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"no option \['num_pases'\].*; did you mean 'num_passes'"):
        RDropConfig.from_dict({"num_pases": 2})


@pytest.mark.parametrize("name", ["rescale", "fused_linear"])
def test_a_number_is_no_boolean(name):
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        RDropConfig(**{name: 0})


@pytest.mark.parametrize("name", ["dropout_rates", "class_weight"])
@pytest.mark.parametrize("value", ["11", ["0.1", 0.2], [True, 0.2], [None, 0.2], {"1": 0.1}, 0.1])
def test_several_numbers_are_numbers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be several numbers, got "):
        RDropConfig(passes="sequential", **{name: value})


def test_several_numbers_may_be_a_tensor():
    assert RDropConfig(class_weight=torch.tensor([1.0, 0.5])).class_weight == (1.0, 0.5)


def test_no_class_weight_at_all_is_refused():
    with pytest.raises(ValueError, match="class_weight must hold one weight for each class"):
        RDropConfig(class_weight=[])


def test_a_file_that_holds_the_options_is_loaded_as_plain_data(tmp_path):
    options = RDropConfig(alpha="auto", passes="sequential", dropout_rates=(0.1, 0.2))
    torch.save({"options": options}, tmp_path / "options.pt")
    assert torch.load(tmp_path / "options.pt", weights_only=True) == {"options": options}
