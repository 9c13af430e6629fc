"""What a run costs, counted in single-pass steps of the baseline."""

from regdrop.config import RDropConfig
from regdrop.diagnostics import expected_cost
from regdrop.experiments.record import RunRecord


def run_cost(record: RunRecord, baseline: RunRecord | None = None) -> float:
    """Return the cost of a run in times of one pass a step, over as many steps as the baseline's.

    A count of operations, not a measurement: see `expected_cost`. Steps before `start_step` cost
    one pass, and a smaller batch its share.

    Args:
        record: The run.
        baseline: That of the baseline; None for one of as many steps and the same batch.
    """
    config = RDropConfig.from_dict(record.config.get("rdrop", {}))
    before = min(config.start_step, record.steps)
    steps = before + (record.steps - before) * expected_cost(config)
    if baseline is None:
        return steps / record.steps
    return steps / baseline.steps * _batch_size(record) / _batch_size(baseline)


def _batch_size(record: RunRecord) -> float:
    size: float = record.config.get("training", {}).get("batch_size", 1)
    return size
