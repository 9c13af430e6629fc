import math

import pytest

from regdrop import RDropConfig
from regdrop.schedule import is_monitored, plan_step


def plans(steps, *, total_steps=None, given=None, **options):
    config = RDropConfig(**options)
    return [plan_step(config, step, total_steps=total_steps, alpha=given) for step in range(steps)]


def alphas(*arguments, **options):
    return [plan.alpha for plan in plans(*arguments, **options)]


def test_constant_alpha_on_every_step():
    assert plans(3, alpha=2.0) == [(2, 2.0, 1.0)] * 3


def test_one_pass_is_one_pass_on_any_scale():
    assert plans(2, alpha=0, num_passes=1, scale="sum") == [(1, 0.0, 1.0)] * 2


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]),
        ("cosine", [1 - math.cos(math.pi * t / 4) for t in range(5)] + [2.0]),
    ],
)
def test_ramps_go_from_zero_to_alpha(schedule, expected):
    found = plans(6, alpha=2.0, alpha_schedule=schedule, alpha_warmup_steps=4)
    assert [plan.alpha for plan in found] == pytest.approx(expected)


def test_a_late_start_begins_its_ramp_there():
    found = plans(
        6, alpha=2.0, alpha_schedule="linear", alpha_warmup_steps=2, start_step=2, scale="sum"
    )
    assert [plan.alpha for plan in found] == [0.0, 0.0, 0.0, 1.0, 2.0, 2.0]
    assert [plan.num_passes for plan in found] == [1, 1, 2, 2, 2, 2]
    assert [plan.factor for plan in found] == [2.0, 2.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("ratio", "start"), [(1.0, 0), (0.5, 0), (0.5, 4), (1.0, 4)])
def test_a_ratio_is_a_part_of_the_steps_from_the_start_on(schedule, ratio, start):
    ramp = {"alpha": 6.0, "alpha_schedule": schedule, "start_step": start}
    found = plans(24, total_steps=24, alpha_warmup_ratio=ratio, **ramp)
    assert found == plans(24, alpha_warmup_steps=round(ratio * (24 - start)), **ramp)
    ends = [step for step, plan in enumerate(found) if plan.alpha == 6.0]
    assert ends == ([] if ratio == 1 else list(range(start + (24 - start) // 2, 24)))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [3, 4.75, 6.5, 8.25, 10, 10]),
        ("cosine", [3 + 3.5 * (1 - math.cos(math.pi * t / 4)) for t in range(5)] + [10]),
    ],
)
def test_a_ramp_begins_where_it_is_said_to_and_may_fall(schedule, expected):
    ramp = {"alpha_schedule": schedule, "alpha_warmup_steps": 4}
    assert alphas(6, alpha=10.0, alpha_start=3.0, **ramp) == pytest.approx(expected)
    fallen = alphas(6, alpha=3.0, alpha_start=10.0, **ramp)
    assert fallen == pytest.approx([13 - alpha for alpha in expected])
    # What falls has one pass in the end.
    single = plans(6, alpha=3.0, alpha_start=10.0, single_pass_below=6.0, **ramp)
    assert [plan.num_passes for plan in single] == [2, 2, 2, 1, 1, 1]


def test_auto_begins_where_it_is_said_to():
    ramp = {"alpha": "auto", "alpha_start": 3.0, "alpha_max": 10.0}
    assert alphas(7, total_steps=7, **ramp) == pytest.approx([3, 4, 5, 6, 7, 8, 9])
    late = alphas(9, total_steps=9, start_step=2, **ramp)
    assert late == pytest.approx([0, 0, 3, 4, 5, 6, 7, 8, 9])
    assert alphas(9, total_steps=7, **ramp)[-2:] == [10.0, 10.0]


def test_auto_is_the_ramp_over_the_whole_run():
    assert alphas(7, total_steps=7, alpha="auto") == pytest.approx([3, 4, 5, 6, 7, 8, 9])
    found = alphas(8, total_steps=8, alpha="auto", alpha_start=0.0, alpha_max=3.0, start_step=2)
    assert found == pytest.approx([0, 0, 0, 0.5, 1, 1.5, 2, 2.5])
    # A lower end is where it begins.
    assert alphas(3, total_steps=3, alpha="auto", alpha_max=2.0) == [2.0, 2.0, 2.0]
    # A run that goes on beyond its length stays at the end.
    assert alphas(6, total_steps=4, alpha="auto")[-2:] == [10.0, 10.0]


def test_an_alpha_from_outside_is_the_scheduled_one():
    found = plans(4, given=3.0, every_n_steps=2, start_step=1)
    assert found == [(1, 0.0, 1.0), (2, 6.0, 1.0), (1, 0.0, 1.0), (2, 6.0, 1.0)]
    config = RDropConfig(alpha="auto", alpha_rule="stall", single_pass_below=2.0)
    assert plan_step(config, 5, alpha=1.9) == (1, 0.0, 1.0)
    assert plan_step(config, 5, alpha=2.0) == (2, 2.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"alpha": "auto"},
            "alpha='auto' is a part of the run: give total_steps, .*; or use alpha=10 with "
            "alpha_schedule='linear', alpha_start=3 and alpha_warmup_steps, a number of steps",
        ),
        (
            {"alpha_schedule": "linear", "alpha_warmup_ratio": 0.5},
            r"alpha_warmup_ratio=0\.5 is a part of the run: give total_steps, .*; or use "
            "alpha_warmup_steps instead",
        ),
        ({"alpha": "auto", "alpha_rule": "gap"}, "give alpha=controller.alpha"),
    ],
)
def test_an_alpha_that_no_step_knows_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        plan_step(RDropConfig(**options), 0)


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_one_pass_while_alpha_is_small_leaves_the_likelihood_its_weight(scale):
    ramp = {"alpha": 4.0, "alpha_schedule": "linear", "alpha_warmup_steps": 4, "scale": scale}
    found = plans(6, single_pass_below=2.0, **ramp)
    assert [plan.num_passes for plan in found] == [1, 1, 2, 2, 2, 2]
    assert [plan.alpha for plan in found] == [0.0, 0.0, 2.0, 3.0, 4.0, 4.0]
    assert {plan.factor * (plan.num_passes if scale == "sum" else 1) for plan in found} == {
        2.0 if scale == "sum" else 1.0
    }


