import os
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from regdrop.experiments import build_arms, run_arm, run_arms, write_report
from regdrop.experiments.recording.history import DivergedError
from regdrop.experiments.recording.ownership import HeldError, hold
from regdrop.experiments.recording.record import record_path
from regdrop.experiments.running import building
from regdrop.experiments.running.integrity import list_checkpoints
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.experiments.studies.definitions import study_arms
from regdrop.tasks import Metric
from regdrop.tasks.common.full_precision import TaskTrainer
from regdrop.tasks.images.task import ImageClassification


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


class Errors(ImageClassification):
    """A task of one's own, whose metric no task of the package has."""

    @property
    def metrics(self):
        return {"errors": Metric("errors (%)", greater_is_better=False, percent=True)}

    def compute_metrics(self, statistics):
        return {"errors": 1 - super().compute_metrics(statistics)["accuracy"]}


class OwnFamily(Errors):
    family = "mine"


@pytest.mark.parametrize("own", [Errors, OwnFamily])
def test_a_task_of_ones_own_has_a_report(tmp_path, short, own):
    settings = {**vars(short), "name": "my-task", "selection_metric": "errors"}
    task = own(**settings)
    record = run_arm(task, build_arms(task)["baseline"], 0, tmp_path)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| arm | test errors (%) |" in text
    assert f"| baseline | {100 * record.test['errors']:.2f} |" in text


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
        patch.setattr(building, "TaskTrainer", trainer)
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
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(building, "TaskTrainer", interrupt_after_a_step)
        with nullcontext() if finished else pytest.raises(KeyboardInterrupt):
            run_arm(short, build_arms(short)["rdrop"], 0, tmp_path)
    assert record_path(tmp_path, "rdrop", 0).exists() == finished
    changed = replace(short, dropout=0.2, rdrop=replace(short.rdrop, alpha=7.0))
    with pytest.raises(
        ValueError, match=r"other settings \(dropout, rdrop\.alpha\); choose another"
    ):
        run_arm(changed, build_arms(changed)["rdrop"], 0, tmp_path)


def test_another_seed_neither_takes_a_finished_run_nor_goes_on_with_its_checkpoint(
    tmp_path, short, monkeypatch
):
    arm, finished, begun = build_arms(short)["rdrop"], tmp_path / "finished", tmp_path / "begun"
    train_run(short, arm, 0, RunPaths.alone(finished))
    with monkeypatch.context() as patch:
        patch.setattr(building, "TaskTrainer", interrupt_after_a_step)
        with pytest.raises(KeyboardInterrupt):
            train_run(short, arm, 0, RunPaths.alone(begun))
    for folder in (finished, begun):
        with pytest.raises(ValueError, match=r"made with other settings \(seed\)"):
            train_run(short, arm, 3, RunPaths.alone(folder))
        assert train_run(short, arm, 0, RunPaths.alone(folder)).seed == 0


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


class InTheEnd(TrainerCallback):
    """Stops a run after its last checkpoint, before it is evaluated."""

    def on_train_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def cut_in_the_end(task, arm, folder, monkeypatch):
    """Train a run that is interrupted in the end."""
    make = partial(TaskTrainer, callbacks=[InTheEnd()])
    with monkeypatch.context() as patch:
        patch.setattr(building, "TaskTrainer", make)
        with pytest.raises(KeyboardInterrupt):
            run_arm(task, arm, 0, folder)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "hurt", "message"),
    [
        ("model.safetensors", truncate, "of .* bytes"),
        ("optimizer.pt", lambda path: path.unlink(), "is missing"),
        ("trainer_state.json", flip, "cannot be read|other content"),
        ("whole.json", truncate, "cannot be read"),
    ],
)
def test_a_run_goes_on_from_its_last_whole_checkpoint(
    tmp_path, short, monkeypatch, caplog, name, hurt, message
):
    """The first is the best one, so that the others are not needed at the end."""
    arm = build_arms(short)["rdrop"]
    whole = run_arm(short, arm, 0, tmp_path / "whole")
    cut_in_the_end(short, arm, tmp_path / "cut", monkeypatch)
    work = tmp_path / "cut" / "unfinished" / "rdrop-seed0"
    checkpoints = list_checkpoints(work)
    assert len(checkpoints) == 2
    hurt(checkpoints[-1] / name)
    steps = []
    again = run_arm(short, arm, 0, tmp_path / "cut", progress=lambda *x: steps.append(x[0]))
    said = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert len(said) == 1
    assert re.search(rf"checkpoint-\d+: .*({message})", said[0])
    assert without_times(again) == without_times(whole)
    assert min(steps) <= int(checkpoints[-1].name.split("-")[1])


def test_a_run_in_a_folder_that_was_moved_selects_the_same_checkpoint(tmp_path, short, monkeypatch):
    training = replace(short.training, warmup_ratio=0.0)
    task = WorstIsSelected(**{**vars(short), "training": training})
    arm = build_arms(task)["baseline"]
    whole = run_arm(task, arm, 0, tmp_path / "whole")
    assert whole.best_step == 2
    cut_in_the_end(task, arm, tmp_path / "cut", monkeypatch)
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert without_times(run_arm(task, arm, 0, tmp_path / "moved")) == without_times(whole)


