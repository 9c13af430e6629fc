"""A finished run is evaluated by its own folder: the checkpoint that it began from may be gone."""

import shutil
from dataclasses import replace

import pytest
from transformers import ViTImageProcessor

from regdrop.experiments import build_arms
from regdrop.experiments.evaluating.evaluate import evaluate
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.tasks import PRESETS
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
