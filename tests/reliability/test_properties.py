"""Any setting and any data: refused by a line that names it, or taken as what it is."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from declared import fits, holders
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from regdrop.tasks import PRESETS
from regdrop.tasks.configure import change_task
from text_data import write_encoder, write_glue, write_rows

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)

# Below 0 shorter outputs are preferred.
SIGNED = {"length_penalty"}


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return what a call gives, or None and why it refuses; other errors are faults."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.sampled_from(sorted(PRESETS)), st.data())
def test_any_value_of_any_setting_is_refused_by_name_or_is_what_the_setting_takes(preset, data):
    task = PRESETS[preset]
    prefix = data.draw(st.sampled_from(sorted(holders(task))))
    name = data.draw(st.sampled_from([x.name for x in fields(holders(task)[prefix])]))
    value = data.draw(JSON)
    changed, refusal = attempt(
        lambda: change_task(task, settings=[f"{prefix}{name}={json.dumps(value)}"])
    )
    if changed is None:
        assert name in refusal
        assert "\n" not in refusal
        return
    holder = holders(changed)[prefix]
    hint = get_type_hints(type(holder), include_extras=True)[name]
    held = getattr(holder, name)
    assert (list(held) if isinstance(held, tuple) else held) == value
    assert fits(value, hint)
    assert name in SIGNED or type(value) not in (int, float) or value >= 0


@pytest.fixture(scope="module")
def cola(tmp_path_factory):
    """Return a small task and the rows of its splits, to be written again with something wrong."""
    import datasets

    folder = tmp_path_factory.mktemp("cola")
    write_glue(folder / "data", "cola", train=20, test=5)
    task = replace(
        PRESETS["minilm-cola"],
        dataset=str(folder / "data"),
        model=str(write_encoder(folder / "model")),
        train_examples=None,
    )
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (folder / "data").iterdir()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield task, rows


@pytest.mark.slow
@settings(
    deadline=None,
    max_examples=20,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    split=st.sampled_from(["train", "validation"]),
    row=st.integers(0, 4),
    column=st.sampled_from(["sentence", "label"]),
    value=JSON | st.sampled_from([0, 1, 1.0, True, "1", 2, -1, -100, "good"]),
)
@example("train", 3, "label", 1.0)
@example("validation", 4, "label", None)
@example("validation", 0, "sentence", [])
def test_any_value_of_any_cell_is_refused_by_the_name_of_its_split_or_is_what_it_says(
    cola, split, row, column, value
):
    task, rows = cola
    for name, right in rows.items():
        changed = [dict(each) for each in right]
        if name == split:
            changed[row][column] = value
        write_rows(Path(task.dataset, f"{name}.jsonl"), changed)
    prepared, refusal = attempt(task.prepare)
    if prepared is None:
        assert task.dataset in refusal
        assert split in refusal or "cannot be read" in refusal
        return
    if column == "sentence":
        assert isinstance(value, str)
    else:
        assert float(value) in (0, 1)
        used = {"train": "train", "validation": "test"}[split]
        labels = [*prepared.splits[used]["labels"]]
        if split == "train":
            labels += prepared.splits["validation"]["labels"]
        expected = [int(float(each["label"])) for each in rows[split]]
        expected[row] = int(float(value))
        assert sorted(labels) == sorted(expected)