def test_a_best_checkpoint_that_is_damaged_is_trained_again(tmp_path, short, monkeypatch, caplog):
    training = replace(short.training, warmup_ratio=0.0)
    task = WorstIsSelected(**{**vars(short), "training": training})
    arm = build_arms(task)["baseline"]
    whole = run_arm(task, arm, 0, tmp_path / "whole")
    cut_in_the_end(task, arm, tmp_path / "cut", monkeypatch)
    work = tmp_path / "cut" / "unfinished" / "baseline-seed0"
    truncate(work / "checkpoint-2" / "model.safetensors")
    again = run_arm(task, arm, 0, tmp_path / "cut")
    assert "goes on from the start" in caplog.text
    assert without_times(again) == without_times(whole)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"config\.json is not the settings of an interrupted run"),
        ("history.jsonl", "{}\n", r"history\.jsonl is not the history .* remove"),
        ("history.jsonl", "", r"history\.jsonl is not the history .* does not reach step"),
    ],
)
def test_damaged_files_of_an_interrupted_run_are_named(
    tmp_path, short, monkeypatch, name, content, message
):
    arm = build_arms(short)["rdrop"]
    with monkeypatch.context() as patch:
        patch.setattr(building, "TaskTrainer", interrupt_after_a_step)
        with pytest.raises(KeyboardInterrupt):
            run_arm(short, arm, 0, tmp_path)
    work = tmp_path / "unfinished" / "rdrop-seed0"
    (work / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        run_arm(short, arm, 0, tmp_path)
    assert list_checkpoints(work)


@pytest.mark.parametrize(
    ("logging_steps", "eval_steps", "what"),
    [(1, 2, "the training loss"), (1000, 2, r"validation \w+"), (1000, 6, r"validation \w+")],
)
def test_a_loss_that_is_no_number_ends_the_run_with_its_step(
    tmp_path, short, logging_steps, eval_steps, what
):
    training = replace(
        short.training,
        learning_rate=1e30,
        max_grad_norm=0.0,
        warmup_ratio=0.0,
        logging_steps=logging_steps,
        eval_steps=eval_steps,
    )
    task = replace(short, training=training)
    with pytest.raises(DivergedError, match=rf"{what} is (nan|inf) at step \d: .* Lower"):
        run_arm(task, build_arms(task)["rdrop"], 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("step", "seen"), [(3, 4), (5, 6)])
def test_one_loss_that_is_no_number_is_seen_where_nothing_is_logged(
    tmp_path, short, monkeypatch, step, seen
):
    """Its gradient is left out, so that the metrics stay finite: only the sum of losses tells."""

    class OneLoss(TaskTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == step - 1 else loss

    monkeypatch.setattr(building, "TaskTrainer", OneLoss)
    task = replace(short, training=replace(short.training, logging_steps=1000))
    with pytest.raises(DivergedError, match=f"the training loss is nan at step {seen}: "):
        run_arm(task, build_arms(task)["rdrop"], 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_record_holds_a_metric_that_is_no_number(tmp_path, short, monkeypatch):
    class NoTest(TaskTrainer):
        def predict(self, *args, **kwargs):
            prediction = super().predict(*args, **kwargs)
            prediction.predictions[0] = np.nan
            return prediction

    monkeypatch.setattr(building, "TaskTrainer", NoTest)
    with pytest.raises(DivergedError, match=r"test nll is nan at step \d: "):
        run_arm(short, build_arms(short)["baseline"], 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_has_one_owner(tmp_path, short):
    arm = build_arms(short)["baseline"]
    paths = RunPaths.compared(tmp_path / "out", arm.name, 0)
    with hold(paths.lock, "it"):
        with pytest.raises(HeldError, match=rf"at work in process {os.getpid()} on"):
            run_arm(short, arm, 0, tmp_path / "out")
        assert paths.lock.exists()
    assert not (tmp_path / "out").exists()
    run_arm(short, arm, 0, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["records"]


def test_a_run_that_was_stopped_before_its_first_checkpoint_blocks_nothing(tmp_path, short):
    work = tmp_path / "unfinished" / "rdrop-seed0"
    work.mkdir(parents=True)
    (work / "config.json").write_text('{"of": "other settings"}')
    (work.parent / "rdrop-seed0.lock").write_text("process 1 on it, killed")
    run_arm(short, build_arms(short)["rdrop"], 0, tmp_path)
    assert not work.parent.exists()


def test_the_first_loss_after_a_resume_is_the_mean_since_the_log_before_the_checkpoint(
    tmp_path, short, monkeypatch
):
    """Checkpoints at 2, 4 and 6, logs at 1, 3 and 6: one that is resumed begins between two."""
    task = replace(short, training=replace(short.training, logging_steps=3))
    arm = build_arms(task)["rdrop"]
    whole = run_arm(task, arm, 0, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(building, "TaskTrainer", interrupt_after_a_step)
        with pytest.raises(KeyboardInterrupt):
            run_arm(task, arm, 0, tmp_path / "cut")
    resumed = run_arm(task, arm, 0, tmp_path / "cut")
    losses = [[e["loss"] for e in r.history if "loss" in e] for r in (resumed, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert [e["step"] for e in whole.history if "loss" in e] == [1, 3, 6]
