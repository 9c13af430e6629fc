"""What a measurement is written to: never over that of another run or of other options."""

import json

import pytest

from regdrop.experiments import build_arms
from regdrop.experiments.evaluating.measure import _made_with, measure
from regdrop.experiments.evaluating.result_files import free_path
from regdrop.experiments.running.run import RunPaths, train_run


def test_a_measurement_of_another_run_or_of_other_options_is_kept(tmp_path, record):
    def path_of(one, num_masks=32, data=None):
        made_with = _made_with(one, data, num_masks, 1000)
        path = free_path(tmp_path, "measure-test", made_with)
        path.write_text(json.dumps(made_with | {"splits": {}}))
        return path.name

    rdrop, baseline = record("rdrop"), record("baseline")
    assert path_of(rdrop) == "measure-test.json"
    assert path_of(baseline) == "measure-test-2.json"
    assert path_of(rdrop, num_masks=8) == "measure-test-3.json"
    assert path_of(rdrop, data="other") == "measure-test-4.json"
    # What is measured again has its place.
    assert path_of(rdrop) == "measure-test.json"
    assert path_of(baseline) == "measure-test-2.json"


@pytest.mark.slow
def test_what_another_measured_meanwhile_is_kept(tmp_path, short):
    run, other = tmp_path / "run", tmp_path / "out" / "measure-test.json"
    train_run(short, build_arms(short)["baseline"], 0, RunPaths.alone(run))

    def meanwhile(*progress):
        other.parent.mkdir(exist_ok=True)
        other.write_text("{}")

    options = {"num_masks": 2, "examples": 8, "output": other.parent}
    result = measure(run, progress=meanwhile, **options)
    assert result.path.name == "measure-test-2.json"
    assert other.read_text() == "{}"