def test_the_threshold_reads_alpha_before_it_is_multiplied_for_every_nth_step():
    ramp = {"alpha": 4.0, "alpha_schedule": "linear", "alpha_warmup_steps": 4}
    found = plans(6, single_pass_below=2.0, every_n_steps=2, **ramp)
    assert [plan.num_passes for plan in found] == [1, 1, 2, 1, 2, 1]
    assert [plan.alpha for plan in found] == [0, 0, 4.0, 0, 8.0, 0]


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("num_passes", [2, 3])
def test_weight_of_the_likelihood_is_the_same_on_all_steps(scale, num_passes):
    found = plans(6, scale=scale, num_passes=num_passes, every_n_steps=3, start_step=2)
    for plan in found:
        likelihoods = plan.num_passes if scale == "sum" else 1
        assert plan.factor * likelihoods == (num_passes if scale == "sum" else 1)


@pytest.mark.parametrize("start_step", [0, 2])
def test_every_nth_step_counted_from_the_start(start_step):
    found = plans(9, every_n_steps=3, start_step=start_step)
    active = [step for step, plan in enumerate(found) if plan.num_passes == 2]
    assert active == list(range(start_step, 9, 3))


@pytest.mark.parametrize(("rescale", "total"), [(True, 12.0), (False, 3.0)])
def test_rescaling_keeps_the_mean_of_alpha(rescale, total):
    found = plans(12, alpha=1.0, every_n_steps=4, rescale=rescale)
    assert sum(plan.alpha for plan in found) == total


def test_monitored_steps():
    config = RDropConfig(monitor_steps=3)
    assert [step for step in range(7) if is_monitored(config, step)] == [0, 3, 6]
    assert not is_monitored(RDropConfig(), 0)


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        plan_step(RDropConfig(), -1)
