import json
from dataclasses import replace

import pytest

from regdrop.experiments import build_arms, run_arm, tuning
from regdrop.experiments.tuning import (
    Variation,
    apply_tuned,
    parse_variation,
    save_tuned,
    tune,
    with_settings,
)


@pytest.fixture
def runs(monkeypatch):
    """Run in this process, and note what is trained anew."""
    trained = []

    def run_arms(task, arms, *, seeds, folder, **options):
        records = []
        for arm in arms:
            for seed in seeds:
                is_new = not (folder / "records" / f"{arm.name}-seed{seed}.json").exists()
                trained.extend([(arm.name, seed)] if is_new else [])
                records.append(run_arm(task, arm, seed, folder))
        return records

    monkeypatch.setattr(tuning, "run_arms", run_arms)
    return trained


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rdrop.alpha=1,2.5", Variation("rdrop.alpha", values=(1, 2.5))),
        ("training.optim=sgd", Variation("training.optim", values=("sgd",))),
        ("rdrop.fraction=0.1:1", Variation("rdrop.fraction", low=0.1, high=1.0)),
        ("rdrop.alpha=0.1:10:log", Variation("rdrop.alpha", low=0.1, high=10.0, log=True)),
    ],
)
def test_variations_as_they_are_typed(text, expected):
    assert repr(parse_variation(text)) == repr(expected)


@pytest.mark.parametrize(
    "text",
    [
        "alpha=1",
        "rdrop.alpha",
        "rdrop.alpha=",
        "task.dropout=1",
        "rdrop.alpha=2:1",
        "rdrop.alpha=0:1:log",
        "rdrop.alpha=a:b",
        "rdrop.alpha=1:2:linear",
    ],
)
def test_what_is_no_variation_is_named(text):
    with pytest.raises(ValueError, match=r"a (variation|range) must be .*, got '"):
        parse_variation(text)


def test_every_combination_is_tried_and_the_best_on_validation_is_taken(tmp_path, short, runs):
    """A learning rate of 0 learns nothing; the seeds are averaged."""
    arms = [build_arms(short)[name] for name in ("baseline", "rdrop")]
    variations = [
        Variation("training.learning_rate", values=(0.0, 1e-2)),
        Variation("rdrop.alpha", values=(1, 2)),
    ]
    found = tune(short, arms, variations, seeds=[7, 8], folder=tmp_path)
    # Alpha means nothing to the baseline.
    assert found["baseline"].settings == {"training.learning_rate": 1e-2}
    assert (found["baseline"].tried, found["rdrop"].tried) == (2, 4)
    assert found["rdrop"].settings["training.learning_rate"] == 1e-2
    assert len(runs) == 2 * 2 + 4 * 2
    name = tuning.describe(found["rdrop"].settings)
    figures = [
        json.loads((tmp_path / "records" / f"rdrop@{name}-seed{seed}.json").read_text())
        for seed in (7, 8)
    ]
    mean = sum(record["validation"]["nll"] for record in figures) / 2
    assert found["rdrop"].figure == pytest.approx(mean)
    runs.clear()
    assert tune(short, arms, variations, seeds=[7, 8], folder=tmp_path) == found
    assert runs == []


def test_a_search_stays_in_its_range_and_goes_on_where_it_stopped(tmp_path, short, runs):
    pytest.importorskip("optuna")
    arms = [build_arms(short)["rdrop"]]
    variations = [Variation("rdrop.alpha", low=0.1, high=10.0, log=True)]

    def search(trials):
        return tune(short, arms, variations, seeds=[7], folder=tmp_path, trials=trials)["rdrop"]

    found = search(2)
    assert (found.tried, len(runs)) == (2, 2)
    assert 0.1 <= found.settings["rdrop.alpha"] <= 10
    again = search(3)
    assert (again.tried, len(runs)) == (3, 3)
    assert len(set(runs)) == 3
    assert again.figure <= found.figure
    assert search(3) == again
    assert (tmp_path / "optuna.db").exists()


def test_what_was_chosen_is_taken_by_name(tmp_path, short, runs):
    arms = [build_arms(short)[name] for name in ("baseline", "rdrop")]
    variation = Variation("rdrop.alpha", values=(0.5,))
    path = save_tuned(tmp_path, tune(short, arms, [variation], seeds=[7], folder=tmp_path))
    baseline, rdrop = apply_tuned(arms, path)
    assert baseline == arms[0]
    assert rdrop == replace(arms[1], rdrop=replace(arms[1].rdrop, alpha=0.5))
    path.write_text("[]")
    with pytest.raises(ValueError, match="must be a file of `regdrop tune`"):
        apply_tuned(arms, path)


def test_settings_that_there_are_not_are_named_before_anything_runs(tmp_path, short, runs):
    arm = build_arms(short)["rdrop"]
    with pytest.raises(ValueError, match="rdrop has no setting 'beta'"):
        with_settings(arm, {"rdrop.beta": 1})
    variations = [Variation("training.max_steps", values=(0,))]
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        tune(short, [arm], variations, seeds=[7], folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
