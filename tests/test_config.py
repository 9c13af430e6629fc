import json
from dataclasses import FrozenInstanceError

import pytest

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
        ({"alpha": "1"}, TypeError, "alpha must be a number, got str"),
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
            "class_weight needs a likelihood that regdrop computes",
        ),
        (
            {"likelihood": "model", "unlabelled_index": -1},
            ValueError,
            "unlabelled_index needs a likelihood that regdrop computes",
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
