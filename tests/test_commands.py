import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer
from typer.testing import CliRunner

from models import tiny_bert, tiny_vit
from regdrop.commands import app, comparisons, runs, tuning
from regdrop.commands.app import interruptible, usage_errors
from regdrop.commands.loading import load_model
from regdrop.commands.options import output_folder
from regdrop.experiments import RunRecord, build_arms, load_records
from regdrop.experiments.recording.record import record_path
from regdrop.experiments.recording.settings import resolved_config
from regdrop.experiments.studies.choices import TunedArm
from regdrop.experiments.studies.tuning import NoFiniteFigureError
from regdrop.tasks import PRESETS

RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})


def run(*arguments):
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def test_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("tasks", "train", "compare", "sweep", "report", "doctor", "convert-alpha"):
        assert command in result.output


def test_tasks():
    result = run("tasks")
    assert result.exit_code == 0
    for name, task in PRESETS.items():  # in a pipe each row is a line
        line = next(x for x in result.output.splitlines() if f" {name} " in x)
        assert task.description in line


def test_a_file_that_is_not_utf_8_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "load_run", lambda folder: None)
    monkeypatch.setattr(runs, "generate_lines", lambda folder, lines, **options: iter(lines))
    file = tmp_path / "latin1.txt"
    file.write_bytes("Männchen".encode("latin-1"))
    result = run("generate", tmp_path, file)
    assert result.exit_code == 2
    assert "latin1.txt must be text in UTF-8" in " ".join(result.output.replace("│", " ").split())


def test_lines_that_nobody_reads_end_without_a_word(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as unread:
        monkeypatch.setattr("sys.stdout", unread)
        with pytest.raises(typer.Exit) as ended:
            runs._print_lines(["a", "b"])
    assert ended.value.exit_code == 141


def test_convert_alpha():
    result = run("convert-alpha", 0.3, "--from", "official-vit", "--batch-size", 64)
    assert result.exit_code == 0
    assert "alpha = 38.4" in result.output
    result = run("convert-alpha", 1, "--from", "bert4torch")
    assert result.exit_code == 2
    assert "bert4torch needs num_classes" in " ".join(result.output.split())
    result = run("convert-alpha", 1, "--from", "bert4torch", "--num-classes", 4)
    assert "torch.cat([logits[::2], logits[1::2]])" in " ".join(result.output.split())


@pytest.mark.slow
def test_train_compare_and_report_on_real_digits(tmp_path):
    options = ("--steps", 60, "--output", tmp_path)
    result = run("compare", "digits", "--arms", "baseline, rdrop", "--seeds", 2, *options)
    assert result.exit_code == 0, result.output
    names = {path.stem for path in (tmp_path / "records").iterdir()}
    assert names == {"baseline-seed0", "baseline-seed1", "rdrop-seed0", "rdrop-seed1"}
    for path in (tmp_path / "records").iterdir():
        record = json.loads(path.read_text())
        assert record["test"]["accuracy"] > 0.5
        assert record["config"]["training"]["max_steps"] == 60
        assert "examples" not in record
    assert (tmp_path / "details.npz").exists()
    (tmp_path / "report.md").unlink()
    result = run("report", tmp_path)
    assert result.exit_code == 0, result.output
    assert "test accuracy (%)" in result.output
    assert (tmp_path / "report.md").exists()


@pytest.mark.long
@pytest.mark.slow
def test_a_sweep_trains_what_a_longer_grid_and_further_arms_add(tmp_path):
    options = ("--task", "digits", "--steps", 20, "--seeds", 1, "--output", tmp_path)
    result = run("sweep", "alpha", "--grid", "0,1,3", "--arms", "alpha-0,alpha-1", *options)
    assert result.exit_code == 0, result.output
    assert "How strongly should the passes agree?" in result.output
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    assert {path.stem for path in written} == {"alpha-0-seed0", "alpha-1-seed0"}
    result = run("sweep", "alpha", "--grid", "0,1,4", *options)
    assert result.exit_code == 0, result.output
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert (tmp_path / "records" / "alpha-4-seed0.json").exists()
    assert (tmp_path / "alpha.png").exists()
    result = run("compare", "digits", "--steps", 20, "--seeds", 1, "--output", tmp_path)
    assert result.exit_code == 2
    assert "holds results of 'alpha'" in " ".join(result.output.split())


@pytest.mark.long
@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_and_no_other_study_does(tmp_path, monkeypatch):
    options = ("--task", "digits", "--steps", 20, "--seeds", 1, "--output", tmp_path)
    original = comparisons.run_arms

    def stop_after_one(task, arms, **kwargs):
        original(task, arms[:1], **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparisons, "run_arms", stop_after_one)
        assert run("sweep", "alpha", "--grid", "0,1", *options).exit_code == 130
    assert {path.stem for path in (tmp_path / "records").iterdir()} == {"alpha-0-seed0"}
    refused = run("compare", "digits", "--output", tmp_path)
    assert "holds results of 'alpha'" in " ".join(refused.output.split())
    result = run("sweep", "alpha", "--grid", "0,1", *options)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "records").iterdir())) == 2


