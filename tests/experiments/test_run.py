from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from regdrop.experiments import build_arms, run_arm, run_arms
from regdrop.experiments import run as run_module
from regdrop.experiments.record import record_path
from regdrop.experiments.studies import study_arms
from regdrop.tasks import Metric
from regdrop.tasks.full_precision import TaskTrainer
from regdrop.tasks.image_classification import ImageClassification


def without_times(record):
    history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in record.history]
    return replace(record, history=history, seconds=0.0, peak_memory_mib=None)


def test_record_of_a_run(tmp_path, short):
    news = []
    record = run_arm(
        short, build_arms(short)["rdrop"], 1, tmp_path, progress=lambda *args: news.append(args)
    )
    assert (record.task, record.arm, record.seed, record.steps) == ("short", "rdrop", 1, 6)
    evaluations = {e["step"]: e["eval_nll"] for e in record.history if "eval_nll" in e}
    assert list(evaluations) == [2, 4, 6]
    assert record.best_step == min(evaluations, key=evaluations.get)
    assert record.validation["nll"] == evaluations[record.best_step]
    assert set(record.test) == {"accuracy", "nll"}
    assert [e["step"] for e in record.history if "kl" in e] == [1, 2, 3, 4, 5, 6]
    times = [entry["seconds"] for entry in record.history]
    assert times == sorted(times)
    assert 0 < times[0] <= record.seconds
    assert {step for step, _ in news} == {1, 2, 3, 4, 5, 6}
    assert not (tmp_path / "unfinished").exists()


class WorstIsSelected(ImageClassification):
    """Selects the worst checkpoint, so that it is not the last."""

    @property
    def metrics(self):
        return {**super().metrics, "nll": Metric("NLL", greater_is_better=True)}


def test_test_figures_are_those_of_the_selected_checkpoint(tmp_path, short):
    training = replace(short.training, warmup_ratio=0.0)
    task = WorstIsSelected(**{**vars(short), "training": training})
    record = run_arm(task, build_arms(task)["baseline"], 0, tmp_path / "whole")
    assert record.best_step == 2
    until = replace(task, training=replace(training, max_steps=2))
    again = run_arm(until, build_arms(until)["baseline"], 0, tmp_path / "part")
    assert record.test == again.test
    last = run_arm(
        replace(short, training=training), build_arms(task)["baseline"], 0, tmp_path / "last"
    )
    assert (last.best_step, last.steps) == (6, 6)
    assert last.test["nll"] < record.test["nll"]


@pytest.mark.parametrize("arm", ["baseline", "baseline-2x", "alpha-0", "rdrop-one-backward"])
def test_every_arm_measures_the_divergence(tmp_path, short, arm):
    record = run_arm(short, build_arms(short)[arm], 0, tmp_path)
    assert [entry["kl"] > 0 for entry in record.history if "kl" in entry].count(True) >= 6


def test_a_seed_is_a_run_and_another_is_another(tmp_path, short):
    arm = build_arms(short)["rdrop"]
    a, b = (without_times(run_arm(short, arm, 0, tmp_path / name)) for name in "ab")
    assert a == b
    assert run_arm(short, arm, 1, tmp_path / "c").test != a.test


def test_a_finished_run_is_not_run_again(tmp_path, short, monkeypatch):
    arm = build_arms(short)["baseline"]
    first = run_arm(short, arm, 0, tmp_path)
    monkeypatch.setattr(type(short), "prepare", lambda *args: pytest.fail("was run again"))
    assert run_arm(short, arm, 0, tmp_path) == first


