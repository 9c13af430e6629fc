import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from regdrop.experiments import RunRecord, build_arms, load_records
from regdrop.experiments.record import (
    describe_hardware,
    library_versions,
    record_path,
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
    # In a process of its own: in this one an earlier test may have needed more.
    script = """
import torch
from regdrop.experiments.record import peak_memory_mib, reset_peak_memory
allowed, before = reset_peak_memory(), peak_memory_mib()
block = torch.ones(256 * 2**20 // 4)
del block
after, again = peak_memory_mib(), reset_peak_memory()
print(after - before, peak_memory_mib() - before if again else 0.0) if allowed else print(300, 0)
"""
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    grown, after_reset = map(float, output.split())
    assert 200 < grown < 400
    assert after_reset < 100
