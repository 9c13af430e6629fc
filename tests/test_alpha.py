"""Rules of alpha: what each does at evaluations, state and resume, and a loop of one's own."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from regdrop import AlphaController, RDropConfig, rdrop_cross_entropy, rdrop_step, repeat_batch
from regdrop.alpha import RULES
from regdrop.schedule import scheduled_alpha

STEPS = 80


def follow(rule, losses, *, every=10, parts=(), **options):
    """Return alpha of the step after each evaluation."""
    controller = AlphaController(STEPS, rule=rule, **options)
    found = []
    for i, loss in enumerate(losses):
        nll, kl = parts[i] if parts else (None, None)
        controller.update(every * (i + 1) - 1, nll=nll, kl=kl, validation_loss=loss)
        found.append(controller.alpha)
    return found


# --- each rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [0.0, 3.0])
@pytest.mark.parametrize("start", [0, 20])
def test_the_ramp_is_the_one_of_the_config_and_reads_no_loss(start, begin):
    config = RDropConfig(alpha="auto", alpha_start=begin, alpha_max=12.0, start_step=start)
    controller = AlphaController.from_config(config, STEPS)
    for step in range(STEPS):
        assert controller.alpha == pytest.approx(scheduled_alpha(config, step, STEPS))
        controller.update(step, validation_loss=float(step % 3))
    assert controller.alpha == pytest.approx(12.0)


@pytest.mark.parametrize("rule", ["stall", "restore"])
def test_alpha_doubles_with_each_evaluation_without_progress_up_to_its_limit(rule):
    # The raises help: none is worse than the evaluation before.
    losses = [5.0, 4.0, 4.5, 4.4, 4.3, 3.9, 4.0, 3.9]
    expected = [1, 1, 2, 4, 6, 6, 6, 6]
    assert follow(rule, losses, alpha_max=6.0) == expected


def test_a_raise_that_made_it_worse_is_taken_back_and_the_next_one_waits():
    losses = [4.0, 4.1, 4.2, 4.3, 4.3, 4.4, 4.5, 4.6, 4.6]
    # Raised; worse: back; one evaluation is waited out, then raised; as good: kept, and so on.
    assert follow("stall", losses) == [1, 2, 1, 1, 2, 1, 1, 1, 2]


def test_steps_back_end_at_the_first_alpha():
    # Half of 1.5 would be below it.
    losses = [4.0 + 0.1 * i for i in range(6)]
    assert follow("stall", losses, alpha_max=1.5) == [1, 1.5, 1, 1, 1.5, 1]


@pytest.mark.parametrize(
    ("rule", "losses", "expected"),
    [
        ("stall", [4.0, 4.1, 4.2, 4.3, 4.3], [3, 6, 3, 3, 6]),
        ("restore", [4.0, 4.1, 4.0, 3.9], [3, 6, 8, 8]),
        ("ramp-from-stall", [4.0, 3.9, 3.8, 3.7], [3, 3, 3, 3]),
    ],
)
def test_rules_begin_at_the_least_alpha_and_step_back_to_it(rule, losses, expected):
    assert follow(rule, losses, alpha_max=8.0, alpha_min=3.0) == expected
    kls = [(1, 0.5), (1, 0.1), (1, 0.1)]
    assert follow("kl-target", [1, 2, 3], parts=kls, alpha_min=3.0) == [3, 3, 3]
    assert AlphaController(STEPS, rule=rule, alpha_max=2.0, alpha_min=3.0).alpha == 2


def test_the_divergence_is_held_where_it_was_at_the_best_loss():
    losses = [5.0, 4.0, 4.1, 4.2, 3.9, 4.0]
    kls = [0.4, 0.2, 0.3, 0.9, 0.5, 0.25]
    parts = [(1.0, kl) for kl in kls]
    # Without progress alpha changes by the ratio to the KL at the best loss, at most twofold.
    found = follow("kl-target", losses, parts=parts)
    assert found == pytest.approx([1, 1, 1.5, 3, 3, 1.5])
    assert follow("kl-target", losses, parts=parts, alpha_max=2.0)[3] == 2.0
    assert min(follow("kl-target", [1, 2, 3], parts=[(1, 0.5), (1, 0.1), (1, 0.1)])) == 1.0


def test_the_gap_of_validation_to_training_is_alpha_in_nats():
    parts = [(5.0, 0.1), (4.0, 0.1), (3.0, 0.1), (2.0, 0.1)]
    found = follow("gap", [4.5, 4.25, 4.0, 4.0], parts=parts, alpha_max=8.0)
    assert found == pytest.approx([0, 2, 8, 8])


@pytest.mark.parametrize("of_figures", [torch.bfloat16, torch.float32])
def test_a_mean_in_training_counts_every_step_whatever_the_default_dtype(of_figures):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        controller = AlphaController(1000, rule="gap", alpha_max=1.0, alpha_min=0.1)
        for step in range(600):
            controller.update(step, nll=torch.tensor(2.0, dtype=of_figures))
        controller.update(600, validation_loss=2.5)
    finally:
        torch.set_default_dtype(before)
    assert controller.alpha == 0.5


def test_the_ramp_from_the_first_stall_has_the_slope_of_the_whole_ramp():
    controller = AlphaController(STEPS, rule="ramp-from-stall", alpha_max=16.0)
    for step, loss in ((9, 2.0), (19, 1.5), (29, 1.6), (39, 1.0), (49, 3.0)):
        controller.update(step, validation_loss=loss)
    assert controller.alpha == pytest.approx(1 + 16 / STEPS * 20)
    # A stall late in the run leaves the ramp a low end.
    assert controller.alpha_at(STEPS) == pytest.approx(1 + 16 * 50 / STEPS)


def test_rules_that_know_too_little_leave_alpha_alone():
    assert follow("gap", [4.0, 5.0]) == [1, 1]
    assert follow("kl-target", [4.0, 5.0], parts=[(1.0, 0.0)] * 2) == [1, 1]


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"ramp"}))
def test_no_rule_changes_alpha_between_evaluations_or_leaves_its_bounds(rule):
    generator = torch.Generator().manual_seed(0)
    controller = AlphaController(400, rule=rule, alpha_max=10.0)
    for step in range(400):
        nll, kl, loss = torch.rand(3, generator=generator).tolist()
        before = controller.alpha
        controller.update(step, nll=4 * nll, kl=kl)
        assert 0 <= before <= 10
        if rule != "ramp-from-stall":
            assert before == controller.alpha
        if step % 20 == 19:
            controller.update(step, validation_loss=4 * loss)


def test_a_loss_that_is_no_number_is_no_progress():
    assert follow("stall", [4.0, math.nan, 3.9, math.inf]) == [1, 2, 2, 4]
    assert follow("stall", [math.nan, 4.0]) == [1, 1]


def test_best_weights_are_asked_for_where_alpha_changes_alone():
    controller = AlphaController(STEPS, rule="restore")
    asked = []
    for step, loss in enumerate([4.0, 4.1, 4.2, 4.3, 3.0]):
        controller.update(step, validation_loss=loss)
        asked.append(controller.should_restore)
        controller.update(step + 1)
        assert not controller.should_restore
    assert asked == [False, True, True, False, False]


def test_alpha_is_0_before_the_start():
    controller = AlphaController(STEPS, rule="stall", start_step=5)
    assert [controller.alpha_at(step) for step in (0, 4, 5)] == [0, 0, 1]


def test_evaluations_before_the_start_raise_nothing_and_say_what_is_best():
    controller = AlphaController(STEPS, rule="stall", start_step=30)
    alphas = []
    for step, loss in ((9, 2.0), (19, 2.1), (29, 2.2), (39, 2.05), (49, 2.0), (59, 1.9)):
        controller.update(step, validation_loss=loss)
        alphas.append(controller.alpha_at(step + 1))
    # Each is alpha of the step after; that of step 40 knows that 2.0 was better.
    assert alphas == [0, 0, 1, 2, 4, 4]


# --- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stop", [7, 33, 40, 59])
def test_a_controller_that_goes_on_from_its_state_gives_the_same_alphas(rule, stop):
    def run(controller, steps):
        alphas = []
        for step in steps:
            alphas.append(controller.alpha)
            wave = math.sin(step / 5)
            controller.update(step, nll=torch.tensor(2 - wave), kl=torch.tensor(1 + wave))
            if step % 10 == 9:
                controller.update(step, validation_loss=3 + wave)
        return alphas

    whole = run(AlphaController(STEPS, rule=rule), range(STEPS))
    first = AlphaController(STEPS, rule=rule)
    begun = run(first, range(stop))
    second = AlphaController(STEPS, rule=rule)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + run(second, range(stop, STEPS)) == whole
    assert len(set(whole)) > 1


def test_a_run_that_had_to_follow_the_ramp_goes_on_so():
    first = AlphaController(STEPS, rule="stall")
    first.follow_ramp()
    second = AlphaController(STEPS, rule="stall")
    second.load_state_dict(first.state_dict())
    assert second.alpha_at(40) == AlphaController(STEPS).alpha_at(40) == 6.5
    assert second.alpha_at(2 * STEPS) == second.alpha_max == 10.0
    assert (first.alpha_start, AlphaController(STEPS, rule="stall").alpha_start) == (3.0, 0.0)
    with pytest.raises(ValueError, match="rule must be 'stall', that of the checkpoint, got 'gap'"):
        AlphaController(STEPS, rule="gap").load_state_dict(
            AlphaController(STEPS, rule="stall").state_dict()
        )


@pytest.mark.parametrize(
    ("highest", "single_pass_below"),
    [(None, None), (8.0, None), (16.0, None), (16.0, 12.0), (20.0, None)],
)
def test_saved_options_fall_back_to_the_ramp_of_those_that_were_saved(highest, single_pass_below):
    config = RDropConfig(
        alpha="auto",
        alpha_rule="stall",
        alpha_max=highest,
        single_pass_below=single_pass_below,
    )
    saved = RDropConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert saved == config
    ends = []
    for options in (config, saved):
        controller = AlphaController.from_config(options, STEPS)
        controller.follow_ramp()
        ends.append((controller.alpha_at(0), controller.alpha_at(STEPS)))
    assert ends == [(3.0, highest or 10.0)] * 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state: {}, ValueError, r"state must be one of .* without rule, next_step, sums"),
        (lambda state: None, TypeError, "state must be a mapping, got NoneType"),
        (lambda state: {**state, "state": {}}, ValueError, "missing 1 required .* 'alpha'"),
        (lambda state: {**state, "state": None}, ValueError, "got None as its 'state'"),
        (lambda state: {**state, "state": {"alpha": 2.0, "x": 1}}, ValueError, "argument 'x'"),
        (lambda state: {"rule": "ramp"}, ValueError, "without next_step, sums, state"),
    ],
)
def test_a_state_of_something_else_is_refused_and_leaves_the_controller(change, error, message):
    controller = AlphaController(STEPS, rule="stall")
    controller.update(3, validation_loss=1.0)
    before = controller.state_dict()
    with pytest.raises(error, match=message):
        controller.load_state_dict(change(before))
    assert controller.state_dict() == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1, got 0"),
        ({"total_steps": 9.0}, TypeError, "total_steps must be an integer, got float"),
        ({"start_step": -1}, ValueError, "start_step must be at least 0, got -1"),
        ({"alpha_max": 0}, ValueError, "alpha_max must be finite and above 0, got 0"),
        ({"alpha_min": 0}, ValueError, "alpha_min must be finite and above 0, got 0"),
        ({"alpha_start": 17}, ValueError, r"alpha_start must be from 0 to alpha_max=10\.0, got 17"),
        ({"alpha_start": -1}, ValueError, r"alpha_start must be from 0 to alpha_max=10\.0, got -1"),
        (
            {"alpha_start": 2, "rule": "gap"},
            ValueError,
            "alpha_start=2 needs rule='ramp', got 'gap'",
        ),
        ({"rule": "best"}, ValueError, "rule must be one of ramp, stall, .*; got 'best'"),
    ],
)
def test_what_a_controller_cannot_take_is_named(options, error, message):
    with pytest.raises(error, match=message):
        AlphaController(**{"total_steps": STEPS, **options})


def test_numbers_of_numpy_leave_a_state_that_json_can_hold():
    options = {"alpha_max": np.float32(4.0), "start_step": np.int64(2)}
    controller = AlphaController(np.int64(10), **options)
    controller.update(np.int64(3), nll=np.float32(1.0))
    plain = AlphaController(10, alpha_max=4.0, start_step=2)
    plain.update(3, nll=1.0)
    assert json.loads(json.dumps(controller.state_dict())) == plain.state_dict()
    assert controller.alpha == plain.alpha == 3.25


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        AlphaController(STEPS).update(-1)


def test_a_controller_takes_all_of_its_settings_from_a_config():
    config = RDropConfig(
        alpha="auto", alpha_rule="stall", alpha_max=3.0, alpha_min=2.0, start_step=2
    )
    controller = AlphaController.from_config(config, 10)
    assert [controller.alpha_at(step) for step in (1, 2)] == [0, 2]
    for _ in range(4):
        controller.update(3, validation_loss=1.0)
    assert controller.alpha == 3
    ramp = AlphaController.from_config(RDropConfig(alpha="auto"), 8)
    assert [ramp.alpha_at(step) for step in (0, 4, 8)] == [3, 6.5, 10]
    with pytest.raises(ValueError, match="config must have alpha='auto', got alpha=1"):
        AlphaController.from_config(RDropConfig(), 10)
    with pytest.raises(TypeError, match="config must be an RDropConfig, got int"):
        AlphaController.from_config(10, RDropConfig(alpha="auto"))


# --- a loop of one's own ------------------------------------------------------------------------


def test_the_alpha_of_a_controller_is_the_weight_of_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    config = RDropConfig(alpha="auto", alpha_rule="stall")
    controller = AlphaController.from_config(config, 4)
    alphas = []
    for step in range(4):
        alphas.append(controller.alpha)
        torch.manual_seed(step)
        output = rdrop_step(model, x, y, config=config, step=step, alpha=controller.alpha)
        torch.manual_seed(step)
        expected = rdrop_cross_entropy(model(repeat_batch(x)), y, alpha=alphas[-1], scale="mean")
        torch.testing.assert_close(tuple(output), tuple(expected))
        controller.update(step, nll=output.nll, kl=output.kl)
        controller.update(step, validation_loss=1.0)
    assert alphas == [1, 1, 2, 4]


def test_a_ramp_over_the_run_needs_its_length_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    config = RDropConfig(alpha="auto", alpha_start=0.0, alpha_max=16.0, single_pass_below=4.0)
    for step, passes in ((0, 1), (24, 1), (25, 2), (50, 2)):
        output = rdrop_step(model, x, y, config=config, step=step, total_steps=100)
        alpha = 16 * step / 100 if passes == 2 else 0
        assert output.loss.item() == pytest.approx(
            (output.nll + alpha / 2 * output.kl).item(), rel=1e-5
        )
        assert (output.kl > 0) == (passes == 2)
    with pytest.raises(ValueError, match="give total_steps"):
        rdrop_step(model, x, y, config=config, step=0)
    with pytest.raises(TypeError, match="total_steps must be an integer, got float"):
        rdrop_step(model, x, y, config=config, step=0, total_steps=1e3)
    with pytest.raises(ValueError, match="alpha must be"):
        rdrop_step(model, x, y, config=RDropConfig(), step=0, alpha=-1.0)
