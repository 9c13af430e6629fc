"""A finished run is evaluated by its own folder: what it began from may be gone or have changed."""

import json
import shutil
from dataclasses import replace

import pytest
from transformers import ViTImageProcessor

from regdrop.experiments import build_arms
from regdrop.experiments.evaluating.evaluate import evaluate
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.tasks import PRESETS
from regdrop.tasks.notices import say_once
from text_data import write_encoder_decoder
from tiny_tasks import tiny_summarisation, tiny_understanding


def understanding(folder):
    return tiny_understanding(folder)


def summarisation(folder):
    write_encoder_decoder(folder / "model", "bart")
    return tiny_summarisation(folder, model=str(folder / "model"), model_config={})


def images(folder):
    digits = PRESETS["digits"]
    digits.prepare().build_model().save_pretrained(folder / "model")
    ViTImageProcessor(image_mean=[0.2], image_std=[0.3]).save_pretrained(folder / "model")
    return replace(digits, model=str(folder / "model"), model_config={})


@pytest.mark.slow
@pytest.mark.parametrize("task_of", [understanding, summarisation, images])
def test_a_run_is_evaluated_without_the_checkpoint_that_it_began_from(tmp_path, task_of):
    task = task_of(tmp_path)
    training = replace(task.training, max_steps=4, eval_steps=2, logging_steps=2)
    task = replace(task, training=training)
    run = tmp_path / "run"
    record = train_run(task, build_arms(task)["rdrop"], 0, RunPaths.alone(run))
    shutil.rmtree(tmp_path / "model")
    assert evaluate(run, "test").metrics == pytest.approx(record.test, rel=1e-4)


@pytest.mark.slow
def test_a_run_is_evaluated_by_what_it_kept_and_changed_data_is_said(tmp_path, monkeypatch, caplog):
    say_once.cache_clear()
    monkeypatch.chdir(tmp_path)
    task = tiny_understanding(tmp_path)
    training = replace(task.training, max_steps=4, eval_steps=2, logging_steps=2)
    task = replace(task, training=training, model="model")
    run = tmp_path / "run"
    record = train_run(task, build_arms(task)["rdrop"], 0, RunPaths.alone(run))
    tokenizer = tmp_path / "model/tokenizer.json"
    content = json.loads(tokenizer.read_text())
    words = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(words, reversed(words.values()), strict=True))
    tokenizer.write_text(json.dumps(content))
    assert evaluate(run, "test").metrics == pytest.approx(record.test, rel=1e-4)
    assert "has changed" not in caplog.text
    shutil.rmtree("model")  # a name with no slash
    with (tmp_path / "data/validation.jsonl").open("a") as file:
        file.write(json.dumps({"sentence": "good", "label": 0}) + "\n")
    assert evaluate(run, "test").examples == 21
    assert "has changed since the run was trained (validation.jsonl)" in caplog.text
