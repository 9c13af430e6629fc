"""A finished run whose record or model was damaged is refused by a line that says what is wrong."""

import json
import pickle
import shutil

import pytest

from regdrop.experiments import build_arms
from regdrop.experiments.evaluating.evaluate import evaluate
from regdrop.experiments.recording.settings import resolved_config
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.tasks.configure import task_from_config


@pytest.mark.slow
def test_a_model_that_cannot_be_read_is_named(tmp_path, short):
    train_run(short, build_arms(short)["baseline"], 0, RunPaths.alone(tmp_path / "run"))
    assert evaluate(tmp_path / "run", "test").examples > 0
    weights = tmp_path / "run" / "model" / "model.safetensors"
    content = weights.read_bytes()
    shutil.copytree(tmp_path / "run", tmp_path / "pickled")
    for cut in (0, 1000, len(content) - 8):
        weights.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"the model in .*run/model cannot be read"):
            evaluate(tmp_path / "run", "test")
    model = tmp_path / "pickled" / "model"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}, protocol=2))
    with pytest.raises(ValueError, match=r"the model in .*pickled/model cannot be read"):
        evaluate(tmp_path / "pickled", "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("training"), "cannot be read: 'training'"),
        (lambda config: config.pop("name"), "cannot be read: .*'name'"),
        (lambda config: config["training"].update(foo=1), "cannot be read: .*'foo'"),
        (lambda config: config.update(training="x"), "cannot be read: "),
        (lambda config: config.update(rdrop=[]), "cannot be read: "),
        (lambda config: config.update(family=None), "family must be one of"),
    ],
)
def test_settings_that_are_no_tasks_are_named(short, change, message):
    config = json.loads(json.dumps(resolved_config(short, build_arms(short)["baseline"])))
    assert task_from_config(config).name == short.name
    change(config)
    with pytest.raises(ValueError, match=message):
        task_from_config(config)
