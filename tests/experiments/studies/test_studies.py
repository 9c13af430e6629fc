from dataclasses import asdict, replace
from typing import get_args

import numpy as np
import pytest

from regdrop import RDropConfig
from regdrop.alpha_options import AlphaRule
from regdrop.experiments import build_arms
from regdrop.experiments.arms import arm_order, optional_arms, reference_arm
from regdrop.experiments.recording.manifest import (
    check_study,
    forget_command,
    note_command,
    read_manifest,
)
from regdrop.experiments.recording.record import record_path
from regdrop.experiments.recording.settings import resolved_config
from regdrop.experiments.reporting.cost import run_cost
from regdrop.experiments.reporting.plots import _STYLES, COLOURS
from regdrop.experiments.reporting.report import write_report
from regdrop.experiments.reporting.study_plots import pareto_front
from regdrop.experiments.studies.definitions import STUDIES, study_arms
from regdrop.tasks.images.presets import DIGITS

VARIED = (
    "alpha",
    "alpha_start",
    "alpha_rule",
    "alpha_max",
    "alpha_min",
    "single_pass_below",
    "every_n_steps",
    "start_step",
)


def settings(arms, *names):
    return [tuple(getattr(arm.rdrop, name) for name in names) for arm in arms]


def test_alpha_varies_alpha_alone():
    arms = study_arms("alpha", DIGITS)
    assert settings(arms, "alpha") == [(0,), (1,), (3,), (5,), (7,), (10,)]
    rest = [{k: v for k, v in asdict(arm.rdrop).items() if k != "alpha"} for arm in arms]
    assert all(other == rest[0] for other in rest)
    assert {arm.training for arm in arms} == {DIGITS.training}
    assert settings(study_arms("alpha", DIGITS, [0.5]), "alpha") == [(0.5,)]


def test_every_n_steps_sets_the_papers_form_beside_the_rescaled_one():
    baseline, every, *others = study_arms("every-n-steps", DIGITS, [1, 2, 5])
    assert baseline == build_arms(DIGITS)["baseline"]
    assert every == build_arms(DIGITS)["rdrop"]
    assert settings(others, "every_n_steps", "rescale") == [
        (2, False),
        (2, True),
        (5, False),
        (5, True),
    ]


def test_every_n_steps_is_said_in_english():
    said = {
        arm.name: arm.description for arm in study_arms("every-n-steps", DIGITS, [2, 3, 11, 21])
    }
    for k, ordinal in ((2, "2nd"), (3, "3rd"), (11, "11th"), (21, "21st")):
        assert said[f"every-{k}"] == f"R-Drop on every {ordinal} step"


def test_num_passes_begins_with_one_pass_and_no_divergence():
    assert settings(study_arms("num-passes", DIGITS), "num_passes") == [(1,), (2,), (3,), (4,)]
    assert study_arms("num-passes", DIGITS, [1])[0].rdrop.alpha == 0


def test_dropout_rates_are_every_pair_once():
    arms = study_arms("dropout-rates", DIGITS, [0.3, 0.1, 0.2])
    pairs = [pair for (pair,) in settings(arms, "dropout_rates")]
    assert pairs == [(0.1, 0.1), (0.1, 0.2), (0.1, 0.3), (0.2, 0.2), (0.2, 0.3), (0.3, 0.3)]
    assert len(study_arms("dropout-rates", DIGITS)) == 15


def test_schedules_of_alpha_are_constants_ramps_rules_and_cheaper_ramps():
    arms = {arm.name: arm.rdrop for arm in study_arms("alpha-schedules", DIGITS, [0, 6])}
    assert list(arms)[:6] == ["baseline", "alpha-0", "alpha-6", "ramp-8", "ramp-16", "ramp-32"]
    rules = set(get_args(AlphaRule)) - {"ramp"}
    for name in rules:
        assert arms[f"{name}-8"].alpha_rule == name
        assert arms[f"{name}-8"].alpha_max == 8
    for name in ("stall", "ramp-from-stall"):
        assert arms[f"{name}-16-from-3"] == replace(arms[f"{name}-16"], alpha_min=3)
    cheap = arms["ramp-from-stall-16-from-3-every-2"]
    assert cheap == replace(arms["ramp-from-stall-16-from-3"], every_n_steps=2)
    assert settings(study_arms("alpha-schedules", DIGITS, [3]), "alpha")[1] == (3,)
    ramp = arms["ramp-16"]
    assert (ramp.alpha, ramp.alpha_rule, ramp.alpha_max) == ("auto", "ramp", 16)
    assert arms["ramp-16-below-8"] == replace(ramp, single_pass_below=8)
    assert arms["ramp-16-every-2"] == replace(ramp, every_n_steps=2)
    assert arms["ramp-16-below-5-every-2"] == replace(ramp, every_n_steps=2, single_pass_below=5)
    narrow = arms["narrow-ramp-10"]
    assert narrow == replace(ramp, alpha_start=3, alpha_max=10)
    assert arms["narrow-ramp-10-below-6.5"] == replace(narrow, single_pass_below=6.5)
    assert arms["narrow-ramp-10-every-2"] == replace(narrow, every_n_steps=2)
    both = arms["narrow-ramp-10-below-5.2-every-2"]
    assert both == replace(narrow, every_n_steps=2, single_pass_below=5.2)
    half = DIGITS.training.max_steps // 2
    assert arms["alpha-6-every-2"] == replace(arms["alpha-6"], every_n_steps=2)
    assert arms["alpha-6-late-start"] == replace(arms["alpha-6"], start_step=half)
    late = arms["late-start"]
    # Its mean over the run is that of the ramp to 16.
    assert (late.alpha, late.start_step) == (16, half)
    rising = next(a for a in study_arms("alpha-schedules", DIGITS) if a.dropout_rises)
    assert (rising.rdrop.num_passes, rising.dropout_odds) == (1, 4)
    others = [
        {k: v for k, v in asdict(rdrop).items() if k not in VARIED}
        for rdrop in arms.values()
        if rdrop.num_passes == 2
    ]
    assert all(other == others[0] for other in others)


