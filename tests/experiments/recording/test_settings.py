import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from regdrop.experiments import build_arms
from regdrop.experiments.recording.settings import check_same_config, resolved_config


@pytest.fixture
def config(short):
    """Every setting of a run on data of two files."""
    return resolved_config(short, build_arms(short)["rdrop"]) | {
        "data": {"train.jsonl": "a", "test.jsonl": "b"}
    }


def changed(config, name, value):
    """Return a copy with one value set, or removed by None."""
    copied = copy.deepcopy(config)
    *parts, last = name.split("/")
    holder = copied
    for part in parts:
        holder = holder[part]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    return copied


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("data/validation.jsonl", "c", r"data\.validation\.jsonl"),
        ("data/test.jsonl", None, r"data\.test\.jsonl"),
        ("data/test.jsonl", "c", r"data\.test\.jsonl"),
        ("model_config/hidden_act", "relu", r"model_config\.hidden_act"),
        ("model_config/hidden_size", None, r"model_config\.hidden_size"),
        ("training/max_steps", 7, r"training\.max_steps"),
    ],
)
def test_what_was_added_removed_or_changed_is_named(config, name, value, shown):
    check_same_config(Path("record.json"), config, copy.deepcopy(config))
    with pytest.raises(ValueError, match=rf"made with other settings \({shown}\)"):
        check_same_config(Path("record.json"), config, changed(config, name, value))


@pytest.mark.parametrize("name", ["training/average_checkpoints", "dropout_rises", "data"])
def test_a_field_that_was_none_then_does_not_differ(config, name):
    check_same_config(Path("record.json"), changed(config, name, None), config)


def test_the_same_files_may_lie_elsewhere_and_others_may_not(config):
    moved = changed(config, "dataset", "another/folder")
    check_same_config(Path("record.json"), config, moved)
    with pytest.raises(ValueError, match=r"other settings \(data\.test\.jsonl, dataset\)"):
        check_same_config(Path("record.json"), config, changed(moved, "data/test.jsonl", "c"))
    # Data that cannot be looked at is the same by its name alone.
    unseen = changed(moved, "data", None)
    with pytest.raises(ValueError, match=r"other settings \(dataset\)"):
        check_same_config(Path("record.json"), config, unseen)


def test_files_beside_the_data_that_an_earlier_record_holds_do_not_differ(config):
    noted = changed(config, "data/NOTES.md", "n")
    check_same_config(Path("record.json"), noted, config)
    # Where no file is named after a split all are data.
    unnamed = config | {"data": {"README.md": "a", "part.jsonl": "b"}}
    with pytest.raises(ValueError, match=r"other settings \(data\.part\.jsonl\)"):
        check_same_config(Path("record.json"), unnamed, changed(unnamed, "data/part.jsonl", None))


def test_a_checkpoint_in_a_folder_is_known_by_its_content(tmp_path, short):
    folder = tmp_path / "model"
    short.prepare().build_model().save_pretrained(folder)
    task = replace(short, model=str(folder), model_config={})
    arm = build_arms(short)["rdrop"]
    before = resolved_config(task, arm)
    (folder / "notes.txt").write_text("not of the model")
    os.utime(folder / "config.json", (1, 1))
    check_same_config(Path("record.json"), before, resolved_config(task, arm))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"other settings \(checkpoint\)"):
        check_same_config(Path("record.json"), before, resolved_config(task, arm))
    # A record without it, and a checkpoint that is gone, are the same by name.
    check_same_config(Path("record.json"), changed(before, "checkpoint", None), before)
    shutil.rmtree(folder)
    check_same_config(Path("record.json"), before, resolved_config(task, arm))
