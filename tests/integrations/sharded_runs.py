"""Two processes of the Trainer on a CPU, by whatever distributes them: what it logs and learns."""

import torch

import training
from models import key_dropout, text_rows, tiny_bert, tiny_gpt2, token_rows
from processes import run_in_two_processes
from regdrop import RDropConfig

MODELS = {
    "bert": (tiny_bert, text_rows, "BertLayer"),
    "gpt2": (tiny_gpt2, token_rows, "GPT2Block"),
}


def build(folder, name, rdrop=None, **options):
    """Return a trainer whose update is the gradient, and whose masks are keyed by sample."""
    model, rows, _ = MODELS[name]
    defaults = {
        "learning_rate": 0.03,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    rdrop = RDropConfig(alpha=3.0) if rdrop is None else rdrop
    model = key_dropout(model(3, dropout=0.3))
    return training.build(folder, model, rows(16), rdrop, **{**defaults, **options})


def result(trainer):
    """Train, and return the logged parts of every step and the whole parameters."""
    trainer.train()
    return training.outcome(trainer, ("loss", "nll", "kl"))


def _worker(rank, folder, run, args):
    found = run(folder, *args)
    if rank == 0:
        torch.save(found, folder / "result.pt")


def in_two_processes(folder, run, *args):
    """Return what `run(folder, *args)` returns in the first of two processes."""
    run_in_two_processes(_worker, folder, run, args)
    return torch.load(folder / "result.pt", weights_only=False)


def in_one_process(folder, name, rdrop=None):
    """Run the same items in one process, as DDP in two does (`test_invariance.py`)."""
    return result(build(folder, name, rdrop, per_device_train_batch_size=4))


def assert_same(found, expected, tolerance=1e-5):
    """Assert that two runs logged and learned the same."""
    assert len(expected.logs["kl"]) == 3
    training.assert_same_outcome(found, expected, rtol=tolerance, atol=tolerance, least_kl=1e-3)