class AtStep5(TrainerCallback):
    """Stops a run after a step, as Ctrl-C would."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


class WhileSaving(TaskTrainer):
    """Stops a run while it writes its second checkpoint."""

    def _save_rng_state(self, output_dir):
        if output_dir.endswith("checkpoint-4"):
            raise KeyboardInterrupt
        super()._save_rng_state(output_dir)


def interrupt_after_a_step(*args, **kwargs):
    return TaskTrainer(*args, callbacks=[AtStep5()], **kwargs)


@pytest.mark.parametrize(
    ("name", "trainer", "next_step"),
    [
        ("rdrop", interrupt_after_a_step, 5),
        ("rdrop", WhileSaving, 3),
        ("stall-8", interrupt_after_a_step, 5),
        ("rising-dropout-4", interrupt_after_a_step, 5),
    ],
)
def test_an_interrupted_run_goes_on_from_its_checkpoint_to_the_same_end(
    tmp_path, short, monkeypatch, name, trainer, next_step
):
    arms = [*build_arms(short).values(), *study_arms("alpha-schedules", short)]
    arm = next(arm for arm in arms if arm.name == name)
    whole = run_arm(short, arm, 0, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "TaskTrainer", trainer)
        with pytest.raises(KeyboardInterrupt):
            run_arm(short, arm, 0, tmp_path / "cut")
    assert not record_path(tmp_path / "cut", name, 0).exists()
    steps = []
    resumed = run_arm(
        short, arm, 0, tmp_path / "cut", progress=lambda step, figures: steps.append(step)
    )
    assert min(steps) == next_step
    assert without_times(resumed) == without_times(whole)


@pytest.mark.parametrize("finished", [True, False])
def test_results_of_other_settings_are_never_mixed_or_overwritten(
    tmp_path, short, monkeypatch, finished
):
    if not finished:
        monkeypatch.setattr(run_module, "RDropTrainer", lambda *args, **kwargs: 1 / 0)
    try:
        run_arm(short, build_arms(short)["rdrop"], 0, tmp_path)
    except ZeroDivisionError:
        assert not finished
    changed = replace(short, dropout=0.2, rdrop=replace(short.rdrop, alpha=7.0))
    with pytest.raises(
        ValueError, match=r"other settings \(dropout, rdrop\.alpha\); choose another"
    ):
        run_arm(changed, build_arms(changed)["rdrop"], 0, tmp_path)


def test_seeds_of_other_settings_are_never_averaged(tmp_path, short):
    arms = build_arms(short)
    run_arm(short, arms["rdrop"], 0, tmp_path)
    changed = replace(short, rdrop=replace(short.rdrop, alpha=7.0))
    arm = build_arms(changed)["rdrop"]
    with pytest.raises(ValueError, match=r"rdrop-seed0.json was made with .*\(rdrop\.alpha\)"):
        run_arms(changed, [arm], seeds=[1], folder=tmp_path)
    other = replace(short, dropout=0.2)
    with pytest.raises(ValueError, match=r"\(dropout\)"):
        run_arms(other, [build_arms(other)["baseline"]], seeds=[0], folder=tmp_path)
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["rdrop-seed0.json"]


def test_random_state_of_the_machine_does_not_matter(tmp_path, short):
    torch.manual_seed(123)
    arm = build_arms(short)["baseline"]
    a = run_arm(short, arm, 0, tmp_path / "a")
    torch.manual_seed(456)
    assert run_arm(short, arm, 0, tmp_path / "b").test == a.test


def test_what_stands_in_the_folders_around_a_refused_run_is_left_there(tmp_path, short):
    task = replace(short, dropout=0.0)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="has no dropout above 0"):
        run_arm(task, build_arms(task)["rdrop"], 0, tmp_path / "mine" / "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
    assert not list((tmp_path / "mine").iterdir())


def test_a_run_stopped_after_its_record_leaves_nothing_behind(tmp_path, short):
    arm = build_arms(short)["baseline"]
    record = run_arm(short, arm, 0, tmp_path)
    (tmp_path / "unfinished" / "baseline-seed0").mkdir(parents=True)
    assert run_arm(short, arm, 0, tmp_path) == record
    assert not (tmp_path / "unfinished").exists()
