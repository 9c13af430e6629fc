import io
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from rich.console import Console

from regdrop.commands.live_display import LiveDisplay
from regdrop.commands.tables import print_table
from regdrop.experiments import build_arms, compared_arms, run_arm, run_arms
from regdrop.experiments.arms import optional_arms
from regdrop.experiments.recording.record import record_path
from regdrop.experiments.recording.settings import resolved_config
from regdrop.experiments.running.progress import Update
from regdrop.experiments.running.runner import _check_records


class Noted:
    """Notes what a display is told."""

    def __init__(self):
        self.updates, self.finished, self.said = [], [], []

    def update(self, update):
        self.updates.append(update)

    def finish(self, record):
        self.finished.append((record.arm, record.seed))

    def say(self, text):
        self.said.append(text)


@pytest.mark.slow
def test_arms_and_seeds_in_parallel_and_what_is_missing_later(tmp_path, short):
    display = Noted()
    options = {"folder": tmp_path, "workers": 2, "threads": 1}
    arms = compared_arms(short, ["baseline", "rdrop"])
    first = run_arms(short, arms, seeds=[0, 1], display=display, **options)
    runs = {(arm, seed) for arm in ("baseline", "rdrop") for seed in (0, 1)}
    assert {(record.arm, record.seed) for record in first} == runs == set(display.finished)
    assert {(update.arm, update.seed) for update in display.updates} == runs
    assert all(record.hardware["threads"] == 1 for record in first)
    # The result of a run does not depend on what runs beside it.
    alone = run_arm(short, build_arms(short)["rdrop"], 1, tmp_path / "alone")
    beside = next(r for r in first if (r.arm, r.seed) == ("rdrop", 1))
    assert alone.test["nll"] == pytest.approx(beside.test["nll"], rel=1e-5)

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    display = Noted()
    run_arms(short, arms[1:], seeds=[1, 2], display=display, **options)
    assert {update.seed for update in display.updates} == {2}
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert record_path(tmp_path, "rdrop", 2).exists()


@pytest.mark.slow
def test_an_error_in_a_run_reaches_the_caller(tmp_path, short):
    changed = replace(short, dataset=str(tmp_path / "nowhere"))
    with pytest.raises(Exception, match="nowhere"):
        run_arms(changed, compared_arms(changed, ["baseline"]), seeds=[0], folder=tmp_path)


@pytest.mark.long
def test_a_run_beside_one_that_fails_is_brought_to_its_end(tmp_path, short):
    good = build_arms(short)["baseline"]
    bad = replace(good, name="bad", rdrop=replace(good.rdrop, class_weight=(1.0,)))
    with pytest.raises(ValueError, match="class_weight must have one entry"):
        run_arms(short, [bad, good], seeds=[0], folder=tmp_path, workers=2, threads=1)
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["baseline-seed0.json"]


@pytest.mark.long
def test_two_commands_share_the_runs_of_a_comparison(tmp_path, short):
    arms = [build_arms(short)[name] for name in ("baseline", "rdrop", "rdrop-one-backward")]
    alone = run_arms(short, arms, seeds=[0], folder=tmp_path / "alone")
    displays = [Noted(), Noted()]
    with ThreadPoolExecutor() as pool:
        both = [
            pool.submit(
                run_arms,
                short,
                arms,
                seeds=[0],
                folder=tmp_path / "out",
                threads=1,
                display=display,
            )
            for display in displays
        ]
        found = [future.result() for future in both]
    assert [r.test for r in found[0]] == [r.test for r in found[1]] == [r.test for r in alone]
    # Each run was trained by one of them, and told to both.
    steps = [{u.arm for u in display.updates if u.step > 0} for display in displays]
    assert not steps[0] & steps[1]
    assert steps[0] | steps[1] == {arm.name for arm in arms}
    assert all(len(display.finished) == 3 for display in displays)
    assert not (tmp_path / "out" / "unfinished").exists()


@pytest.mark.long
def test_a_killed_process_takes_its_own_run_and_no_other(tmp_path, short):
    class Kills(Noted):
        """Kills the process of the first run that has come to a step."""

        def update(self, update):
            if update.step == 1 and not self.said:
                self.killed = update.arm
                for process in multiprocessing.active_children():
                    os.kill(process.pid, signal.SIGKILL)

    arms = [build_arms(short)[name] for name in ("baseline", "rdrop")]
    display = Kills()
    with pytest.raises(ValueError, match=r" seed 0: its process was killed; .* goes on from here"):
        run_arms(short, arms, seeds=[0], folder=tmp_path, threads=1, display=display)
    (other,) = {arm.name for arm in arms} - {display.killed}
    assert [path.name for path in (tmp_path / "records").iterdir()] == [f"{other}-seed0.json"]
    assert display.finished == [(other, 0)]
    assert len(run_arms(short, arms, seeds=[0], folder=tmp_path, threads=1)) == 2


