import json
from importlib.metadata import version

import pytest
import torch

from regdrop.experiments import RunRecord, build_arms, load_records
from regdrop.experiments.record import (
    describe_hardware,
    library_versions,
    peak_memory_mib,
    record_path,
    reset_peak_memory,
    resolved_config,
)


def test_a_record_survives_its_file(tmp_path, record):
    original = record("rdrop", 3)
    original.save(record_path(tmp_path, "rdrop", 3))
    assert load_records(tmp_path) == [original]
    assert [p.name for p in (tmp_path / "records").iterdir()] == ["rdrop-seed3.json"]


def test_no_records_and_broken_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="no records in"):
        load_records(tmp_path)
    path = record_path(tmp_path, "rdrop", 0)
    path.parent.mkdir()
    for content in ("{", '{"task": "digits"}', "[1]"):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not the record of a run"):
            RunRecord.load(path)


def test_resolved_config_holds_every_setting_as_json(short):
    arm = build_arms(short)["rdrop-one-backward"]
    config = resolved_config(short, arm)
    assert json.loads(json.dumps(config)) == config
    assert config["rdrop"]["backward_passes"] == 1
    assert config["training"]["max_steps"] == 6
    assert config["model_config"]["hidden_size"] == 16
    assert config["dropout"] == 0.1


def test_versions_and_hardware():
    assert library_versions()["torch"] == version("torch")
    assert library_versions()["regdrop"] == version("regdrop")
    hardware = describe_hardware()
    assert hardware["threads"] == torch.get_num_threads()
    assert hardware["processor"]


def test_peak_memory_sees_an_allocation_that_is_gone():
    reset_peak_memory()
    before = peak_memory_mib()
    if before is None:
        return  # this system does not tell
    block = torch.ones(64 * 2**20 // 4)
    del block
    assert peak_memory_mib() - before > 50
