"""What a run costs, counted in single-pass steps of the baseline."""

from regdrop.config import RDropConfig
from regdrop.diagnostics import expected_cost
from regdrop.experiments.record import RunRecord


def run_cost(record: RunRecord, baseline_steps: int | None = None) -> float:
    """Return the cost of a run in times of one pass a step, over as many steps as the baseline's.

    A count of operations, not a measurement: see `expected_cost`. Steps before `start_step` cost
    one pass.

    Args:
        record: The run.
        baseline_steps: Steps of the baseline; None for as many as the run has.
    """
    config = RDropConfig.from_dict(record.config.get("rdrop", {}))
    before = min(config.start_step, record.steps)
    steps = before + (record.steps - before) * expected_cost(config)
    return steps / (baseline_steps or record.steps)
