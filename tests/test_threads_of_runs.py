"""How many runs a command does at a time, and with how many threads each."""

import os

import pytest
import torch

from regdrop.commands.app import workers_and_threads


@pytest.mark.parametrize(
    ("workers", "runs", "own", "expected"),
    [
        (None, None, 8, (8, 1)),
        (None, 3, 8, (3, 2)),
        (2, 20, 8, (2, 4)),
        (1, 20, 8, (1, 8)),
        (1, 20, 1, (1, 1)),  # OMP_NUM_THREADS=1
        (2, 20, 3, (2, 3)),
        (16, 20, 8, (16, 1)),
    ],
)
def test_cores_are_shared_among_runs_up_to_the_threads_of_the_command(
    monkeypatch, workers, runs, own, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: own)
    assert workers_and_threads(workers, runs) == expected
