import math
from dataclasses import asdict, replace

import pytest

from regdrop.experiments import build_arms
from regdrop.experiments.recording.settings import resolved_config
from regdrop.experiments.reporting.per_example import example_intervals
from regdrop.experiments.reporting.tables import (
    build_rows,
    find_metrics,
    format_cell,
    table_cells,
)
from regdrop.tasks import Metric


def test_rows_hold_means_paired_differences_and_cost(records):
    rows = build_rows(records)
    assert [row.arm for row in rows] == ["baseline", "baseline-2x", "rdrop"]
    assert [row.time for row in rows] == [1.0, 2.0, 1.5]
    assert [row.seeds for row in rows] == [3, 3, 3]
    baseline, _, rdrop = (row.cells["accuracy"] for row in rows)
    assert baseline.difference is None
    assert rdrop.value.mean == pytest.approx(0.94)
    # Differences 0.03, 0.02 and 0.04: standard error 0.01 / sqrt(3), t = 4.302653.
    assert rdrop.difference.mean == pytest.approx(0.03)
    assert rdrop.difference.half_width == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize(("metric", "part"), [("nll", 0.5), ("accuracy", 0.75), ("bleu", None)])
def test_best_part_is_that_of_the_mean_validation_curve(record, metric, part):
    curves = {"eval_nll": ([3, 1, 2, 3], [3, 3, 2.5, 1]), "eval_accuracy": ([0, 1, 2, 1], [1] * 4)}
    records = [
        record(
            seed=seed,
            config={"selection_metric": metric},
            history=[
                {"step": i + 1, "seconds": 0.0} | {k: v[seed][i] for k, v in curves.items()}
                for i in range(4)
            ],
        )
        for seed in (0, 1)
    ]
    assert build_rows(records)[0].best_part == part


def test_the_preset_tells_by_what_checkpoints_are_selected_where_settings_do_not(record):
    history = [
        {"step": i, "seconds": 0.0, "eval_matthews_correlation": value}
        for i, value in enumerate([0.1, 0.4, 0.3, 0.2], start=1)
    ]
    runs = [record(task="minilm-cola", test={"matthews_correlation": 0.3}, history=history)]
    assert build_rows(runs)[0].best_part == 0.5


def test_cells_as_text(records):
    metrics = find_metrics(records)
    cell = build_rows(records)[2].cells
    assert format_cell(cell["accuracy"], metrics["accuracy"]) == "94.00 ± 2.48 (+3.00 ± 2.48)"
    assert format_cell(cell["nll"], metrics["nll"]) == "0.060 ± 0.025 (−0.030 ± 0.025)"


def test_time_is_the_mean_ratio_of_the_seeds_that_both_have(record):
    runs = [record("baseline", 0, seconds=10.0), record("baseline", 1, seconds=40.0)]
    runs += [record("rdrop", seed, seconds=s) for seed, s in ((0, 20.0), (1, 40.0), (2, 1000.0))]
    times = {row.arm: row.time for row in build_rows(runs)}
    assert times == {"baseline": 1.0, "rdrop": pytest.approx((20 / 10 + 40 / 40) / 2)}


def test_one_seed_has_no_interval(record):
    cells = build_rows([record(), record("rdrop")])[1].cells
    text = format_cell(cells["nll"], Metric("NLL", greater_is_better=False))
    assert text == "0.300 (+0.000)"


def test_without_a_baseline_there_are_no_differences(record):
    header, rows = table_cells([record("rdrop", 0), record("rdrop", 1)])
    assert header[1] == "test accuracy (%)"
    assert "(" not in rows[0][1]
    assert rows[0][header.index("time")] == "n/a"


def test_records_of_several_tasks_are_refused(record):
    with pytest.raises(ValueError, match=r"records must be of one task, got \['digits', 'other'\]"):
        build_rows([record(), record(task="other")])


def test_intervals_over_examples_are_of_the_paired_difference(with_examples):
    found = example_intervals(with_examples)
    assert list(found) == ["baseline", "rdrop"]
    own, difference = found["rdrop"]["accuracy"]
    # Binomial errors of 400 examples: of their accuracy 0.75, and of a quarter that differs.
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert own == pytest.approx((0.75 - half, 0.75 + half), abs=0.01)
    assert difference == pytest.approx((0.25 - half, 0.25 + half), abs=0.01)
    assert found["baseline"]["accuracy"][1] is None
    assert found["rdrop"]["nll"] == ((0.5, 0.5), (0.0, 0.0))


def test_arms_of_other_examples_are_refused(with_examples):
    fewer = [
        replace(one, examples={"test": one.examples["test"][:100]}) if one.arm == "rdrop" else one
        for one in with_examples
    ]
    with pytest.raises(ValueError, match="rdrop and baseline must be tested on the same examples"):
        example_intervals(fewer)


def test_intervals_over_examples_pair_the_seeds_that_both_have(with_examples, record, short):
    extra = replace(with_examples[-1], seed=7, examples={"test": [[1, 0.0, 0.5]] * 400})
    found = example_intervals([*with_examples, extra])
    assert found["rdrop"]["accuracy"][0].high < 0.6
    assert found["rdrop"]["accuracy"][1] == example_intervals(with_examples)["rdrop"]["accuracy"][1]


def test_a_task_of_another_name_is_read_by_its_family(record, short):
    """By the name alone nothing tells that less NLL is better."""
    config = resolved_config(replace(short, name="my-digits"), build_arms(short)["baseline"])
    history = [
        {"step": i, "seconds": 0.0, "eval_nll": value}
        for i, value in ((1, 0.5), (2, 0.2), (3, 0.9))
    ]
    runs = [record(task="my-digits", config=config, history=history)]
    assert find_metrics(runs) == short.metrics
    assert build_rows(runs)[0].best_part == 0.5


def test_the_first_record_that_tells_how_its_metrics_are_read_tells_it(record):
    how = Metric("errors", greater_is_better=False)
    older, newer = (
        record("baseline", seed, task="mine", test={"errors": 0.5}, metrics=metrics)
        for seed, metrics in enumerate(({}, {"errors": asdict(how)}))
    )
    assert find_metrics([older, newer]) == {"errors": how}


def test_a_metric_of_which_nothing_tells_the_direction_is_refused(record):
    with pytest.raises(ValueError, match="records of 'mine' hold the metric 'accuracy', and nothi"):
        find_metrics([record(task="mine")])
    with pytest.raises(ValueError, match="hold the metric 'wer', and nothing tells"):
        find_metrics([record(test={"wer": 0.3})])
