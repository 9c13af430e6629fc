from types import SimpleNamespace

import pytest
from torch import nn

from regdrop.experiments.running.rising_dropout import RisingDropout
from regdrop.passes import find_dropout


def test_odds_rise_linearly_from_those_of_the_model():
    model = nn.Sequential(nn.Dropout(0.2), nn.Linear(2, 2), nn.Dropout(0.0), nn.Dropout(0.5))
    callback = RisingDropout(model, 5.0)
    # A run that goes on from step 8 has the rates of one that was never stopped.
    for step in (0, 1, 8, 4):
        callback.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=10), None)
        factor = 1 + 4 * step / 10
        rates = [source.rate for source in find_dropout(model)]
        odds = [rate / (1 - rate) for rate in rates]
        assert odds == pytest.approx([0.25 * factor, 0, factor])


def test_a_model_without_dropout_is_refused():
    with pytest.raises(ValueError, match="must have a dropout rate above 0"):
        RisingDropout(nn.Linear(2, 2), 4.0)
