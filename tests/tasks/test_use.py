"""A kept model on a folder with one split, and in plain transformers as docs/use.md has it."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from typer.testing import CliRunner

from regdrop.commands import app
from regdrop.experiments import build_arms
from regdrop.experiments.evaluating.evaluate import evaluate
from regdrop.experiments.running.run import RunPaths, train_run
from tiny_tasks import (
    tiny_images,
    tiny_language_modelling,
    tiny_summarisation,
    tiny_translation,
    tiny_understanding,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "use.md"
pytestmark = pytest.mark.slow


def lone(folder, family):
    """Return a folder with the test split of a folder of data alone, in a file of that name."""
    source = folder / "data"
    if family == "images":
        shutil.copytree(source / "test", folder / "lone" / "test")
    else:
        (folder / "lone").mkdir()
        name = "validation" if family == "understanding" else "test"
        shutil.copy(source / f"{name}.jsonl", folder / "lone" / "test.jsonl")
    return folder / "lone"


def rows(folder):
    """Return the columns of the lone test split."""
    if not (folder / "test.jsonl").exists():
        files = sorted(folder.glob("test/*/*.jpeg"))
        return {"image": [str(f) for f in files], "label": [f.parent.name for f in files]}
    lines = [json.loads(x) for x in (folder / "test.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in lines[0]}


FAMILIES = {
    "understanding": (tiny_understanding, "Understanding", 0),
    "translation": (tiny_translation, "Translation and summarisation", 0),
    "summarisation": (tiny_summarisation, "Translation and summarisation", 1),
    "language modelling": (
        lambda folder: replace(
            tiny_language_modelling(folder, "ptb-adaptive"), block_size=9, context_window=8
        ),
        "Language modelling",
        0,
    ),
    "images": (tiny_images, "Images", 0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lone_test_file_is_evaluated_and_a_fresh_process_agrees(tmp_path, family):
    build, section, block = FAMILIES[family]
    task = build(tmp_path)
    training = replace(task.training, max_steps=20, eval_steps=20, logging_steps=20)
    task = replace(task, training=training)
    run = tmp_path / "run"
    record = train_run(task, build_arms(task)["rdrop"], 0, RunPaths.alone(run))
    data = lone(tmp_path, family)
    found = evaluate(run, "test", data=str(data))
    assert found.metrics == pytest.approx(record.test, rel=1e-4)
    assert not found.unknown_words

    text = DOCUMENT.read_text("utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    code = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)[block]
    (tmp_path / "data.json").write_text(json.dumps(rows(data)))
    script = (
        f"import json\nrun = {str(run)!r}\ndata = json.load(open('data.json'))\n{code}\n"
        "print('figures', json.dumps(figures))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(re.search(r"^figures (.*)$", done.stdout, re.M).group(1))
    expected = {name: found.metrics[name] for name in figures}
    assert figures == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_text_that_a_model_does_not_know_is_told(tmp_path):
    task = tiny_language_modelling(tmp_path)
    task = replace(task, training=replace(task.training, max_steps=2, eval_steps=2))
    run = tmp_path / "run"
    train_run(task, build_arms(task)["baseline"], 0, RunPaths.alone(run))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "test.jsonl").write_text('{"text": "good hund bad katze"}\n')
    # Two of six words; those before a block's own are read again.
    assert evaluate(run, "test", data=str(foreign)).unknown_words == pytest.approx(4 / 11)
    result = CliRunner().invoke(app, ["evaluate", str(run), "--data", str(foreign)])
    assert "36.4% of the words" in " ".join(result.output.split())


def test_images_are_matched_to_the_models_classes_by_name(tmp_path):
    task = tiny_images(tmp_path)
    run = tmp_path / "run"
    train_run(task, build_arms(task)["baseline"], 0, RunPaths.alone(run))
    whole = evaluate(run, "test").metrics["accuracy"]
    assert whole == 1.0
    files = sorted((tmp_path / "data/test").glob("*/*.jpeg"))

    def write(folder, names):
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        )
        rows = {"image": [str(f) for f in files], "label": [f.parent.name for f in files]}
        rows["label"] = [names.index(x) if x in names else 0 for x in rows["label"]]
        folder.mkdir()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "test.parquet")
        return str(folder)

    swapped = write(tmp_path / "swapped", ["light", "dark"])
    assert evaluate(run, "test", data=swapped).metrics["accuracy"] == 1.0
    with pytest.raises(ValueError, match=r"must have the classes of the model.*\['bright'\]"):
        evaluate(run, "test", data=write(tmp_path / "other", ["bright", "dark"]))


def test_sets_that_show_their_test_labels_are_tested_on_them(tmp_path):
    task = tiny_understanding(tmp_path)
    shutil.copy(tmp_path / "data/train.jsonl", tmp_path / "data/test.jsonl")
    splits = task.prepare().splits
    assert {name: len(splits[name]) for name in splits} == {
        "train": 60,
        "validation": 20,
        "test": 60,
    }
    hidden = (tmp_path / "data/test.jsonl").read_text()
    (tmp_path / "data/test.jsonl").write_text(re.sub(r'"label": \d', '"label": -1', hidden))
    splits = task.prepare().splits
    assert {name: len(splits[name]) for name in splits} == {
        "train": 54,
        "validation": 6,
        "test": 20,
    }


def test_a_run_in_half_precision_predicts_in_float32(tmp_path):
    task = tiny_understanding(tmp_path, "stsb")
    training = replace(task.training, max_steps=3, eval_steps=3, mixed_precision="bf16")
    task = replace(task, training=training)
    run = tmp_path / "run"
    record = train_run(task, build_arms(task)["rdrop"], 0, RunPaths.alone(run))
    assert evaluate(run, "test").metrics == pytest.approx(record.test, rel=1e-4)
    predicted = torch.tensor(record.examples["test"])[:, 1]
    # bfloat16 has eight bits: what it could hold is not what was predicted.
    assert (predicted != predicted.bfloat16().float()).float().mean() > 0.5
