import pytest

from regdrop import (
    RDropBCEWithLogitsLoss,
    RDropCrossEntropyLoss,
    RDropL1Loss,
    RDropMSELoss,
    RDropSmoothL1Loss,
)

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
    with pytest.raises(ValueError, match=r"label_smoothing must be between 0 and 1, got 1\.5"):
        RDropCrossEntropyLoss(1.0, label_smoothing=1.5)
    with pytest.raises(TypeError, match="label_smoothing"):
        RDropMSELoss(1.0, label_smoothing=0.1)
