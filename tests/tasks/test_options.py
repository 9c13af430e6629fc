import pytest

from regdrop.tasks import PRESETS
from regdrop.tasks.options import change_task

DIGITS = PRESETS["digits"]


def test_settings_are_checked_together_not_one_by_one():
    # Neither of the two holds beside the preset's other value.
    settings = ["rdrop.num_passes=1", "rdrop.alpha=0"]
    for order in (settings, settings[::-1]):
        assert change_task(DIGITS, settings=order).rdrop.num_passes == 1
    settings = ["training.gradient_accumulation_steps=7", "training.batch_size=21"]
    assert change_task(DIGITS, settings=settings).training.batch_size == 21
    with pytest.raises(ValueError, match="num_passes=1 needs alpha=0"):
        change_task(DIGITS, settings=["rdrop.num_passes=1"])


def test_a_setting_of_the_command_line_comes_after_its_option():
    assert change_task(DIGITS, alpha=2.0, settings=["rdrop.alpha=3"]).rdrop.alpha == 3


def test_an_alpha_that_nobody_chose_is_chosen_by_name():
    rdrop = change_task(DIGITS, alpha="auto", settings=["rdrop.alpha_rule=stall"]).rdrop
    assert (rdrop.alpha, rdrop.alpha_rule) == ("auto", "stall")
    settings = ["rdrop.alpha_schedule=cosine", "rdrop.alpha_warmup_ratio=0.5"]
    assert change_task(DIGITS, settings=settings).rdrop.alpha_warmup_ratio == 0.5
    assert change_task(DIGITS, settings=["rdrop.alpha=auto"]).rdrop.alpha == "auto"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rdrop.beta=1", "RDropConfig has no setting 'beta'"),
        ("beta=1", "digits has no setting 'beta'"),
        ("beta.x=1", "digits has no setting 'beta'"),
        ("dropout.x=1", "setting 'dropout' has no parts, got x"),
        ("rdrop.alpha=true", "settings alpha=True cannot be: alpha must be a number, got bool"),
        ("alpha", "a setting must be name=value, got 'alpha'"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        change_task(DIGITS, settings=[setting])
