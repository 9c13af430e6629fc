"""Labels that are written otherwise than as their numbers are taken as these, and it is said."""

import logging

import datasets
import pytest

from regdrop.tasks.common.notices import say_once
from regdrop.tasks.understanding.glue import GLUE
from regdrop.tasks.understanding.labels import check_labels, say_converted_labels


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
