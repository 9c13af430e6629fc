"""The processes that compute runs on this machine."""

import multiprocessing
import time

import pytest

from regdrop.experiments.running.engine import WorkerLostError
from regdrop.experiments.running.local_engine import open_processes


def test_an_interrupted_engine_ends_its_own_processes_and_no_others():
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    other.start()
    try:
        with open_processes(1, 1) as engine:
            future = engine.pool.submit(time.sleep, 600)
            while multiprocessing.active_children() == [other]:
                time.sleep(0.05)
            engine.stop()
            assert multiprocessing.active_children() == [other]
            with pytest.raises(WorkerLostError):
                future.result(timeout=60)
    finally:
        other.terminate()
        other.join()
