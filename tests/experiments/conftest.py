from dataclasses import replace

import pytest

from regdrop.experiments import RunRecord, build_arms
from regdrop.experiments.recording.settings import resolved_config
from regdrop.tasks.images.presets import DIGITS

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


@pytest.fixture
def records(record):
    accuracies = {
        "rdrop": [0.93, 0.94, 0.95],
        "baseline": [0.90, 0.92, 0.91],
        "baseline-2x": [0.91, 0.92, 0.93],
    }
    seconds = {"rdrop": 15.0, "baseline": 10.0, "baseline-2x": 20.0}
    return [
        record(arm, seed, value, nll=1 - value, seconds=seconds[arm])
        for arm, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


@pytest.fixture
def with_examples(record, short):
    """Return records of two arms over two seeds, R-Drop's right on one more of four examples."""

    def make(arm, seed, right):
        rows = [[1, float(i < right), 0.5] for i in range(4)] * 100
        config = resolved_config(short, build_arms(short)[arm])
        return record(arm, seed, right / 4, nll=0.5, config=config, examples={"test": rows})

    return [make(arm, seed, r) for arm, r in (("baseline", 2), ("rdrop", 3)) for seed in (0, 1)]