def test_what_is_asked_for_comes_back_and_no_other_records_of_the_folder(tmp_path, short, record):
    arms = build_arms(short)
    for name in ("baseline", "rdrop", "alpha-0"):
        for seed in range(3):
            config = resolved_config(short, arms[name])
            record(name, seed, config=config).save(record_path(tmp_path, name, seed))
    asked = [arms["baseline"], arms["rdrop"]]
    found = run_arms(short, asked, seeds=[2, 0], folder=tmp_path)
    assert {(r.arm, r.seed) for r in found} == {
        (name, seed) for name in ("baseline", "rdrop") for seed in (0, 2)
    }
    assert len(list((tmp_path / "records").iterdir())) == 9


def test_arms_with_dropout_and_batches_of_their_own_share_a_folder(tmp_path, short, record):
    for name, arm in optional_arms(short).items():
        record(name, config=resolved_config(short, arm)).save(record_path(tmp_path, name, 0))
    arms = [build_arms(short)["baseline"], optional_arms(short)["matched-dropout"]]
    configs = {arm.name: resolved_config(short, arm) for arm in arms}
    assert set(_check_records(tmp_path, configs)) == {(name, 0) for name in optional_arms(short)}


def test_records_of_other_settings_that_come_meanwhile_are_refused(tmp_path, short, record):
    """As those of a command that began at the same moment, when there was nothing to see of it."""
    arms = build_arms(short)

    def save(task, name):
        config = resolved_config(task, arms[name])
        record(name, config=config).save(record_path(tmp_path, name, 0))

    class Meanwhile(Noted):
        def finish(self, record):
            save(replace(short, model_config={}), "alpha-0")

    save(short, "baseline")
    asked = {"seeds": [0], "folder": tmp_path, "display": Meanwhile()}
    with pytest.raises(ValueError, match=r"alpha-0-seed0.json was made with other settings"):
        run_arms(short, [arms["baseline"]], **asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "seeds must be different numbers, at least one"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"seeds": [0], "arms": ["rdrop", "magic"]}, "arms must be among .* got magic"),
        ({"seeds": [0], "workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(tmp_path, short, options, message):
    options = dict(options)
    arms = options.pop("arms", None)
    with pytest.raises(ValueError, match=message):
        run_arms(short, compared_arms(short, arms), folder=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_old_name_of_a_comparison_warns(tmp_path, short):
    with pytest.warns(DeprecationWarning, match="run_arms"):
        from regdrop.experiments import compare
    with pytest.raises(ValueError, match="seeds must be different numbers, at least one"):
        compare(short, seeds=[], folder=tmp_path)


def test_live_display_shows_every_arm_its_steps_and_its_metrics(short, record):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=140)
    arms = [build_arms(short)[name] for name in ("baseline", "rdrop")]
    with LiveDisplay(arms, [0, 1], console) as display:
        display.update(Update("rdrop", 1, 4, {"eval_accuracy": 0.5, "eval_loss": 1.0, "kl": 2.0}))
        display.update(Update("rdrop", 1, 2, {}))  # updates may come late
        display.finish(record("baseline", 0, steps=6))
    text = stream.getvalue()
    assert " 4/12" in text
    assert " 6/12" in text
    assert "seed 1: accuracy 0.500" in text


def test_without_a_terminal_finished_runs_are_lines(short, record):
    stream = io.StringIO()
    with LiveDisplay([build_arms(short)["rdrop"]], [0], Console(file=stream)) as display:
        display.update(Update("rdrop", 0, 4, {"eval_accuracy": 0.5}))
        display.finish(record("rdrop", 0, 0.75, 0.5, steps=6))
    assert stream.getvalue() == "rdrop seed 0: validation accuracy 0.750 nll 0.500\n"


def test_table_is_never_cut(record):
    stream = io.StringIO()
    figures = {f"{name}_accuracy": 0.95 for name in ("far", "further", "still further", "last")}
    arms = [record(), record("rdrop", 0, 0.95)]
    wide = [replace(one, test={**one.test, **figures}) for one in arms]
    print_table(wide, Console(file=stream, width=40))
    assert "95.00 (+5.00)" in stream.getvalue()
    assert "…" not in stream.getvalue()