def test_schedules_of_a_task_that_has_one_itself_begin_without_it():
    auto = RDropConfig(alpha="auto", alpha_rule="gap", alpha_max=4.0, single_pass_below=2.0)
    for rdrop in (
        auto,
        RDropConfig(alpha=2.0, alpha_schedule="linear", alpha_warmup_ratio=0.5, start_step=3),
        RDropConfig(alpha="auto", alpha_start=3.0, alpha_max=10.0),
    ):
        task = replace(DIGITS, rdrop=rdrop)
        found, plain = (study_arms("alpha-schedules", t, [0, 6]) for t in (task, DIGITS))
        assert [arm.rdrop for arm in found] == [arm.rdrop for arm in plain]
    # The other studies and arms take such a task too.
    task = replace(DIGITS, rdrop=auto)
    assert settings(study_arms("alpha", task, [0, 2]), "alpha") == [(0,), (2,)]
    assert build_arms(task)["alpha-0"].rdrop == build_arms(DIGITS)["alpha-0"].rdrop
    assert build_arms(task)["rdrop"].description == "R-Drop, alpha by gap up to 4"
    assert optional_arms(task)["matched-dropout"].dropout_odds == 1 + (1 + 4) / 2


@pytest.mark.parametrize("name", STUDIES)
def test_arms_of_a_study_have_names_of_their_own_and_the_scale_of_the_baseline(name):
    arms = study_arms(name, DIGITS)
    assert len({arm.name for arm in arms}) == len(arms)
    assert {arm.rdrop.scale for arm in arms} == {"mean"}


@pytest.mark.parametrize(
    ("name", "grid", "message"),
    [
        ("alphas", None, "STUDY must be one of alpha, every-n-steps"),
        ("cost", [1], "study 'cost' varies no number and takes no grid"),
        ("alpha", [1, 1], "grid must hold different numbers"),
        ("alpha", [], "grid must hold different numbers, at least one"),
        ("alpha", [-1], "alpha must be finite and at least 0"),
        ("num-passes", [1.5], "whole numbers from 1 on, got 1.5"),
        ("every-n-steps", [0], "whole numbers from 1 on, got 0"),
        ("dropout-rates", [1.0], "dropout_rates must be from 0 up to 1"),
    ],
)
def test_a_grid_that_cannot_be_is_named(name, grid, message):
    with pytest.raises(ValueError, match=message):
        study_arms(name, DIGITS, grid)


def test_arms_are_sorted_by_their_numbers():
    names = ["alpha-10", "alpha-3", "rates-0.2-0.1", "rates-0.1-0.3", "alpha-0.5", "baseline"]
    assert sorted(names, key=arm_order) == [
        "baseline",
        "alpha-0.5",
        "alpha-3",
        "alpha-10",
        "rates-0.1-0.3",
        "rates-0.2-0.1",
    ]


def test_what_arms_are_compared_to():
    assert reference_arm({"rdrop", "alpha-0", "baseline"}) == "baseline"
    assert reference_arm({"alpha-3", "alpha-0"}) == "alpha-0"
    assert reference_arm({"rates-0.1-0.1"}) is None


