from dataclasses import replace

import pytest

from regdrop.experiments import RunRecord
from regdrop.tasks.image_classification import DIGITS

SHORT = replace(
    DIGITS,
    name="short",
    training=replace(DIGITS.training, max_steps=6, eval_steps=2, logging_steps=1),
    model_config={**DIGITS.model_config, "num_hidden_layers": 1, "hidden_size": 16},
)


@pytest.fixture
def short():
    """The digits task, a moment long."""
    return SHORT


def make_record(arm="baseline", seed=0, accuracy=0.9, nll=0.3, seconds=10.0, **changes):
    history = [
        {"step": step, "seconds": seconds * step / 4, "nll": 1.0 / step, "kl": 0.1 / step}
        for step in (1, 2, 3, 4)
    ] + [
        {"step": step, "seconds": seconds * step / 4, "eval_accuracy": accuracy, "eval_nll": nll}
        for step in (2, 4)
    ]
    record = {
        "task": "digits",
        "arm": arm,
        "seed": seed,
        "config": {"description": "a test"},
        "steps": 4,
        "seconds": seconds,
        "peak_memory_mib": 100.0,
        "best_step": 2,
        "validation": {"accuracy": accuracy, "nll": nll},
        "test": {"accuracy": accuracy, "nll": nll},
        "history": history,
        "versions": {"torch": "2.13.0"},
        "hardware": {"cores": 2},
    }
    return RunRecord(**{**record, **changes})


@pytest.fixture
def record():
    """Make records by hand."""
    return make_record
