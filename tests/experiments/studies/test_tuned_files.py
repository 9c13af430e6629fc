"""What stands in `tuned.json` is checked as strictly as what a user types."""

import json

import pytest

from regdrop.experiments import build_arms
from regdrop.experiments.arms import optional_arms
from regdrop.experiments.studies.choices import apply_tuned

NO_NUMBER = "rdrop.alpha must be a number, got "


@pytest.mark.parametrize("name", ["rdrop", "matched-dropout"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rdrop.alpha": "x"}, NO_NUMBER),
        ({"rdrop.alpha": True}, NO_NUMBER),
        ({"rdrop.alpha": None}, NO_NUMBER),
        ({"rdrop.alpha": float("nan")}, "alpha must be finite and at least 0, got nan"),
        ({"rdrop.alpha": -1}, "alpha must be finite and at least 0, got -1"),
        ({"rdrop.alhpa": 1}, "did you mean 'alpha'?"),
        ({"training.learning_rate": float("inf")}, "learning_rate must be a finite number"),
        ({"training.max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"dropout": 0.3}, "must be rdrop.NAME or training.NAME, got 'dropout'"),
        ({"name": "x"}, "must be rdrop.NAME or training.NAME, got 'name'"),
        ([], "is not a file of `regdrop tune`"),
        ([["rdrop.alpha", 1]], "is not a file of `regdrop tune`"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_file(tmp_path, short, name, settings, message):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"study": "compare", "arms": {name: {"settings": settings}}}))
    arms = build_arms(short) | optional_arms(short)
    with pytest.raises(ValueError, match=r"tuned\.json") as caught:
        apply_tuned([arms[name]], "compare", path)
    assert message in str(caught.value)