@pytest.mark.slow
def test_a_refused_comparison_leaves_nothing_behind(tmp_path):
    output = tmp_path / "out"
    # One run at a time: no other may be at work when the first is refused.
    options = ("--data", tmp_path / "nowhere", "--workers", 1, "--output", output)
    result = run("compare", "minilm-cola", *options)
    assert result.exit_code == 2
    assert "there is no folder" in " ".join(result.output.replace("│", " ").split())
    assert not output.exists()


@pytest.mark.slow
def test_train_and_evaluate_on_real_digits(tmp_path):
    options = ("--seed", 3, "--steps", 60, "--output", tmp_path)
    result = run("train", "images", "--preset", "digits", *options)
    assert result.exit_code == 0, result.output
    assert "rdrop seed 3: validation accuracy" in result.output
    record = json.loads((tmp_path / "record.json").read_text())
    assert not (tmp_path / "unfinished").exists()
    result = run("evaluate", tmp_path)
    assert result.exit_code == 0, result.output
    evaluation = json.loads((tmp_path / "evaluation-test.json").read_text())
    assert evaluation["figures"] == pytest.approx(record["test"])
    low, high = evaluation["intervals"]["accuracy"]
    assert low < record["test"]["accuracy"] < high
    result = run("evaluate", tmp_path, "--split", "tset")
    assert result.exit_code == 2
    assert "split must be one of" in result.output

    # A finished run is shown again; results of other settings are not overwritten.
    result = run("train", "digits", *options)
    assert result.exit_code == 0, result.output
    assert "Finished before" in result.output
    for changed in (("--alpha", 9), ("--seed", 4)):
        result = run("train", "digits", *options, *changed)
        assert result.exit_code == 2
        assert "made with other settings" in " ".join(result.output.split())
    # Nor is an evaluation by one of other settings, or of other data of the same name.
    for changed in ((), ("--set", "training.batch_size=7")):
        assert run("evaluate", tmp_path, *changed).exit_code == 0
    names = {path.name for path in tmp_path.glob("evaluation-*")}
    assert names == {"evaluation-test.json", "evaluation-test-2.json"}
    assert json.loads((tmp_path / "evaluation-test.json").read_text()) == evaluation


@pytest.mark.long
def test_a_killed_training_goes_on_with_resume_alone(tmp_path):
    command, process, unfinished = start(tmp_path, "train", "unfinished")
    process.kill()
    process.wait(timeout=60)
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    before = (unfinished / "history.jsonl").read_text().splitlines()
    subprocess.run([*command, "--resume"], capture_output=True, check=True)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["steps"] == 200
    assert json.loads(before[0]) == record["history"][0]
    assert (tmp_path / "model" / "model.safetensors").exists()


