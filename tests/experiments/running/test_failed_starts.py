"""What a run leaves that failed, or was killed, before its first checkpoint."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from regdrop.experiments import build_arms
from regdrop.experiments.recording import history
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.tasks import PRESETS
from tiny_tasks import tiny_translation

MODEL = {**PRESETS["digits"].model_config, "num_hidden_layers": 1, "hidden_size": 16}
TRAIN = ["train", "digits", "--steps", "4", "--set", "training.eval_steps=2"]
TRAIN += ["--set", f"model_config={json.dumps(MODEL)}"]
# The largest file that the operating system writes stands for the room on a disk.
ROOM = 30_000
LIMITED = """
import resource, sys
room, *sys.argv = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), resource.RLIM_INFINITY))
from regdrop.cli import main
main()
"""


def train(output, room=None):
    """Train in a process of its own, with so many bytes a file; return its exit code and output."""
    command = ["-m", "regdrop"] if room is None else ["-c", LIMITED, str(room), "regdrop"]
    command = [sys.executable, *command, *TRAIN, "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.long
@pytest.mark.slow
def test_a_full_disk_is_one_line_and_blocks_the_same_command_only_where_there_is_work(tmp_path):
    code, said = train(tmp_path / "run", room=ROOM)
    assert (code, said.count("is the disk full?"), said.count("Traceback")) == (2, 1, 0), said
    assert not (tmp_path / "run").exists()
    code, said = train(tmp_path / "run")
    assert code == 0, said
    record = (tmp_path / "run" / "record.json").read_bytes()
    code, said = train(tmp_path / "run", room=ROOM)
    assert (code, "Finished before" in said) == (0, True), said
    assert (tmp_path / "run" / "record.json").read_bytes() == record


def test_a_full_disk_is_named_by_the_folder_of_the_run(tmp_path, monkeypatch):
    def write(*arguments, **options):  # the system names no file here
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(history, "write_text", write)
    task = replace(PRESETS["digits"], model_config=MODEL)
    paths = RunPaths.alone(tmp_path / "run")
    with pytest.raises(OSError, match=rf"a file in {paths.work} could not be .* No space left"):
        train_run(task, build_arms(task)["baseline"], 0, paths)
    assert not (tmp_path / "run").exists()


def test_names_and_folders_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    task = PRESETS["digits"]
    for folder in (tmp_path / ("x" * 300), tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=r"too long|Not a directory"):
            train_run(task, build_arms(task)["baseline"], 0, RunPaths.alone(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_run_learned_is_not_used_with_other_settings(tmp_path):
    task = tiny_translation(tmp_path)
    training = replace(task.training, max_steps=2, eval_steps=2, logging_steps=1, warmup_ratio=0.0)
    task = replace(task, training=training, num_beams=1, validation_num_beams=1)
    paths = RunPaths.alone(tmp_path / "run")
    replace(task, vocabulary_size=50).prepare(paths.work / "learned")  # and then it was killed
    (paths.work / "checkpoint-2").mkdir()
    assert not paths.is_interrupted
    train_run(task, build_arms(task)["baseline"], 0, paths)
    config = json.loads((paths.model / "config.json").read_text())
    assert config["vocab_size"] == len(task.prepare().processing_class) > 50
