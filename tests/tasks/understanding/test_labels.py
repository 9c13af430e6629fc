"""Labels that are written otherwise than as their numbers are taken as these, and it is said."""

import json
import logging
from dataclasses import replace

import datasets
import pytest

from regdrop.experiments import build_arms
from regdrop.experiments.evaluating.evaluate import evaluate
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.tasks.notices import say_once
from regdrop.tasks.understanding.glue import GLUE
from regdrop.tasks.understanding.labels import (
    check_labels,
    check_variety,
    class_names,
    match_labels,
    say_converted_labels,
)
from tiny_tasks import tiny_understanding


@pytest.fixture(autouse=True)
def nothing_said():
    say_once.cache_clear()


def say(values, task, caplog):
    split = datasets.Dataset.from_dict({"label": values})
    check_labels("it", split, GLUE[task])
    with caplog.at_level(logging.WARNING):
        say_converted_labels("it", split, GLUE[task])
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("values", "task", "kind"),
    [
        ([0.0, 1.0], "cola", "float64, such as 0.0: taken as classes"),
        ([True, False], "cola", "bool, such as True: taken as classes"),
        (["1", "0"], "cola", "string, such as '1': taken as classes"),
        (["1.5", "0"], "stsb", "string, such as '1.5': taken as scores"),
    ],
)
def test_a_conversion_is_said_once(values, task, kind, caplog):
    assert say(values, task, caplog) == [f"column 'label' of it is of {kind}"]
    caplog.clear()
    assert say(values, task, caplog) == []


def test_numbers_of_the_tasks_kind_need_no_word(caplog):
    assert say([0, 1], "cola", caplog) == say([0.5, 1.0], "stsb", caplog) == []
    assert say([0, 1], "stsb", caplog) == []


def named(labels, names):
    features = None
    if names is not None:
        kinds = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        features = datasets.Features(kinds)
    rows = {"sentence": ["a"] * len(labels), "label": labels}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (["negative", "positive"], ["negative", "positive"], [0, 1, 1]),
        (["negative", "positive"], ["positive", "negative"], [1, 0, 0]),
        (["positive", "negative"], ["positive", "negative"], [1, 0, 0]),
        (["no", "yes"], ["no", "yes"], [0, 1, 1]),
        (["no", "yes"], ["yes", "no"], [1, 0, 0]),
        (["no", "yes"], None, [0, 1, 1]),
        (None, None, [0, 1, 1]),
    ],
)
def test_labels_are_matched_by_the_names_of_each_split(train, test, expected):
    """To the task's own names, or else to those of the first split."""
    splits = {"train": named([0, 1], train), "test": named([0, 1, 1], test)}
    assert match_labels("it", splits, GLUE["sst2"])["test"]["label"][:] == expected


def test_classes_of_other_names_than_the_tasks_are_said(caplog):
    match_labels("it", {"test": named([0, 1], ["yes", "no"])}, GLUE["sst2"])
    assert "has the classes ['yes', 'no']: taken by their numbers as SST-2's" in caplog.text


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["no", "yes"], ["no", "maybe"], r"classes of split 'train', .*; got others, \['maybe'\]"),
        (["negative", "positive"], ["no", "yes"], r"classes of SST-2, .* \['no', 'yes'\]"),
        (["positive", "negative"], None, "split 'test' .* got numbers without names"),
    ],
)
def test_classes_that_cannot_be_matched_are_refused(train, test, message):
    splits = {"train": named([0, 1], train), "test": named([0, 1], test)}
    with pytest.raises(ValueError, match=message):
        match_labels("it", splits, GLUE["sst2"])


@pytest.mark.parametrize(
    ("names", "saved", "expected", "labels"),
    [
        (["bad", "good"], None, ["bad", "good"], [0, 1, 1]),
        (["positive", "negative"], None, ["negative", "positive"], [1, 0, 0]),
        (["bad", "so so", "good"], None, ["negative", "positive"], [0, 1, 1]),
        (None, None, ["negative", "positive"], [0, 1, 1]),
        (["good", "bad"], ["bad", "good"], ["bad", "good"], [1, 0, 0]),
        (["positive", "negative"], ["bad", "good"], ["bad", "good"], [1, 0, 0]),
        (None, ["bad", "good"], ["bad", "good"], [0, 1, 1]),
    ],
)
def test_a_model_has_the_names_of_the_data_and_keeps_them(names, saved, expected, labels):
    splits = {"test": named([0, 1, 1], names)}
    matched = match_labels("it", splits, GLUE["sst2"], saved)
    assert matched["test"]["label"][:] == labels
    assert class_names(splits, GLUE["sst2"], saved) == expected


def test_classes_that_a_kept_model_has_not_are_refused():
    splits = {"test": named([0, 1], ["no", "yes"])}
    with pytest.raises(ValueError, match=r"classes of the model, \['bad', 'good'\]; got others"):
        match_labels("it", splits, GLUE["sst2"], ["bad", "good"])


@pytest.mark.slow
def test_a_kept_model_tells_classes_by_its_own_names(tmp_path):
    task = tiny_understanding(tmp_path, "sst2")
    task = replace(task, training=replace(task.training, max_steps=60, eval_steps=60))

    def write(folder, names):
        folder.mkdir()
        for file in (tmp_path / "data").glob("*.jsonl"):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            for row in rows:
                row["label"] = names.index(["schlecht", "gut"][row["label"]])
            kinds = {"sentence": datasets.Value("string")}
            features = datasets.Features({**kinds, "label": datasets.ClassLabel(names=names)})
            split = datasets.Dataset.from_list(
                [{x: row[x] for x in features} for row in rows], features=features
            )
            split.to_parquet(folder / f"{file.stem}.parquet")
        return str(folder)

    task = replace(task, dataset=write(tmp_path / "own", ["schlecht", "gut"]))
    record = train_run(task, build_arms(task)["baseline"], 0, RunPaths.alone(tmp_path / "run"))
    assert record.test["accuracy"] > 0.9
    kept = json.loads((tmp_path / "run/model/config.json").read_text())
    assert kept["id2label"] == {"0": "schlecht", "1": "gut"}
    swapped = write(tmp_path / "swapped", ["gut", "schlecht"])
    found = evaluate(tmp_path / "run", "test", data=swapped)
    assert found.metrics == pytest.approx(record.test, rel=1e-4)


def test_one_score_in_all_rows_is_nothing_to_learn_from():
    split = datasets.Dataset.from_dict({"label": [2.0] * 5})
    with pytest.raises(ValueError, match=r"must hold several scores, got 2\.0 in all 5 rows"):
        check_variety("it", split, GLUE["stsb"])
