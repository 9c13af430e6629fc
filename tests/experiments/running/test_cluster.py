import os
import signal
import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from regdrop.experiments import build_arms, run_arm, run_arms
from regdrop.experiments.recording.ownership import hold
from regdrop.experiments.running import cluster
from regdrop.experiments.running.cluster import parse_address
from regdrop.experiments.running.run import RunPaths


@pytest.mark.parametrize(
    ("executor", "address"),
    [
        ("dask://node-1:8786", "tcp://node-1:8786"),
        ("dask://127.0.0.1:80/", "tcp://127.0.0.1:80"),
        ("dask://[::1]:8786", "tcp://[::1]:8786"),
    ],
)
def test_addresses(executor, address):
    assert parse_address(executor) == address


@pytest.mark.parametrize(
    "executor",
    [
        "ray://node:8786",
        "tcp://node:8786",
        "node:8786",
        "dask://node",
        "dask://:1",
        "dask://n:x",
        "dask://n:99999",
        "dask://n:1/x",
        "",
    ],
)
def test_other_addresses_are_refused_before_anything_is_written(tmp_path, short, executor):
    arms = [build_arms(short)["baseline"]]
    with pytest.raises(ValueError, match=r"must be dask://HOST:PORT, .* got .*leave it out"):
        run_arms(short, arms, seeds=[0], folder=tmp_path / "out", executor=executor)
    assert not (tmp_path / "out").exists()


def test_an_address_where_nobody_answers_is_named(tmp_path):
    pytest.importorskip("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        executor = f"dask://127.0.0.1:{free.getsockname()[1]}"
        with (
            pytest.raises(ValueError, match=rf"{executor}: no Dask scheduler answers there"),
            cluster.open_cluster(executor, tmp_path / "out", connect_seconds=0.5),
        ):
            pass
    assert not (tmp_path / "out").exists()


def test_without_dask_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with (
        pytest.raises(ValueError, match=r"pip install 'regdrop\[cluster\]'"),
        cluster.open_cluster("dask://n:1", tmp_path),
    ):
        pass


class Client:
    """A cluster of two workers, of which one has its own threads, version or disk."""

    def __init__(self, **changes):
        self.changes = changes

    def run(self, look, paths):
        assert all(os.path.exists(path) for path in paths)
        own = cluster._Place(1, cluster.version("regdrop"), [])
        return {"tcp://a": own, "tcp://b": own._replace(**self.changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 4}, "workers tcp://b must do one run at a time: start them with --nthreads 1"),
        ({"version": "none"}, "workers tcp://b must have regdrop"),
        (
            {"missing": ["/x"]},
            "workers tcp://b must see the folders .*out.* that all machines share",
        ),
    ],
)
def test_workers_that_cannot_be_used_are_named(tmp_path, changes, message):
    folder = tmp_path / "new" / "out"
    with pytest.raises(ValueError, match=message):
        cluster._check_workers(Client(**changes), "dask://n:1", folder)
    assert not (tmp_path / "new").exists()
    cluster._check_workers(Client(), "dask://n:1", tmp_path)
    assert not list(tmp_path.iterdir())


class Noted:
    """Notes the steps that a display is told, and does something once when one is reached."""

    def __init__(self, step, act):
        self.step, self.act = step, act
        self.steps, self.finished = {}, []

    def update(self, update):
        self.steps.setdefault(update.arm, []).append(update.step)
        if self.act is not None and update.step >= self.step:
            act, self.act = self.act, None
            act()

    def finish(self, record):
        self.finished.append(record.arm)

    def say(self, text):
        """Show nothing."""


def interrupt():
    raise KeyboardInterrupt


def look(dask_worker):
    """Return the process of a worker and the states of its runs."""
    return os.getpid(), [task.state for task in dask_worker.state.tasks.values()]


def wait_until_idle(client):
    end = time.monotonic() + 60
    while any(states for _, states in client.run(look).values()):
        assert time.monotonic() < end
        time.sleep(0.1)


class LetsGo(Noted):
    """Lets go of what is held once the command says that it waits for it."""

    def __init__(self, held):
        super().__init__(0, None)
        self.held, self.said = held, []

    def say(self, text):
        self.said.append((text, sorted(self.finished)))
        self.held.close()


@pytest.mark.long
def test_a_run_that_another_process_is_at_work_on_is_waited_for_on_a_cluster_too(tmp_path, short):
    distributed = pytest.importorskip("distributed")
    arm = build_arms(short)["baseline"]
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        ) as local,
        ExitStack() as held,
    ):
        held.enter_context(hold(RunPaths.compared(tmp_path, arm.name, 0).lock, "the run"))
        display = LetsGo(held)
        executor = local.scheduler_address.replace("tcp", "dask")
        (record,) = run_arms(
            short, [arm], seeds=[0], folder=tmp_path, executor=executor, display=display
        )
    ((text, finished),) = display.said
    assert f"at work in process {os.getpid()} on " in text
    assert text.endswith(": waiting for it")
    assert finished == []
    assert record.steps == short.training.max_steps


@pytest.mark.long
@pytest.mark.slow
def test_a_study_on_a_cluster_survives_ctrl_c_and_a_killed_worker(tmp_path, short, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    training = replace(short.training, max_steps=60, eval_steps=10, logging_steps=2)
    task = replace(short, training=training)
    arms = [build_arms(task)[name] for name in ("baseline", "rdrop")]
    out = Path("out")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        ) as local,
        distributed.Client(local, set_as_default=False) as client,
    ):
        executor = local.scheduler_address.replace("tcp", "dask")
        options = {"seeds": [0], "folder": out, "executor": executor}

        # Ctrl-C: what runs stops soon after, before its end.
        with pytest.raises(KeyboardInterrupt):
            run_arms(task, arms, display=Noted(14, interrupt), **options)
        wait_until_idle(client)
        assert not list(out.glob("records/*"))
        assert not list(out.glob("unfinished/*/checkpoint-60"))
        interrupted = {path.parent.name for path in out.glob("unfinished/*/checkpoint-*")}
        assert interrupted

        def kill():
            pid = next(pid for pid, states in client.run(look).values() if "executing" in states)
            os.kill(pid, signal.SIGKILL)

        # The same command goes on, though a worker dies.
        display = Noted(40, kill)
        records = run_arms(task, arms, display=display, **options)
    assert display.act is None
    assert sorted(display.finished) == ["baseline", "rdrop"]
    # One run was begun twice, and went on from a checkpoint.
    begun = {arm: steps.count(0) for arm, steps in display.steps.items()}
    assert sorted(begun.values()) == [1, 2]
    (again,) = [arm for arm, count in begun.items() if count == 2]
    last = len(display.steps[again]) - display.steps[again][::-1].index(0)
    assert display.steps[again][last] > 2
    # So had those that Ctrl-C stopped.
    for work in interrupted:
        steps = display.steps[work.removesuffix("-seed0")]
        assert next(step for step in steps if step) > 2
    assert not (out / "unfinished").exists()
    alone = [run_arm(task, arm, 0, tmp_path / "alone") for arm in arms]
    for record, other in zip(records, alone, strict=True):
        assert record.test == pytest.approx(other.test, rel=1e-5)
        assert [e["step"] for e in record.history] == [e["step"] for e in other.history]
