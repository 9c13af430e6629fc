import dataclasses
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
import torch

from regdrop import whole_files
from regdrop.experiments import RunRecord, build_arms, load_records
from regdrop.experiments.recording.details import read_details
from regdrop.experiments.recording.environment import describe_hardware, library_versions
from regdrop.experiments.recording.ownership import hold
from regdrop.experiments.recording.record import merge_records, record_path
from regdrop.experiments.recording.settings import resolved_config


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


def save(folder, records):
    for one in records:
        one.save(record_path(folder, one.arm, one.seed))
    return folder


def shortened(folder):
    files = sorted((folder / "records").iterdir())
    return [path.stem for path in files if "history" not in json.loads(path.read_text())]


def test_merged_records_are_the_same_and_short(tmp_path, with_examples):
    save(tmp_path, with_examples)
    merge_records(tmp_path)
    assert load_records(tmp_path) == with_examples
    assert RunRecord.load(record_path(tmp_path, "rdrop", 1)) == with_examples[-1]
    names = [f"{one.arm}-seed{one.seed}" for one in with_examples]
    assert shortened(tmp_path) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["details.npz", "records"]
    assert max(path.stat().st_size for path in (tmp_path / "records").iterdir()) < 5_000


def test_what_is_new_is_merged_with_what_was_before(tmp_path, with_examples):
    first, again, removed, new = with_examples
    save(tmp_path, [first, again, removed])
    merge_records(tmp_path)
    before = (tmp_path / "details.npz").stat().st_mtime_ns
    merge_records(tmp_path)  # nothing is new
    assert (tmp_path / "details.npz").stat().st_mtime_ns == before
    # A run that was removed and one that was trained again replace what was kept of them.
    record_path(tmp_path, removed.arm, removed.seed).unlink()
    again = dataclasses.replace(again, examples={"test": [[1.0, 1.0, 0.125]]})
    save(tmp_path, [again, new])
    assert load_records(tmp_path) == [first, again, new]
    merge_records(tmp_path)
    assert load_records(tmp_path) == [first, again, new]
    assert len(read_details(tmp_path / "details.npz")) == 3


class Stopped(BaseException):
    """Stops a merge, as Ctrl-C would."""


@pytest.mark.parametrize("moment", range(6))
def test_a_merge_that_is_stopped_at_any_moment_loses_nothing(
    tmp_path, with_examples, monkeypatch, moment
):
    save(tmp_path, with_examples)
    left = moment

    def replace(*paths):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped
        rename(*paths)

    rename = os.replace
    monkeypatch.setattr(whole_files.os, "replace", replace)
    if moment < 5:  # the details, and four records
        with pytest.raises(Stopped):
            merge_records(tmp_path)
    assert load_records(tmp_path) == with_examples
    left = 100
    merge_records(tmp_path)
    assert load_records(tmp_path) == with_examples
    assert len(shortened(tmp_path)) == 4
    assert not list(tmp_path.rglob("*.partial"))


def test_a_merge_leaves_its_work_to_another_that_is_at_it(tmp_path, with_examples):
    save(tmp_path, with_examples)
    lock = tmp_path / "details.lock"
    with hold(lock, "a merge"):
        merge_records(tmp_path)
        assert shortened(tmp_path) == []
        assert load_records(tmp_path) == with_examples
    lock.touch()  # left by a process that was killed
    merge_records(tmp_path)
    assert len(shortened(tmp_path)) == 4
    assert not lock.exists()


@pytest.mark.long
@pytest.mark.slow
def test_processes_that_merge_at_once_lose_nothing(tmp_path, with_examples):
    script = """
import sys
from pathlib import Path
from regdrop.experiments.recording.record import load_records, merge_records
folder = Path(sys.argv[1])
for _ in range(20):
    merge_records(folder)
    load_records(folder)
"""
    save(tmp_path, with_examples[:1])
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    records = [with_examples[0]]
    for seed in range(1, 10):
        records.append(dataclasses.replace(with_examples[0], seed=seed))
        time.sleep(0.2)
        save(tmp_path, records[-1:])
    for process in processes:
        process.wait(300)
    assert [process.returncode for process in processes] == [0, 0]
    merge_records(tmp_path)
    found = {record.seed: record for record in load_records(tmp_path)}
    assert found == {one.seed: one for one in records}


def test_a_short_record_without_its_details_is_named(tmp_path, with_examples):
    merge_records(save(tmp_path, with_examples))
    (tmp_path / "details.npz").unlink()
    with pytest.raises(ValueError, match=r"not the record of a run: .* details\.npz must hold"):
        load_records(tmp_path)


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
from regdrop.experiments.recording.memory import peak_memory_mib, reset_peak_memory
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


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_copy_of_a_record_is_no_further_seed(tmp_path, record, is_merged):
    save(tmp_path, [record("rdrop", 0)])
    if is_merged:
        merge_records(tmp_path)
    copy = tmp_path / "records" / "rdrop-seed0-backup.json"
    content = record_path(tmp_path, "rdrop", 0).read_bytes()
    copy.write_bytes(content)
    for read in (merge_records, load_records):
        with pytest.raises(
            ValueError, match=r"backup\.json holds .* named rdrop-seed0\.json; move"
        ):
            read(tmp_path)
    assert copy.read_bytes() == content
