import inspect

import pytest

from regdrop import (
    RDropBCEWithLogitsLoss,
    RDropConfig,
    RDropCrossEntropyLoss,
    RDropL1Loss,
    RDropMSELoss,
    RDropSmoothL1Loss,
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_l1_loss,
    rdrop_mse_loss,
    rdrop_smooth_l1_loss,
)

FUNCTIONS = [
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_l1_loss,
    rdrop_mse_loss,
    rdrop_smooth_l1_loss,
]
MODULES = [
    RDropBCEWithLogitsLoss,
    RDropCrossEntropyLoss,
    RDropL1Loss,
    RDropMSELoss,
    RDropSmoothL1Loss,
]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha must be finite and at least 0, got -1.0"),
        ({"num_passes": 1}, "num_passes must be at least 2"),
        ({"scale": "avg"}, "scale must be one of"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"backward_passes": 3}, "backward_passes must be None or from 1 to num_passes=2"),
    ],
)
def test_an_option_out_of_range_is_refused_before_the_first_batch(module, options, message):
    with pytest.raises(ValueError, match=message):
        module(**{"alpha": 1.0, **options})


def test_label_smoothing_is_checked_by_the_loss_that_has_it():
    with pytest.raises(ValueError, match=r"label_smoothing must be .* from 0 to 1, got 1\.5"):
        RDropCrossEntropyLoss(1.0, label_smoothing=1.5)
    with pytest.raises(TypeError, match="label_smoothing"):
        RDropMSELoss(1.0, label_smoothing=0.1)


@pytest.mark.parametrize("function", [*FUNCTIONS, *MODULES], ids=lambda function: function.__name__)
def test_one_default_has_the_same_meaning_everywhere(function):
    parameters = inspect.signature(function).parameters
    assert parameters["scale"].default == RDropConfig().scale == "mean"
    assert parameters["num_passes"].default == RDropConfig().num_passes
    assert parameters["backward_passes"].default == RDropConfig().backward_passes