def start(output, name="compare", work="unfinished/rdrop-seed0"):
    """Start the command in a group of processes of its own, until its first checkpoint."""
    command = [sys.executable, "-c", "from regdrop.cli import main; main()", name, "digits"]
    command += ["--steps", "200", "--output", str(output)]
    # Two workers have a thread each: other tests take the other core.
    further = ["--arms", "rdrop", "--seeds", "1", "--workers", "2"]
    command += further if name == "compare" else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    unfinished = output / work
    deadline = time.monotonic() + 120
    while not list(unfinished.glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.05)
    return command, process, unfinished


@pytest.mark.long
@pytest.mark.slow
def test_interrupting_and_repeating_the_command_goes_on(tmp_path):
    command, process, unfinished = start(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from here" in output
    assert not (tmp_path / "records").exists()
    before = (unfinished / "history.jsonl").read_text().splitlines()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "rdrop seed 0" in done.stdout
    (record,) = load_records(tmp_path)
    assert record.steps == 200
    assert json.loads(before[0]) == record.history[0]


@pytest.mark.long
def test_killing_the_command_ends_its_runs(tmp_path):
    _, process, _ = start(tmp_path)
    process.kill()
    process.wait(timeout=60)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not (tmp_path / "records").exists()


TUNE = ("tune", "digits", "--vary", "rdrop.alpha=1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "digit"), "TASK must be one of images, understanding, translation, "),
        (("compare", "digits", "--arms", "rdrop,magic"), "got magic"),
        (("compare", "digits", "--arms", "rdrop,"), "names of arms by commas, got 'rdrop,'"),
        (("compare", "digits", "--steps", 0), "Invalid value for '--steps': "),
        (("compare", "digits", "--output", ""), "Invalid value for '--output' / '-o'"),
        (("train", "digits", "--output", "/dev/null/x"), "'/dev/null/x' cannot be made a folder"),
        (("compare", "digits", "--set", "name=ptb-part"), "by the name of another preset"),
        (
            ("sweep", "alpha", "--task", "digits", "--alpha", 3),
            "has no effect in the study 'alpha'",
        ),
        (
            ("sweep", "alpha-schedules", "--task", "digits", "--set", "rdrop.alpha=3"),
            "--set rdrop.alpha=3 has no effect in the study 'alpha-schedules'",
        ),
        ((*TUNE, "--vary", "rdrop.alpha=3"), "varied once, got rdrop.alpha 2 times"),
        ((*TUNE, "--trials", 3), "--trials 3 is of a search in ranges"),
        ((*TUNE, "--storage", "sqlite:///x"), "--storage sqlite:///x is of a search in ranges"),
        ((*TUNE, "--study", "alpha"), "rdrop.alpha must not be varied for alpha-1"),
        (("compare", "digits", "--executor", "ray://n:1"), "must be dask://HOST:PORT"),
        (
            ("compare", "digits", "--executor", "dask://n:1", "--workers", 2),
            "a cluster has its own",
        ),
        (("sweep", "cost", "--task", "digits", "--executor", "n:1"), "must be dask://HOST:PORT"),
        ((*TUNE, "--executor", "dask://n"), "must be dask://HOST:PORT"),
        (("compare", "digits", "--alpha", "-1"), "alpha must be finite and at least 0"),
        (("train", "digits", "--alpha", "ramp"), "alpha must be a number or auto, got 'ramp'"),
        (
            ("train", "digits", "--alpha", "auto", "--set", "rdrop.alpha_warmup_steps=9"),
            "it excludes alpha_warmup_steps=9",
        ),
        (("train", "digits", "--arm", "magic"), "arm must be one of baseline"),
        (("train", "translation", "--preset", "x"), "preset of 'translation' must be one of"),
        (("train", "digits", "--set", "dropout"), "a setting must be name=value"),
        (("train", "digits", "--set", "rdrop.beta=1"), "has no setting 'beta'"),
        (("train", "digits", "--set", "dropout.x=1"), "setting 'dropout' has no parts"),
        (("train", "translation", "--data", "./nowhere"), "there is no folder './nowhere'"),
        (("evaluate", "nowhere"), "must be the folder of a finished run"),
        (("generate", "nowhere"), "must be the folder of a finished run"),
        (("prepare", "iwslt99", "a", "b"), "SET must be iwslt14"),
        (("prepare", "iwslt14", "nowhere.tgz", "b"), "nowhere.tgz cannot be read"),
        (("report", "/nowhere"), "no records in"),
        (("sweep", "alphas", "--task", "digits"), "STUDY must be one of alpha, every-n-steps"),
        (("sweep", "alpha", "--task", "digits", "--grid", "1,x"), "--grid must be numbers"),
        (("tune", "digits", "--vary", "dropout=1"), "a variation must be rdrop.NAME="),
        ((*TUNE, "--grid", "2"), "got --study compare"),
        (
            (*TUNE, "--study", "every-n-steps", "--grid", "2", "--arms", "every-3"),
            "arms must be among baseline, every-2, every-2-rescaled; got every-3",
        ),
        (("compare", "digits", "--tuned", "x.json"), "x.json is not a file of `regdrop tune`"),
        (("sweep", "cost", "--task", "digits", "--grid", "1"), "takes no grid"),
        (("sweep", "alpha", "--task", "digits", "--arms", "rdrop"), "arms must be among alpha-0"),
        (("doctor", "nowhere:nothing"), "cannot be imported"),
        (("doctor", "math:sqrt2"), "cannot be imported"),
        (("doctor", "x", "--rdrop", "alpha"), "--rdrop must be name=value"),
        (("doctor", "x", "--rdrop", "beta=1"), "RDropConfig has no option"),
        (("doctor", "x", "--rdrop", "alhpa=1"), "did you mean 'alpha'?"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert message in text
    assert not list(tmp_path.iterdir())


def test_doctor_on_a_saved_model(tmp_path):
    tiny_bert(dropout=0.15).save_pretrained(tmp_path)
    result = run("doctor", tmp_path, "--rdrop", "alpha=2,backward_passes=1")
    assert result.exit_code == 0, result.output
    assert "BertForSequenceClassification: sources of dropout" in result.output
    assert "0.15" in result.output
    assert "about 1.33 single-pass steps" in result.output


def test_doctor_takes_lists_among_the_options_of_rdrop(tmp_path):
    tiny_bert(dropout=0.15).save_pretrained(tmp_path)
    rates = "passes=sequential,dropout_rates=[0.1, 0.3],class_weight=[1,2],alpha=2"
    result = run("doctor", tmp_path, "--rdrop", rates)
    assert result.exit_code == 0, result.output
    assert "about 2.00 single-pass steps" in result.output


def test_doctor_says_in_a_line_why_it_cannot_tell_the_cost(tmp_path, monkeypatch):
    def refuse(config):
        raise ValueError("no cost")

    monkeypatch.setattr("regdrop.diagnostics.expected_cost", refuse)
    tiny_bert().save_pretrained(tmp_path)
    result = run("doctor", tmp_path)
    assert (result.exit_code, type(result.exception)) == (2, SystemExit)
    assert "no cost" in result.output


def test_doctor_names_what_could_be_computed_once(tmp_path):
    tiny_bert(dropout=0.0, classifier_dropout=0.3).save_pretrained(tmp_path / "bert")
    tiny_vit(dropout=0.3).save_pretrained(tmp_path / "vit")
    tiny_bert(dropout=0.3).save_pretrained(tmp_path / "none")
    for name, line in {
        "bert": r"share_prefix\(model, until='bert'\) computes 9\d % of the forward once",
        "vit": r"share_prefix\(model, until='vit\.embeddings\.patch_embeddings.*'\) computes",
        "none": "Nothing worth it before the first dropout could be computed once",
    }.items():
        result = run("doctor", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert re.search(line, " ".join(result.output.split())), result.output


def test_doctor_on_a_model_without_dropout_says_what_to_change(tmp_path):
    tiny_vit(dropout=0.0).save_pretrained(tmp_path)
    result = run("doctor", tmp_path)
    assert result.exit_code == 1
    assert "0 of" in result.output
    assert "Raise a dropout rate, now 0" in result.output


def test_doctor_on_the_model_of_a_script(tmp_path, monkeypatch):
    (tmp_path / "my_script.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3))\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    result = run("doctor", "my_script:build")
    assert result.exit_code == 0, result.output
    assert "0.3" in result.output
    assert "give some batches to regdrop.prefix_search.suggest_prefix" in " ".join(
        result.output.split()
    )
    result = run("doctor", "my_script:wrong")
    assert result.exit_code == 2
    assert "must return a torch.nn.Module, got int" in " ".join(result.output.split())
    assert str(tmp_path) not in sys.path


def test_a_script_keeps_the_path_that_it_adds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "adding_script.py").write_text(
        "import sys\nfrom torch import nn\nsys.path.insert(0, 'added')\nbuild = nn.Identity\n"
    )
    load_model("adding_script:build")
    assert "added" in sys.path
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            ModuleNotFoundError("No module named 'typer'", name="typer"),
            r"needs typer.*pip install 'regdrop\[tasks\]'",
        ),
        (KeyboardInterrupt(), "130"),
    ],
    ids=["extras", "interrupt"],
)
def test_the_command_that_cannot_load_says_why_in_a_line(monkeypatch, raised, said):
    from regdrop import cli

    monkeypatch.setitem(sys.modules, "regdrop.commands", None)
    monkeypatch.delitem(sys.modules, "typer", raising=False)

    class NoTyper:
        def find_spec(self, name, path=None, target=None):
            if name == "typer":
                raise raised

    for name in [name for name in sys.modules if name.startswith("regdrop.commands")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoTyper(), *sys.meta_path])
    with pytest.raises(SystemExit, match=said):
        cli.main()


