from dataclasses import replace
from pathlib import Path

import pytest

from regdrop import RDropConfig
from regdrop.experiments.arms import Arm, build_arms
from regdrop.experiments.recording.earlier_options import with_later_options
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.recording.settings import check_same_config, resolved_config

FROM_0_TO_16 = RDropConfig(alpha="auto", alpha_start=0.0, alpha_max=16.0)


def as_before(rdrop, **changes):
    """Return options as they were written when no default was None."""
    return {**rdrop.to_dict(), "alpha_start": 0.0, "alpha_max": 16.0, **changes}


@pytest.mark.parametrize(
    "rdrop",
    [
        RDropConfig(alpha=5.0),
        RDropConfig(alpha=5.0, alpha_schedule="linear", alpha_warmup_steps=9),
        RDropConfig(alpha="auto", alpha_rule="stall", alpha_max=16.0),
        FROM_0_TO_16,
    ],
)
def test_options_of_before_are_those_of_now(rdrop):
    found = with_later_options({"task": "x", "rdrop": as_before(rdrop)})
    assert found == {"task": "x", "rdrop": rdrop.to_dict()}
    assert with_later_options(found) == found


def test_a_rule_that_reads_the_validation_loss_reached_16_and_does_so_now():
    rule = RDropConfig(alpha="auto", alpha_rule="stall")
    found = with_later_options({"rdrop": as_before(rule)})
    assert found == with_later_options({"rdrop": rule.to_dict()}) == with_later_options(found)
    assert RDropConfig.from_dict(found["rdrop"]) == replace(rule, alpha_max=16.0)
    assert with_later_options({"rdrop": {"alpha": "auto", "alpha_rule": "stall"}}) == found


def test_an_alpha_of_auto_was_a_ramp_from_0_to_16():
    found = with_later_options({"rdrop": {"alpha": "auto"}})["rdrop"]
    assert RDropConfig.from_dict(found) == FROM_0_TO_16


def test_options_of_now_stay():
    for rdrop in (RDropConfig(), RDropConfig(alpha="auto"), FROM_0_TO_16):
        assert with_later_options({"rdrop": rdrop.to_dict()}) == {"rdrop": rdrop.to_dict()}
    assert with_later_options({}) == {}


def test_runs_of_before_are_gone_on_with_by_the_same_alpha_alone(short):
    arm = build_arms(short)["rdrop"]
    now = resolved_config(short, arm)
    before = {**now, "rdrop": as_before(arm.rdrop)}
    check_same_config(Path("record.json"), before, now)

    auto = Arm("auto", "", RDropConfig(alpha="auto"), arm.training)
    before = {**now, "rdrop": as_before(auto.rdrop)}
    check_same_config(
        Path("record.json"), before, resolved_config(short, replace(auto, rdrop=FROM_0_TO_16))
    )
    with pytest.raises(ValueError, match=r"rdrop\.alpha_max, rdrop\.alpha_start"):
        check_same_config(Path("record.json"), before, resolved_config(short, auto))


def test_a_record_of_before_is_read_in_the_terms_of_today(tmp_path, record):
    path = tmp_path / "record.json"
    rdrop = RDropConfig(alpha=5.0)
    replace(record("rdrop", 0), config={"rdrop": as_before(rdrop)}).save(path)
    assert RunRecord.load(path).config == {"rdrop": rdrop.to_dict()}