def test_cost_of_every_arm_counted_by_hand(record):
    """A forward is a third of a step; DIGITS has 600 steps, so a late start is at 400."""
    expected = {
        "baseline": 1.0,
        "baseline-2x": 2.0,
        "alpha-0": 2.0,
        "rdrop": 2.0,
        "rdrop-one-backward": 4 / 3,
        "third-batch": 4 / 3,
        "every-3": 4 / 3,
        "every-3-rescaled": 4 / 3,
        "late-start": 4 / 3,
        "late-start-half-batch": 4 / 3,
        "one-backward-half-batch": 1 + 1 / 6,
        "matched-dropout": 1.0,
        "two-thirds-batch": 4 / 3,
        "r3f": 2.0,
        "fraternal": 2.0,
    }

    def run(arm):
        config = resolved_config(DIGITS, arm)
        return record(arm.name, config=config, steps=arm.training.max_steps)

    arms = {arm.name: arm for arm in (*study_arms("cost", DIGITS), *optional_arms(DIGITS).values())}
    found = {name: run_cost(run(arm), run(arms["baseline"])) for name, arm in arms.items()}
    # A batch of whole images is two thirds but for rounding.
    assert found == pytest.approx(expected, rel=0.02)


def test_cost_of_every_schedule_of_alpha(record):
    """Of 600 steps to 16, alpha is below 8 for 300 and below 5 for 188."""
    expected = {
        "baseline": 1.0,
        "ramp-16": 2.0,
        "stall-8": 2.0,
        "rising-dropout-4": 1.0,
        "late-start": 1.5,
        "ramp-16-below-8": 1.5,
        "ramp-16-every-2": 1.5,
        "ramp-16-below-5-every-2": (188 + 412 * 1.5) / 600,
    }
    arms = {arm.name: arm for arm in study_arms("alpha-schedules", DIGITS)}
    for name, cost in expected.items():
        one = record(name, config=resolved_config(DIGITS, arms[name]), steps=600)
        assert run_cost(one) == pytest.approx(cost), name


def test_cost_of_a_rule_with_one_pass_is_what_the_run_logged(record):
    rdrop = RDropConfig(alpha="auto", alpha_rule="stall", single_pass_below=2.0)
    history = [
        {"step": 1, "passes": 1.0},
        {"step": 10, "passes": 1.5},
        {"step": 10, "eval_loss": 3.0},
        {"step": 20, "passes": 2.0},
    ]
    one = record(config={"rdrop": rdrop.to_dict()}, history=history, steps=20)
    assert run_cost(one) == pytest.approx((1 * 1 + 9 * 1.5 + 10 * 2) / 20)
    half = {"rdrop": replace(rdrop, backward_passes=1).to_dict()}
    assert run_cost(record(config=half, history=history, steps=20)) == pytest.approx(
        1 + (34.5 / 20 - 1) / 3
    )
    with pytest.raises(ValueError, match="history of baseline must tell the passes"):
        run_cost(record(config={"rdrop": rdrop.to_dict()}))


def test_the_front_holds_what_no_other_point_beats():
    points = [(2.0, 0.9), (1.0, 0.5), (1.5, 0.95), (1.2, 0.4), (1.0, 0.6)]
    assert pareto_front(points, greater_is_better=True) == [4, 2]
    losses = [(cost, 1 - value) for cost, value in points]
    assert pareto_front(losses, greater_is_better=False) == [4, 2]


