"""Settings of an evaluation: those of decoding act, and what only training reads is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from regdrop.experiments import build_arms
from regdrop.experiments.evaluating.changes import apply_decoding, check_changes
from regdrop.experiments.evaluating.evaluate import evaluate
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.tasks import PRESETS
from regdrop.tasks.configure import change_task
from tiny_tasks import tiny_summarisation

TRANSLATION = PRESETS["multi30k-part-de-en"]


def saved(positions=256):
    beams = {"num_beams": 5, "length_penalty": 1.0, "early_stopping": True}
    return SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=positions),
        generation_config=GenerationConfig(max_length=175, **beams),
    )


@pytest.mark.parametrize(
    ("task", "setting"),
    [
        ("multi30k-part-de-en", "vocabulary_size=99"),
        ("multi30k-part-de-en", "lowercase=false"),
        ("multi30k-part-de-en", "validation_num_beams=2"),
        ("multi30k-part-de-en", "rdrop.alpha=9"),
        ("multi30k-part-de-en", "training.learning_rate=1"),
        ("multi30k-part-de-en", "name=x"),
        ("minilm-sst2-part", "model=./elsewhere"),
        ("minilm-sst2-part", "dropout=0.3"),
        ("digits", "augmentation=flip"),
    ],
)
def test_what_a_saved_model_cannot_take_is_named(task, setting):
    changed = change_task(PRESETS[task], settings=[setting])
    name = setting.partition("=")[0]
    with pytest.raises(ValueError, match=rf"cannot change {name}: .*it can change .*batch_size"):
        check_changes("run", changed, ["train_examples=20", setting])


def test_a_length_penalty_is_of_several_beams():
    settings = ["num_beams=1", "length_penalty=2"]
    with pytest.raises(ValueError, match="length_penalty is of several beams"):
        check_changes("run", change_task(TRANSLATION, settings=settings), settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], (5, 1.0, True, 175)),
        (["num_beams=1"], (1, None, None, 175)),
        (["num_beams=3"], (3, 1.0, True, 175)),
        (["length_penalty=9", "max_length=30"], (5, 9, True, 30)),
    ],
)
def test_settings_of_decoding_are_the_models(settings, expected):
    model, changed = saved(), change_task(TRANSLATION, settings=settings)
    check_changes("run", changed, settings)
    apply_decoding(model, changed, settings)
    config = model.generation_config
    found = (config.num_beams, config.length_penalty, config.early_stopping, config.max_length)
    assert found == expected


def test_a_length_is_at_most_the_models_positions():
    changed = change_task(TRANSLATION, settings=["max_length=300"])
    with pytest.raises(ValueError, match=r"max_length must be at most the 256 positions .*got 300"):
        apply_decoding(saved(), changed, ["max_length=300"])


@pytest.mark.slow
def test_other_decoding_gives_other_text(tmp_path):
    task = tiny_summarisation(tmp_path)
    task = replace(task, training=replace(task.training, max_steps=60, eval_steps=60))
    run = tmp_path / "run"
    record = train_run(task, build_arms(task)["baseline"], 0, RunPaths.alone(run))
    short = evaluate(run, "test", settings=["max_length=2"])
    assert short.metrics["rouge2"] == 0.0 < record.test["rouge1"]
    assert short.metrics["rouge1"] != record.test["rouge1"]
    assert short.metrics["nll"] == pytest.approx(record.test["nll"], rel=1e-4)
