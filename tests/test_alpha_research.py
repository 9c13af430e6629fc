"""The scripts that judge rules of alpha: regrets by hand, and the gradient that is held."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from regdrop import RDropConfig, rdrop_cross_entropy, repeat_batch
from regdrop.experiments import RunRecord
from regdrop.experiments.recording.manifest import note_command
from regdrop.experiments.recording.record import record_path

# Tasks whose figures regdrop knows: of an NLL less is better.
A, B, C = "digits", "fashion-mnist-part", "scitldr-part"
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("alpha_regret", "bench_held_gradient", "bench_unlabelled", "recording"):
        sys.modules.pop(name, None)


def records(task, arms, metric="nll"):
    """Return three runs of each arm, whose figures are 0.1 apart, by test and validation mean."""
    return [
        RunRecord(
            task=task,
            arm=arm,
            seed=seed,
            config={"selection_metric": metric},
            steps=10,
            seconds=1.0,
            peak_memory_mib=None,
            best_step=10,
            validation={metric: validation + 0.1 * (seed - 1)},
            test={metric: test + 0.1 * (seed - 1)},
            history=[],
            versions={},
            hardware={},
        )
        for arm, (validation, test) in arms.items()
        for seed in range(3)
    ]


# Half the 95 % interval of three seeds 0.1 apart: Student's t times 0.1 / sqrt(3).
UNIT = 4.302653 * 0.1 / 3**0.5


def test_regret_is_measured_from_the_constant_that_validation_chooses(script):
    module = script("alpha_regret")
    arms = {
        "alpha-0": (3.0, 2.5),  # the best by its test figure, which chooses nothing
        "alpha-1": (2.9, 3.0),
        "alpha-6": (2.8, 2.7),
        "ramp-16": (2.7, 2.6),
        "stall-8": (2.9, 3.4),
    }
    found = module.task_regrets(records(A, arms))
    assert found.best == "alpha-6"
    assert found.unit == pytest.approx(UNIT)
    expected = {"alpha-0": -0.2, "alpha-1": 0.3, "alpha-6": 0, "ramp-16": -0.1, "stall-8": 0.7}
    assert found.test == pytest.approx({arm: x / UNIT for arm, x in expected.items()})
    assert found.validation["ramp-16"] == pytest.approx(-0.1 / UNIT)
    difference, half = found.against_one["stall-8"]
    assert difference == pytest.approx(0.4 / UNIT)
    assert half == pytest.approx(0, abs=1e-9)  # the arms differ alike on every seed


def test_a_comparison_gives_a_study_its_baseline_and_its_constants(script, tmp_path):
    module = script("alpha_regret")
    study = {"alpha-3": (2.8, 2.7), "ramp-16": (2.7, 2.6)}
    compared = {"baseline": (3.0, 3.1), "rdrop": (2.9, 2.9), "r3f": (2.9, 2.8)}
    further = replace(records(A, {"baseline": (3.0, 9.0)})[0], seed=7)  # which the study has not
    for name, runs in (
        ("study", records(A, study)),
        ("compared", [*records(A, compared), further]),
    ):
        for run in runs:
            if run.arm == "rdrop":
                run = replace(run, config={**run.config, "rdrop": {"alpha": 1}})
            run.save(record_path(tmp_path / name, run.arm, run.seed))
    [found] = module.load_tasks([tmp_path / "study", tmp_path / "compared"])
    assert {run.arm for run in found} == {"alpha-3", "ramp-16", "baseline", "alpha-1"}
    assert {run.seed for run in found} == {0, 1, 2}
    assert module.task_regrets(found).test["alpha-1"] == pytest.approx(0.2 / UNIT)


def test_further_runs_of_a_study_count_with_all_their_seeds_and_arms(script, tmp_path):
    module = script("alpha_regret")
    runs = records(A, {"alpha-3": (2.8, 2.7), "ramp-16": (2.7, 2.6)})
    for name, first in (("study", 0), ("more", 3)):
        for run in runs:
            run = replace(run, seed=run.seed + first)
            run.save(record_path(tmp_path / name, run.arm, run.seed))
        note_command(tmp_path / name, "alpha-schedules", "regdrop sweep")
    [found] = module.load_tasks([tmp_path / "study", tmp_path / "more"])
    assert {(run.arm, run.seed) for run in found} == {
        (arm, seed) for arm in ("alpha-3", "ramp-16") for seed in range(6)
    }


@pytest.mark.parametrize("other", ["tune", "alpha"])
def test_a_further_folder_of_another_study_is_refused(script, tmp_path, other):
    module = script("alpha_regret")
    for name, arm in (("alpha-schedules", "alpha-3"), (other, "alpha-5")):
        for run in records(A, {arm: (2.8, 2.7)}):
            run.save(record_path(tmp_path / name, run.arm, run.seed))
        note_command(tmp_path / name, name, "regdrop")
    with pytest.raises(ValueError, match=f"'alpha-schedules', as .* or of 'compare', got '{other}"):
        module.load_tasks([tmp_path / "alpha-schedules", tmp_path / other])


def test_a_further_folder_of_other_settings_or_of_the_same_runs_is_refused(script, tmp_path):
    module = script("alpha_regret")
    for run in records(A, {"alpha-3": (2.8, 2.7)}):
        run.save(record_path(tmp_path / "study", run.arm, run.seed))
        run.save(record_path(tmp_path / "again", run.arm, run.seed))
        other = replace(run, arm="baseline", config={**run.config, "training": {"max_steps": 9}})
        other.save(record_path(tmp_path / "other", other.arm, other.seed))
    with pytest.raises(ValueError, match="has runs of alpha-3, which the study has itself"):
        module.load_tasks([tmp_path / "study", tmp_path / "again"])
    with pytest.raises(ValueError, match=f"other has other settings than the study of {A}"):
        module.load_tasks([tmp_path / "study", tmp_path / "other"])


def test_figures_that_should_be_great_are_turned_round(script):
    module = script("alpha_regret")
    arms = {"alpha-1": (0.7, 0.7), "alpha-3": (0.8, 0.8), "ramp-16": (0.9, 0.9)}
    found = module.task_regrets(records(A, arms, "accuracy"), "accuracy")
    assert found.best == "alpha-3"
    assert found.test["ramp-16"] == pytest.approx(-0.1 / UNIT)


@pytest.fixture
def three_tasks(script):
    """On a and b alpha 6 and stall-8 are the better, on c alpha 1 and stall-16."""
    module = script("alpha_regret")
    high = {"alpha-1": 3.0, "alpha-6": 2.0, "ramp-16": 1.9, "stall-8": 2.5, "stall-16": 2.8}
    low = {"alpha-1": 2.0, "alpha-6": 3.0, "ramp-16": 2.0, "stall-8": 2.5, "stall-16": 1.0}
    return module, [
        module.task_regrets(records(task, {arm: (x, x) for arm, x in own.items()}))
        for task, own in ((A, high), (B, high), (C, low))
    ]


def test_a_task_is_given_the_setting_that_the_others_choose(three_tasks):
    module, regrets = three_tasks
    choices = module.left_out_choices(regrets)
    # c's choice is that of a and b; a's is between b, where alpha 6 is better, and c's alpha 1.
    assert choices["alpha"][C] == "alpha-6"
    assert choices["stall"] == {A: "stall-16", B: "stall-16", C: "stall-8"}
    assert choices["ramp"] == dict.fromkeys((A, B, C), "ramp-16")


def test_a_rule_is_accepted_by_its_mean_regret_and_where_it_harms_no_task(three_tasks):
    module, regrets = three_tasks
    found = {verdict.family: verdict for verdict in module.verdicts(regrets)}
    ramp, constant, stall = (found[name] for name in ("ramp", "alpha", "stall"))
    assert ramp.regrets == pytest.approx({A: -0.1 / UNIT, B: -0.1 / UNIT, C: 0})
    assert ramp.wins == 2
    assert ramp.is_accepted(constant)
    assert stall.worse_than_one == (C,)
    assert not stall.is_accepted(constant)
    # A constant that is better than the best by validation has to be reached.
    safe = replace(constant, worse_than_one=())
    good, worse = (replace(safe, regrets={A: regret}) for regret in (-1.0, -0.9))
    assert good.is_accepted(good)
    assert not worse.is_accepted(good)
    rows = {row[0]: row for row in module.choices_table(regrets)}
    assert rows["ramp"][1:4] == ["−0.40 (16)", "−0.40 (16)", "+0.00 (16)"]
    assert rows["ramp"][-1] == "yes"
    assert rows["stall"][-3:] == [C, "2.00", "no"]
    assert module.arms_table(regrets)[-2] == ["best constant", "alpha-6", "alpha-6", "alpha-1", ""]


def test_gains_are_parts_of_the_best_constants(script):
    module = script("alpha_regret")
    arms = {
        "baseline": (3.0, 3.0),
        "alpha-1": (2.9, 2.9),
        "alpha-6": (2.0, 2.5),
        "ramp-16": (2.0, 2.0),
        "late-start": (2.0, 3.1),
    }
    found = module.task_regrets(records(A, arms))
    expected = {"baseline": 0, "alpha-1": 0.2, "alpha-6": 1, "ramp-16": 2, "late-start": -0.2}
    assert found.gain == pytest.approx(expected)
    rows = {row[0]: row[1:] for row in module.gains_table([found])}
    assert rows["late-start"] == ["−20%", "2.00"]
    # Where the best constant gains nothing there are no parts of its gain.
    arms["baseline"] = (1.0, 2.4)
    lost = module.task_regrets(records(A, arms))
    assert lost.best == "alpha-6"
    assert lost.gain == {}
    assert module.gains_table([found, lost])[1][1:3] == ["0%", ""]


def test_costs_are_means_over_runs_that_may_differ(script):
    module = script("alpha_regret")
    arms = {"alpha-1": (2.0, 2.0), "alpha-6": (3.0, 3.0), "stall-16": (2.0, 2.0)}
    found = records(A, arms)
    for record in found:
        if record.arm == "stall-16":
            rdrop = RDropConfig(alpha="auto", alpha_rule="stall", single_pass_below=2.0)
            record.config["rdrop"] = rdrop.to_dict()
            record.history.append({"step": 10, "passes": 1 + 0.1 * record.seed})
    assert module.task_regrets(found).cost["stall-16"] == pytest.approx(1.1)


def test_arms_that_a_task_lacks_are_chosen_for_none(script):
    module = script("alpha_regret")
    both = {"alpha-1": (2.0, 2.0), "alpha-6": (3.0, 3.0), "ramp-16": (2.0, 2.0)}
    regrets = [
        module.task_regrets(records(A, {**both, "ramp-8": (1.0, 1.0), "gap-8": (1.0, 1.0)})),
        module.task_regrets(records(B, both)),
    ]
    choices = module.left_out_choices(regrets)
    assert "gap" not in choices
    assert choices["ramp"] == {A: "ramp-16", B: "ramp-16"}
    rows = {row[0]: row for row in module.arms_table(regrets)}
    assert rows["gap-8"][2] == ""


def test_records_that_cannot_be_judged_are_named(script):
    module = script("alpha_regret")
    for arms in ({"alpha-1": (1, 1), "ramp-16": (1, 1)}, {"alpha-3": (1, 1), "alpha-6": (1, 1)}):
        with pytest.raises(ValueError, match="digits must have alpha-1 and another constant"):
            module.task_regrets(records(A, arms))
    # Of one seed no interval says that an arm is worse than alpha 1.
    runs = records(A, {"alpha-1": (1, 1), "alpha-3": (1, 1), "ramp-16": (1, 1)})[:-2]
    with pytest.raises(ValueError, match="two seeds of every arm at least, got one of ramp-16"):
        module.task_regrets(runs)
    with pytest.raises(ValueError, match="metric must be one of nll; got 'bleu'"):
        module.task_regrets(records(A, {"alpha-1": (1, 1), "alpha-3": (1, 1)}), "bleu")


def test_the_script_reads_folders_and_writes_its_tables(script, tmp_path, monkeypatch, capsys):
    module = script("alpha_regret")
    for task in (A, B):
        arms = {"alpha-1": (2.0, 2.0), "alpha-6": (3.0, 3.0), "ramp-16": (1.0, 1.0)}
        for record in records(task, {"baseline": (4.0, 4.0), **arms}):
            record.save(tmp_path / task / "records" / f"{record.arm}-seed{record.seed}.json")
    target = tmp_path / "regret.md"
    arguments = ["alpha_regret.py", str(tmp_path / A), str(tmp_path / B), "--output"]
    plot = tmp_path / "gains.png"
    monkeypatch.setattr(sys, "argv", [*arguments, str(target), "--plot", str(plot)])
    module.main()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| ramp | −4.03 (16) | −4.03 (16) |" in target.read_text()
    assert "ramp-16" in capsys.readouterr().out


def test_a_held_gradient_is_added_to_every_step_until_the_next(script):
    module = script("bench_held_gradient")
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    held = module.HeldGradient(model, alpha=3.0)
    config = module.Way("held", 2, is_held=True).config

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()))

    def step(number, inputs):
        model.zero_grad()
        torch.manual_seed(number)
        held.backward(model(inputs), y, config, number)
        torch.manual_seed(number)
        return [p.grad.clone() for p in model.parameters()]

    # On a step with two passes it is R-Drop's own gradient.
    found = step(0, repeat_batch(x))
    options = {"alpha": 3.0, "scale": "mean"}
    expected = gradients(rdrop_cross_entropy(model(repeat_batch(x)), y, **options).loss)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.manual_seed(0)
    plain = {"alpha": 0.0, "scale": "mean"}
    likelihood = gradients(rdrop_cross_entropy(model(repeat_batch(x)), y, **plain).loss)
    kl = [a - b for a, b in zip(expected, likelihood, strict=True)]
    # The step after it has its own likelihood, and that KL.
    found = step(1, x)
    own = gradients(nn.functional.cross_entropy(model(x), y))
    for a, b, c in zip(found, own, kl, strict=True):
        torch.testing.assert_close(a, b + c)
