"""What a run costs, counted in single-pass steps of the baseline."""

from dataclasses import replace

from regdrop.config import RDropConfig
from regdrop.cost import expected_cost
from regdrop.experiments.recording.record import RunRecord


def run_cost(record: RunRecord, baseline: RunRecord | None = None) -> float:
    """Return the cost of a run in times of one pass a step, over as many steps as the baseline's.

    A count of operations, not a measurement: see `expected_cost`. A smaller batch costs its share.

    Args:
        record: The run.
        baseline: That of the baseline; None for one of as many steps and the same batch.
    """
    config = RDropConfig.from_dict(record.config.get("rdrop", {}))
    steps = _mean_step_cost(config, record) * record.steps
    if baseline is None:
        return steps / record.steps
    return steps / baseline.steps * _batch_size(record) / _batch_size(baseline)


def _mean_step_cost(config: RDropConfig, record: RunRecord) -> float:
    if config.single_pass_below is not None and config.alpha_rule != "ramp":
        # What a rule did is known afterwards alone.
        full = expected_cost(replace(config, every_n_steps=1))
        further = (_logged_passes(record) - 1) / (config.num_passes - 1)
        return 1 + further * (full - 1)
    return expected_cost(config, record.steps)


def _logged_passes(record: RunRecord) -> float:
    """Return the mean number of passes, as the logs of a run tell it."""
    done, passes = 0.0, 0.0
    for entry in record.history:
        if "passes" in entry:
            passes += entry["passes"] * (entry["step"] - done)
            done = entry["step"]
    if not done:
        raise ValueError(
            f"the history of {record.arm} must tell the passes of its steps; it has no 'passes'"
        )
    return passes / done


def _batch_size(record: RunRecord) -> float:
    size: float = record.config.get("training", {}).get("batch_size", 1)
    return size
