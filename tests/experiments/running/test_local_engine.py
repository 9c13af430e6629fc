"""The processes that compute runs on this machine."""

import multiprocessing
import time

import pytest

from regdrop.experiments.running.engine import WorkerLostError
from regdrop.experiments.running.local_engine import open_processes


def test_an_interrupted_engine_ends_its_own_processes_and_no_others(tmp_path):
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    other.start()
    try:
        with open_processes(1, 1) as engine:
            begun = tmp_path / "begun"
            run = f"import time; open({str(begun)!r}, 'w').close(); time.sleep(600)"
            future = engine.pool.submit(exec, run)
            while not begun.exists():
                time.sleep(0.05)
            engine.stop()
            # One that has ended is listed until the thread that saw it end has noted that.
            until = time.monotonic() + 10
            while multiprocessing.active_children() != [other] and time.monotonic() < until:
                time.sleep(0.05)
            assert multiprocessing.active_children() == [other]
            with pytest.raises(WorkerLostError):
                future.result(timeout=60)
    finally:
        other.terminate()
        other.join()


def test_ctrl_c_is_left_to_the_command_that_ends_its_processes():
    """A terminal sends it to all of them."""
    with open_processes(1, 1) as engine:
        run = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
        assert engine.pool.submit(exec, run).result(timeout=120) is None