def test_a_file_is_no_folder_of_results(tmp_path):
    (tmp_path / "file").touch()
    for command in (("train", "digits"), ("compare", "digits"), ("sweep", "alpha")):
        result = run(*command, "--output", tmp_path / "file")
        assert result.exit_code == 2
        assert "'--output'" in result.output


def test_the_name_of_an_output_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "mkdir", None)
    monkeypatch.setattr(os, "rmdir", None)
    (tmp_path / "gone").symlink_to("nowhere")
    assert output_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert output_folder(str(tmp_path)) == tmp_path
    with pytest.raises(typer.BadParameter, match=r"cannot be made a folder: .*gone is no folder"):
        output_folder(str(tmp_path / "gone" / "b"))
    with pytest.raises(typer.BadParameter, match="a folder's name must be Unicode"):
        output_folder(str(tmp_path / "\udc80"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(typer.BadParameter, match=r"a folder: .* cannot be written to"):
        output_folder(str(tmp_path / "a" / "b"))


def test_too_little_memory_is_said_in_a_line(tmp_path):
    options = ("--set", "rdrop.num_passes=1000000000000", "--output", tmp_path / "run")
    result = run("train", "digits", "--steps", 2, *options)
    assert result.exit_code == 1
    assert "Out of memory" in result.stderr
    assert "training.batch_size" in result.stderr


def test_too_little_memory_of_a_cpu_is_said_in_a_line(capsys):
    with pytest.raises(typer.Exit) as ended, usage_errors():
        torch.empty(10**16)
    assert ended.value.exit_code == 1
    assert "Out of memory (" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="another"), usage_errors():
        raise RuntimeError("another")


def test_whoever_ends_a_command_is_told_how_it_goes_on(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as ended, interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.exit_code == 128 + signal.SIGTERM
    assert "goes on from here" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_report_that_is_interrupted_goes_on_too(tmp_path, monkeypatch):
    monkeypatch.setattr(comparisons, "run_arms", lambda *arguments, **options: [])

    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparisons, "write_report", interrupt)
    result = run("compare", "digits", "--output", tmp_path)
    assert result.exit_code == 130
    assert "goes on from here" in result.output


def test_an_option_that_a_choice_would_override_is_named(tmp_path):
    path = tmp_path / "tuned.json"
    settings = {"rdrop.alpha": 0.5, "training.max_steps": 4}
    path.write_text(json.dumps({"study": "compare", "arms": {"rdrop": {"settings": settings}}}))
    for option in (
        ("--alpha", "5.0"),
        ("--steps", "2"),
        ("--set", "rdrop.alpha=5"),
    ):
        given = ("--arms", "rdrop", *option, "--tuned", path, "--output", tmp_path / "out")
        result = run("compare", "digits", *given)
        assert result.exit_code == 2
        text = " ".join(result.output.replace("│", " ").split())
        assert f"{option[0]} {option[1]} and --tuned" in text
    assert not (tmp_path / "out").exists()


def test_arms_made_from_other_settings_are_not_mixed(tmp_path, monkeypatch):
    def run_arms(task, arms, *, folder, **options):
        for arm in arms:
            config = resolved_config(task, arm)
            record = {
                "task": task.name,
                "arm": arm.name,
                "seed": 0,
                "config": config,
                "steps": 4,
                "seconds": 1.0,
                "peak_memory_mib": 1.0,
                "best_step": 2,
                "validation": {"nll": 0.5},
                "test": {"nll": 0.5},
                "history": [{"step": 2, "seconds": 0.5, "eval_nll": 0.5}],
                "versions": {},
                "hardware": {},
            }
            RunRecord(**record).save(record_path(folder, arm.name, 0))

    monkeypatch.setattr(comparisons, "run_arms", run_arms)
    monkeypatch.setattr(comparisons, "_report", lambda folder: None)
    options = ("--seeds", 1, "--output", tmp_path / "out")
    result = run("compare", "digits", "--arms", "rdrop", "--steps", 8, *options)
    assert result.exit_code == 0, result.output
    result = run("compare", "digits", "--arms", "baseline", "--steps", 4, *options)
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert "holds results of other settings (training.max_steps of rdrop)" in text
    result = run("compare", "digits", "--arms", "baseline", "--steps", 8, *options)
    assert result.exit_code == 0, result.output

    def run_beside(task, arms, **options):  # another command, of which nothing was to be seen
        run_arms(PRESETS["digits"], [build_arms(PRESETS["digits"])["alpha-0"]], **options)
        run_arms(task, arms, **options)

    monkeypatch.setattr(comparisons, "run_arms", run_beside)
    result = run("compare", "digits", "--arms", "baseline", "--steps", 8, *options)
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert "holds results of other settings (training.max_steps of alpha-0)" in text


def test_a_choice_for_the_seeds_of_a_comparison_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(comparisons, "_train_and_report", lambda *rest: None)
    path = tmp_path / "tuned.json"
    own = {"settings": {"rdrop.alpha": 0.5}, "validation": 0.5, "tried": 1, "seeds": [3]}
    content = {"study": "compare", "task": "digits", "steps": 600, "arms": {"rdrop": own}}
    path.write_text(json.dumps(content))
    result = run("compare", "digits", "--arms", "rdrop", "--tuned", path)
    assert result.exit_code == 0, result.output
    assert "The seed 3 is among those by which" in " ".join(result.output.split())


def test_an_arm_that_diverges_leaves_the_choice_of_the_others(tmp_path, monkeypatch):
    def diverge(*rest, **options):
        chosen = {"baseline": TunedArm({"training.learning_rate": 0.1}, 0.5, 2, (100,))}
        raise NoFiniteFigureError(["rdrop"], chosen)

    monkeypatch.setattr(tuning, "run_tuning", diverge)
    vary = ("--vary", "training.learning_rate=0.1,1000", "--arms", "baseline,rdrop")
    result = run("tune", "digits", *vary, "--output", tmp_path)
    assert result.exit_code == 2
    assert "no setting of rdrop" in " ".join(result.output.split())
    assert list(json.loads((tmp_path / "tuned.json").read_text())["arms"]) == ["baseline"]


def test_where_nothing_ends_finite_no_choice_is_written(tmp_path, monkeypatch):
    def diverge(*rest, **options):
        raise NoFiniteFigureError(["rdrop"], {"alpha-0": TunedArm()})

    monkeypatch.setattr(tuning, "run_tuning", diverge)
    vary = ("--vary", "rdrop.alpha=1,1000", "--arms", "alpha-0,rdrop")
    result = run("tune", "digits", *vary, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