@pytest.fixture
def draw(tmp_path, record, monkeypatch):
    """Return a function from a study and its arms to the first panel of its figure."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )

    def draw(study, arms):
        for i, arm in enumerate(arms):
            for seed in (0, 1):
                value = 0.5 + 0.02 * i
                config = resolved_config(DIGITS, arm)
                one = record(arm.name, seed, value, 1 - value, config=config, steps=600)
                one.save(record_path(tmp_path, arm.name, seed))
        note_command(tmp_path, study, f"regdrop sweep {study}")
        write_report(tmp_path)
        return figures[0].axes[0]

    return draw


def test_a_line_without_points_of_its_own_is_not_drawn(draw):
    arms = {arm.name: arm for arm in study_arms("every-n-steps", DIGITS, [1, 2])}
    panel = draw("every-n-steps", [arms["baseline"], arms["rdrop"], arms["every-2-rescaled"]])
    assert panel.get_legend_handles_labels()[1] == ["baseline", "alpha times k"]


def test_the_old_name_of_the_comparison_as_a_study_warns():
    with pytest.warns(DeprecationWarning, match="regdrop compare"):
        arms = study_arms("curves", DIGITS)
    assert arms == list(build_arms(DIGITS).values())
    with pytest.raises(ValueError, match=r"'curves' varies no number and takes no grid, got \[2\]"):
        study_arms("curves", DIGITS, [2])


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_draws_its_figure(tmp_path, draw, study):
    arms = study_arms(study, DIGITS)
    panel = draw(study, arms)
    text = (tmp_path / "report.md").read_text()
    assert STUDIES[study].question in text
    assert f"regdrop sweep {study}" in text
    assert panel.get_title() == "test accuracy (%)"
    values = [50 + 2 * i for i in range(len(arms))]
    if study == "dropout-rates":
        grid = panel.images[0].get_array()
        assert grid.shape == (5, 5)
        np.testing.assert_allclose(grid, grid.T)
        np.testing.assert_allclose(grid[0], values[:5])
    elif study in ("cost", "alpha-schedules"):
        assert len(panel.get_legend_handles_labels()[1]) == len(arms)
    else:
        drawn = {round(y, 6) for line in panel.lines for y in line.get_ydata() if y > 1}
        assert set(values) <= drawn


def test_schedules_of_alpha_are_drawn_by_step(tmp_path, record, monkeypatch):
    arms = study_arms("alpha-schedules", DIGITS, [1])[:3]
    from matplotlib.figure import Figure

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))
    )
    for i, arm in enumerate(arms):
        history = [
            {"step": s, "seconds": s, "alpha": i * s, "kl": 0.1, "nll": 1.0} for s in (1, 2)
        ] + [{"step": 2, "seconds": 2, "eval_loss": 2.0, "eval_accuracy": 0.5, "eval_nll": 2.0}]
        config = resolved_config(DIGITS, arm)
        record(arm.name, config=config, history=history).save(record_path(tmp_path, arm.name, 0))
    note_command(tmp_path, "alpha-schedules", "regdrop sweep alpha-schedules")
    write_report(tmp_path)
    (schedules,) = [f for f in kept if f.axes[0].get_title().startswith("alpha of")]
    titles = [axes.get_title() for axes in schedules.axes]
    assert titles[1:] == ["KL between passes", "training NLL (with dropout)", "validation loss"]
    lines = {line.get_label(): list(line.get_ydata()) for line in schedules.axes[0].lines}
    assert lines == {"baseline": [0, 0], "alpha-1": [1, 2], "ramp-8": [2, 4]}
    assert (tmp_path / "alpha_schedules.png").exists()


def test_without_a_baseline_nothing_is_drawn_against_its_time(tmp_path, record, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))
    )
    for arm in study_arms("alpha-schedules", DIGITS, [1])[1:3]:
        config = resolved_config(DIGITS, arm)
        record(arm.name, config=config).save(record_path(tmp_path, arm.name, 0))
    note_command(tmp_path, "alpha-schedules", "regdrop sweep alpha-schedules")
    write_report(tmp_path)
    (cost,) = [f for f in kept if f.axes[0].get_xlabel().startswith("operations")]
    # Both cost the same, and lie beside each other.
    places = [bars.lines[0].get_xdata()[0] for bars in cost.axes[0].containers]
    assert len(set(places)) == 2
    labels = {axes.get_xlabel() for figure in kept for axes in figure.axes}
    assert "operations, in single-pass steps of the baseline" in labels
    assert "training time, in times of the baseline's" not in labels


def test_a_folder_keeps_to_one_study_and_its_commands(tmp_path, record):
    check_study(tmp_path, "alpha")
    record().save(record_path(tmp_path, "baseline", 0))
    assert read_manifest(tmp_path).study == "compare"
    with pytest.raises(ValueError, match="holds results of 'compare', not of 'alpha'"):
        check_study(tmp_path, "alpha")
    for command in ("first", "second", "first"):
        note_command(tmp_path, "compare", command)
    assert read_manifest(tmp_path).commands == ("second", "first")
    with pytest.raises(ValueError, match="holds results of 'compare', not of 'alpha'"):
        note_command(tmp_path, "alpha", "third")
    forget_command(tmp_path, "second")
    assert read_manifest(tmp_path).commands == ("first",)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ValueError, match=r"study\.json is not the manifest of a study"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("study", ["alpha", "alpha-schedules", "dropout-rates"])
def test_numbers_that_name_one_arm_are_refused(study):
    with pytest.raises(ValueError, match="grid must hold numbers that differ in their first six"):
        study_arms(study, DIGITS, [0.10000001, 0.10000002])


def test_more_passes_than_a_step_can_have_are_refused():
    with pytest.raises(ValueError, match=r"grid of num-passes must hold at most 100, got 1e\+20"):
        study_arms("num-passes", DIGITS, [2, 1e20])


def test_every_arm_of_the_largest_study_is_drawn_as_a_line_of_its_own():
    assert len(study_arms("alpha-schedules", DIGITS)) <= len(COLOURS) * len(_STYLES)
    assert len(set(_STYLES)) == len(_STYLES)


def test_the_front_passes_through_the_points_as_they_are_drawn(draw):
    """Arms of one cost are drawn apart."""
    panel = draw("cost", study_arms("cost", DIGITS))
    drawn = {tuple(map(float, bars.lines[0].get_xydata()[0])) for bars in panel.containers}
    (front,) = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert {tuple(map(float, point)) for point in front.get_xydata()} <= drawn
