"""`regdrop train` as torchrun starts it: two processes, one run."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from regdrop.experiments import build_arms
from regdrop.experiments.evaluating.evaluate import evaluate
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.tasks.configure import change_task, find_task
from text_data import WORDS, write_encoder, write_glue, write_rows, write_translation

MODEL = {
    "d_model": 32,
    "dropout": 0.1,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
}
TRANSLATION = [
    f"model_config={json.dumps(MODEL)}",
    "vocabulary_size=80",
    "max_length=24",
    "num_beams=1",
    "training.batch_size=256",
    "training.max_steps=12",
    "training.eval_steps=6",
    "training.logging_steps=3",
    "training.warmup_ratio=0.5",
    "rdrop.alpha=0.5",
]
UNDERSTANDING = [
    "group_by_length=false",
    "dropout=0.1",
    "training.batch_size=8",
    "training.max_steps=12",
    "training.eval_steps=6",
    "training.logging_steps=3",
    "training.mixed_precision=null",
]


def torchrun(*arguments):
    process = torchrun_started(*arguments)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def torchrun_started(*arguments):
    """Start the command in a group of processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "regdrop", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **options)


def settings_of(values):
    return [part for value in values for part in ("--set", value)]


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_train_one_translation_model_with_the_figures_of_one(tmp_path):
    data, run = write_translation(tmp_path / "data"), tmp_path / "run"
    options = ["multi30k-de-en", "--data", data, "--output", run, *settings_of(TRANSLATION)]
    result = torchrun("train", *options)
    assert result.returncode == 0, result.stderr
    # The main process alone speaks.
    assert result.stdout.count("Model and record") == 1
    assert result.stdout.count("validation bleu") == 1
    assert sorted(path.name for path in run.iterdir()) == ["model", "record.json"]
    record = json.loads((run / "record.json").read_text())
    assert record["steps"] == 12
    assert len(record["examples"]["test"]) == 12
    # The gathered figures of two processes are those of one.
    assert evaluate(run, "test").metrics == pytest.approx(record["test"], rel=1e-4)
    assert evaluate(run, "validation").metrics == pytest.approx(record["validation"], rel=1e-4)
    again = torchrun("train", *options)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("Finished before") == 1


@pytest.mark.long
def test_two_processes_share_each_batch_and_count_examples_once(tmp_path):
    """An odd number of test examples is padded to two processes, and the padding not counted."""
    data = write_glue(tmp_path / "data", "cola", train=60, test=21)
    model = write_encoder(tmp_path / "model")
    options = ["minilm-cola", "--data", data, "--model", model, *settings_of(UNDERSTANDING)]
    result = torchrun("train", *options, "--output", tmp_path / "two", "--arm", "baseline")
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two" / "record.json").read_text())
    assert len(two["examples"]["test"]) == 21
    assert evaluate(tmp_path / "two", "test").metrics == pytest.approx(two["test"], rel=1e-4)
    # As many steps see as many examples as those of one process do.
    task = change_task(
        find_task("minilm-cola"), data=str(data), model=str(model), settings=UNDERSTANDING
    )
    one = train_run(task, build_arms(task)["baseline"], 0, RunPaths.alone(tmp_path / "one"))
    assert two["history"][-1]["epoch"] == pytest.approx(one.history[-1]["epoch"], rel=0.01)


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_train_one_adaptive_language_model(tmp_path):
    """Its output reads weights outside of the forward that processes look into."""
    rows = [{"text": " ".join(WORDS[i % 12] for i in range(n, n + 5))} for n in range(60)]
    for name in ("train", "validation", "test"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    config = {"d_model": 16, "ffn_dim": 16, "attention_heads": 2, "num_layers": 1}
    config |= {"model_type": "adaptive-input", "cutoffs": [3, 7], "band_factor": 2}
    settings = [
        f"model_config={json.dumps(config)}",
        "block_size=12",
        "context_window=8",
        "training.batch_size=4",
        "training.max_steps=6",
        "training.eval_steps=3",
        "training.logging_steps=3",
    ]
    run = tmp_path / "run"
    options = ["ptb", "--data", tmp_path / "data", "--output", run]
    result = torchrun("train", *options, *settings_of(settings))
    assert result.returncode == 0, result.stderr
    record = json.loads((run / "record.json").read_text())
    assert evaluate(run, "test").metrics == pytest.approx(record["test"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_go_on_where_they_were_killed_and_average_their_checkpoints(tmp_path):
    data = write_glue(tmp_path / "data", "cola", train=60, test=21)
    model = write_encoder(tmp_path / "model")
    settings = [
        *UNDERSTANDING,
        "group_by_length=true",
        "training.average_checkpoints=2",
        "training.max_steps=300",
        "training.eval_steps=4",
    ]
    run = tmp_path / "run"
    options = ["minilm-cola", "--data", data, "--model", model, "--output", run]
    options += settings_of(settings)
    process = torchrun_started("train", *options)
    deadline = time.monotonic() + 120
    while not list(run.glob("unfinished/checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children(recursive=True)  # in sessions of their own
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.kill()
    psutil.wait_procs(ranks, timeout=10)
    before = (run / "unfinished" / "history.jsonl").read_text().splitlines()
    again = torchrun("train", *options, "--resume")
    assert again.returncode == 0, again.stderr
    record = json.loads((run / "record.json").read_text())
    assert record["steps"] == record["best_step"] == 300
    assert json.loads(before[0]) == record["history"][0]
    assert evaluate(run, "test").metrics == pytest.approx(record["test"], rel=1e-4)


@pytest.mark.long
def test_what_is_refused_is_said_once_and_ends_all_processes(tmp_path):
    data = write_translation(tmp_path / "data")
    common = ["multi30k-de-en", "--data", data, "--output", tmp_path / "run"]
    wrong = [*settings_of(TRANSLATION), "--set", "training.batch_size=255"]
    result = torchrun("train", *common, *wrong)
    assert result.returncode != 0
    text = " ".join(result.stderr.replace("│", " ").split())
    assert text.count("training.batch_size must be a multiple of") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["compare", "evaluate", "generate"])
def test_other_commands_refuse_several_processes(tmp_path, monkeypatch, command):
    from typer.testing import CliRunner

    from regdrop.commands import app

    monkeypatch.setenv("WORLD_SIZE", "2")
    target = "digits" if command == "compare" else str(tmp_path)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, target])
    assert result.exit_code == 2
    assert f"{command} must be started once, got 2 processes" in result.output


SLOW_BEGINNER = """
import sys, time
from pathlib import Path
from regdrop.experiments.recording.processes import (
    is_main_process,
    leave_process_group,
    main_process_first,
)

folder = Path(sys.argv[1])
with main_process_first():
    if not is_main_process():
        time.sleep(1)
    folder.mkdir(exist_ok=True)
if is_main_process():
    folder.rmdir()
leave_process_group()
"""


@pytest.mark.long
@pytest.mark.slow
def test_what_the_main_process_removes_is_not_made_again_by_one_that_begins_late(tmp_path):
    (tmp_path / "begin.py").write_text(SLOW_BEGINNER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "begin.py"), str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "run").exists()
