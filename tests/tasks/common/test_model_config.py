import math
from dataclasses import replace

import pytest
from transformers import CONFIG_MAPPING

from regdrop.tasks import PRESETS
from regdrop.tasks.common.model_config import check_model_config
from tiny_tasks import (
    tiny_language_modelling,
    tiny_summarisation,
    tiny_translation,
)


def images(folder, **changes):
    config = {**PRESETS["digits"].model_config, "num_hidden_layers": 1, "hidden_size": 16}
    return replace(PRESETS["digits"], model_config={**config, **changes})


def changed(make):
    """Return a function that makes a task with some changed settings of its model."""

    def change(folder, **changes):
        task = make(folder)
        return replace(task, model_config={**task.model_config, **changes})

    return change


FAMILIES = {
    "images": images,
    "translation": changed(tiny_translation),
    "summarisation": changed(tiny_summarisation),
    "language modelling": changed(tiny_language_modelling),
}
# An activation, a width and a dropout rate of each family's configuration.
NAMES = {
    "images": ("hidden_act", "intermediate_size", "initializer_range"),
    "translation": ("activation_function", "d_model", "attention_dropout"),
    "summarisation": ("activation_function", "d_model", "attention_dropout"),
    "language modelling": ("activation_function", "d_model", "attention_dropout"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_a_model_that_cannot_be_are_named_before_the_data_is_read(tmp_path, family):
    make = FAMILIES[family]
    act, width, number = NAMES[family]
    wrong = {
        act[:-1]: ("gelu", f"has no '{act[:-1]}': .* did you mean '{act}'"),
        width: (-4, f"model_config.{width} must be at least 0, got -4"),
        number: (math.nan, f"model_config.{number} must be finite, got nan"),
    }
    if "dropout" in number:
        wrong["dropout"] = (1.5, "model_config.dropout must be from 0 to 1, got 1.5")
        wrong["vocab_size"] = (7, "cannot have 'vocab_size': it is what the vocabulary has")
    for name, (value, message) in wrong.items():
        task = make(tmp_path, **{name: value})
        nowhere = task if family == "images" else replace(task, dataset="./nowhere")
        with pytest.raises(ValueError, match=message):
            nowhere.prepare()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_its_class_cannot_make_is_one_line_with_the_settings(tmp_path, family):
    act, width, _ = NAMES[family]
    for name, value, message in (
        (act, "gellu", r"'gellu'.* cannot be: KeyError: 'gellu'"),
        (width, "wide", "expected int, got str"),
    ):
        prepared = FAMILIES[family](tmp_path, **{name: value})
        with pytest.raises(ValueError, match=message) as caught:
            prepared.prepare().build_model()
        assert "model_config" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["images", "summarisation", "language modelling"])
def test_a_type_of_model_that_there_is_not_is_answered_with_the_nearest(tmp_path, family):
    task = FAMILIES[family](tmp_path, model_type="bertt")
    with pytest.raises(ValueError, match="got 'bertt'; did you mean 'bert'"):
        task.prepare()
    with pytest.raises(ValueError, match=r"model_type must be an? .*, got 'sam'"):
        replace(task, model_config={"model_type": "sam"}).prepare()


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "image_size", "num_labels"])
def test_what_a_task_of_images_sets_itself_is_not_taken_from_the_model(tmp_path, name):
    """`dropout` sets every rate: another one beside it would be ignored."""
    with pytest.raises(ValueError, match=f"model_config cannot have '{name}': it is "):
        images(tmp_path, **{name: 1}).prepare()


def test_changes_of_a_checkpoint_are_checked_too(tmp_path):
    from text_data import write_encoder_decoder

    model = str(write_encoder_decoder(tmp_path / "model"))
    task = tiny_summarisation(tmp_path, model=model, model_config={"dropuot": 0.1})
    with pytest.raises(ValueError, match=r"has no 'dropuot': .* did you mean 'dropout'"):
        task.prepare()
    with pytest.raises(ValueError, match="attention_dropout must be from 0 to 1, got -1"):
        replace(task, model_config={"attention_dropout": -1}).prepare()
    good = replace(task, model_config={"dropout": 0.25}, dataset=task.dataset)
    assert good.prepare().build_model().config.dropout == 0.25


@pytest.mark.parametrize(
    "name", sorted(name for name, x in PRESETS.items() if getattr(x, "model_config", None))
)
def test_the_models_of_presets_are_taken(name):
    """So far as the data, which is not here."""
    task = PRESETS[name]
    if name != "digits" and getattr(task, "model", None) is None:
        with pytest.raises(ValueError, match="there is no folder"):
            replace(task, dataset="./nowhere").prepare()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"rope_theta": 12345.0}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("gpt_neox", {"rotary_pct": 0.5}),
        ("mamba2", {"time_step_limit": [0.0, math.inf]}),
    ],
)
def test_what_a_class_reads_is_taken_though_its_configuration_has_no_such_name(kind, changes):
    standard = CONFIG_MAPPING[kind]
    check_model_config(changes, standard)
    for wrong in ({"rope_theeta": 1.0}, {"hidden_sise": 3}):
        with pytest.raises(ValueError, match="does not know it"):
            check_model_config(wrong, standard)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_model_keeps_settings_that_were_ignored_once(tmp_path, family):
    """Its own configuration is in its folder: it is evaluated as it was trained."""
    folder = tmp_path / "model"
    FAMILIES[family](tmp_path).prepare(folder).build_model().save_pretrained(folder)
    task = FAMILIES[family](tmp_path, ignored_once=3)
    with pytest.raises(ValueError, match="has no 'ignored_once'"):
        task.prepare(tmp_path / "new")
    assert task.prepare(folder).splits["test"] is not None
