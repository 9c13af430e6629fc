"""Runs that an older version began with settings that a new run is refused."""

import json
from dataclasses import replace

import pytest
from transformers import TrainerCallback

from regdrop.experiments import build_arms, run_arm, run_arms
from regdrop.experiments.recording.record import record_path
from regdrop.experiments.running import building
from regdrop.experiments.running.run import RunPaths
from regdrop.tasks.common.full_precision import TaskTrainer

REFUSED = "model_config has no 'ignored_once': ViTConfig does not know it and ignores it"


class AtStep5(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def write_entry(path):
    """Add an entry that has no effect to the settings in a file, as if they had always had it."""
    content = json.loads(path.read_text())
    content.get("config", content)["model_config"]["ignored_once"] = 3
    path.write_text(json.dumps(content))


def with_entry(task):
    return replace(task, model_config={**task.model_config, "ignored_once": 3})


def test_an_interrupted_run_keeps_an_entry_that_a_new_run_is_refused(
    tmp_path, short, monkeypatch, caplog
):
    task, arm = with_entry(short), build_arms(short)["rdrop"]
    whole = run_arm(short, arm, 0, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(building, "TaskTrainer", lambda **x: TaskTrainer(callbacks=[AtStep5()], **x))
        with pytest.raises(KeyboardInterrupt):
            run_arm(short, arm, 0, tmp_path / "cut")
    write_entry(RunPaths.compared(tmp_path / "cut", "rdrop", 0).work / "config.json")
    with pytest.raises(ValueError, match=REFUSED):
        run_arm(task, arm, 1, tmp_path / "cut")
    resumed = run_arm(task, arm, 0, tmp_path / "cut")
    assert (resumed.test, resumed.examples) == (whole.test, whole.examples)
    assert resumed.config["model_config"]["ignored_once"] == 3
    assert [line for line in caplog.messages if "ignored_once" in line] == [
        f"{REFUSED}. The run was begun with this, and goes on as it was"
    ]


@pytest.mark.long
def test_so_does_a_comparison_that_has_records(tmp_path, short):
    task, arm = with_entry(short), build_arms(short)["baseline"]
    run_arm(short, arm, 0, tmp_path)
    write_entry(record_path(tmp_path, "baseline", 0))
    records = run_arms(task, [arm], seeds=[0, 1], folder=tmp_path)
    assert [record.seed for record in records] == [0, 1]
    with pytest.raises(ValueError, match=REFUSED):
        run_arms(task, [arm], seeds=[0], folder=tmp_path / "new")
