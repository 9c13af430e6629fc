"""A comparison in one sentence: what R-Drop gained, and at what cost."""

from collections.abc import Sequence

from regdrop.experiments.arms import BASELINE, TWO_PASSES
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.reporting.tables import build_rows, find_metrics
from regdrop.experiments.statistics import Estimate, paired_difference
from regdrop.tasks import Metric

_METHOD = "rdrop"
# What else could have gained as much, in plain words.
_CONTROLS = {
    "baseline-2x": "twice the updates",
    TWO_PASSES: "two passes without the KL",
    "matched-dropout": "more dropout",
}


def verdict(records: Sequence[RunRecord]) -> str | None:
    """Return what R-Drop gained by the first test figure, and at what cost.

    Only seeds count that both R-Drop and the baseline have. A difference is clear if its 95 %
    interval over seeds excludes 0.

    Args:
        records: Runs of one task.

    Returns:
        One sentence; None where there are no such seeds.
    """
    trained = {(record.arm, record.seed) for record in records}
    common = {seed for arm, seed in trained if arm == _METHOD and (BASELINE, seed) in trained}
    if not common:
        return None
    records = [record for record in records if record.seed in common]
    name, metric = next(iter(find_metrics(records).items()))
    rows = {row.arm: row for row in build_rows(records)}
    gain = rows[_METHOD].cells[name].difference
    assert gain is not None
    title = f"test {metric.title}"
    before, after = (metric.format(rows[a].cells[name].value.mean) for a in (BASELINE, _METHOD))
    cost = f"training takes {rows[_METHOD].time:.1f} times as long, prediction no longer."
    if gain.seeds == 1:
        return (
            f"R-Drop's {title} is {after} where the baseline's is {before}, and one seed cannot "
            f"tell whether that is chance; {cost}"
        )
    size = (
        f"{metric.format(abs(gain.mean))} ± {metric.format(gain.half_width)} "
        f"(95 % interval over {gain.seeds} seeds)"
    )
    if not _is_gain(gain, metric):
        result = "is clearly worse" if gain.excludes_zero else "shows no clear gain"
        return (
            f"R-Drop {result} here: its {title} is {after} where the baseline's is {before}, a "
            f"difference of {size}; {cost}"
        )
    verb = "raises" if metric.greater_is_better else "lowers"
    text = f"R-Drop {verb} the {title} from {before} to {after}, by {size}"
    beaten: list[str] = []
    others: list[str] = []
    values = {arm: {r.seed: r.test[name] for r in records if r.arm == arm} for arm in rows}
    for arm, words in _CONTROLS.items():
        if arm in values:
            difference = paired_difference(values[_METHOD], values[arm])
            (beaten if _is_gain(difference, metric) else others).append(words)
    if beaten:
        text += f", and is clearly better than {_joined(beaten)}"
    if others:
        text += f", but not clearly better than {_joined(others)}"
    return f"{text}; {cost}"


def _is_gain(difference: Estimate, metric: Metric) -> bool:
    return difference.excludes_zero and (difference.mean > 0) == metric.greater_is_better


def _joined(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} or {last}" if first else last
