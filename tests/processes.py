"""Two processes of one run on a CPU, as torchrun starts them."""

import os
import socket
import sys

import torch


def run_in_two_processes(run, *args):
    """Call `run(rank, *args)` in both; it has to leave its result in a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_work, (port, run, args), nprocs=2)


def _work(rank, port, run, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    run(rank, *args)
    # Without an end of the interpreter: DDP's reducer that is freed there may wait for ever for a
    # thread of gloo that waits for Python's lock (torch 2.13).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
