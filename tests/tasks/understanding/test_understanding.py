import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from regdrop import find_dropout
from regdrop.experiments import build_arms, run_arm
from regdrop.experiments.evaluating.evaluate import evaluate
from regdrop.experiments.recording.settings import check_same_config, resolved_config
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.tasks import PRESETS
from regdrop.tasks.understanding.glue import GLUE
from regdrop.tasks.understanding.presets import MINILM
from regdrop.tasks.understanding.task import regression_statistics
from text_data import write_encoder, write_glue, write_rows
from tiny_tasks import tiny_understanding


@pytest.mark.parametrize("task", sorted(GLUE))
def test_each_task_learns_and_reports_its_own_figures(tmp_path, task):
    chosen = tiny_understanding(tmp_path, task)
    record = run_arm(chosen, build_arms(chosen)["rdrop"], 0, tmp_path / "out")
    losses = [entry["nll"] for entry in record.history if "nll" in entry]
    assert losses[-1] < 0.7 * losses[0]
    names = list(GLUE[task].metrics)
    further = [f"mismatched_{name}" for name in names] if task == "mnli" else []
    assert list(record.test) == [*names, *further]
    assert list(record.validation) == names
    assert record.test[names[0]] > 0.5
    assert {name: len(rows) for name, rows in record.examples.items()} == dict.fromkeys(
        GLUE[task].tests, 20
    )
    again = chosen.compute_metrics(np.array(record.examples["test"]))
    assert again == pytest.approx({name: record.test[name] for name in names}, rel=1e-4)


@pytest.mark.parametrize("kind", ["roberta", "xlnet", "electra"])
def test_any_encoder_is_fine_tuned(tmp_path, kind):
    chosen = tiny_understanding(tmp_path, "rte", kind)
    record = run_arm(chosen, build_arms(chosen)["rdrop"], 0, tmp_path / "out")
    losses = [entry["nll"] for entry in record.history if "nll" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert max(entry["kl"] for entry in record.history if "kl" in entry) > 0


def test_a_run_keeps_a_model_that_evaluates_to_the_same_figures(tmp_path):
    chosen = tiny_understanding(tmp_path)
    record = train_run(chosen, build_arms(chosen)["rdrop"], 1, RunPaths.alone(tmp_path / "run"))
    assert evaluate(tmp_path / "run", "test").metrics == pytest.approx(record.test)
    validation = evaluate(tmp_path / "run", "validation")
    assert validation.metrics == pytest.approx(record.validation)
    kept = json.loads(validation.path.read_text())
    assert kept["examples"] == 6
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model(**tokenizer(["the film was good"], return_tensors="pt")).logits.shape == (1, 2)
    assert model.config.id2label == {0: "unacceptable", 1: "acceptable"}
    other = write_glue(tmp_path / "other", "cola", test=9)
    assert evaluate(tmp_path / "run", "test", data=str(other)).examples == 9


def test_examples_stand_in_the_order_of_the_data_whatever_the_seed(tmp_path):
    """Also where the Trainer groups what it evaluates by length, in an order of the seed."""
    chosen = tiny_understanding(tmp_path, group_by_length=True)
    chosen = replace(chosen, training=replace(chosen.training, max_steps=2, eval_steps=2))
    rows = (tmp_path / "data" / "validation.jsonl").read_text().splitlines()
    labels = [json.loads(row)["label"] for row in rows]
    for seed in (0, 1):
        record = run_arm(chosen, build_arms(chosen)["baseline"], seed, tmp_path / "out")
        assert [int(label) for label, *_ in record.examples["test"]] == labels
    run = RunPaths.alone(tmp_path / "run")
    record = train_run(chosen, build_arms(chosen)["baseline"], 0, run)
    assert evaluate(tmp_path / "run", "test").metrics == pytest.approx(record.test)


@pytest.mark.parametrize(
    ("name", "encoder", "expected"),
    [
        # Embeddings, layers and pooler of BERT-base and RoBERTa-large, and the heads.
        ("bert-base", "bert", 109_482_240 + 2 * 769),
        ("roberta-large", "roberta", 354_310_144 + 1024 * 1024 + 1024 + 2 * 1025),
    ],
)
def test_paper_presets_have_the_papers_settings_and_sizes(name, encoder, expected):
    for task, glue in GLUE.items():
        preset = PRESETS[f"{name}-{task}"]
        settings = preset.training
        assert settings.batch_size == glue.batch_size
        epochs = settings.max_steps * settings.batch_size / glue.train_size
        assert epochs == pytest.approx(6.5 if task == "rte" else 10, rel=0.02)
        assert (settings.learning_rate, settings.adam_beta2) == (1e-5, 0.98)
        assert settings.warmup_ratio == pytest.approx(0.25 if task == "qqp" else 0.06, rel=0.01)
        assert settings.weight_decay == 0.01
        assert len(build_arms(preset)) == 5
    sizes = {
        "bert": {"vocab_size": 30522},
        "roberta": {
            "vocab_size": 50265,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
        },
    }[encoder]
    config = AutoConfig.for_model(encoder, num_labels=2, **sizes)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_figures_by_hand():
    statistics = np.array([[1, 1, 0.1], [1, 0, 0.9], [0, 0, 0.2], [0, 0, 0.4], [1, 1, 0.4]])
    found = PRESETS["bert-base-mrpc"].compute_metrics(statistics)
    assert found == pytest.approx({"accuracy": 4 / 5, "f1": 2 * 2 / (2 * 2 + 1), "nll": 0.4})
    # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN))
    found = PRESETS["bert-base-cola"].compute_metrics(statistics)
    assert found["matthews_correlation"] == pytest.approx((2 * 2 - 0) / (2 * 3 * 2 * 3) ** 0.5)
    scores = regression_statistics(
        SimpleNamespace(predictions=np.array([[1.0], [2.0], [6.0]]), label_ids=[1.0, 3.0, 5.0])
    )
    found = PRESETS["bert-base-stsb"].compute_metrics(scores)
    assert found["pearson"] == pytest.approx(10 / (14 * 8) ** 0.5)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["mse"] == pytest.approx(2 / 3)
    same = np.array([[1.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert PRESETS["bert-base-stsb"].compute_metrics(same)["pearson"] == 0.0


def test_figures_are_those_of_the_fields_libraries():
    generator = np.random.default_rng(0)
    classes = generator.integers(0, 2, (50, 3)).astype(float)
    label, prediction = classes[:, 0], classes[:, 1]
    f1 = PRESETS["bert-base-qqp"].compute_metrics(classes)["f1"]
    assert f1 == pytest.approx(f1_score(label, prediction))
    matthews = PRESETS["bert-base-cola"].compute_metrics(classes)["matthews_correlation"]
    assert matthews == pytest.approx(matthews_corrcoef(label, prediction))
    classes[:, :2] = 0
    assert PRESETS["bert-base-qqp"].compute_metrics(classes)["f1"] == 0.0
    scores = generator.integers(0, 9, (50, 3)).astype(float)  # with ties
    found = PRESETS["bert-base-stsb"].compute_metrics(scores)
    assert found["pearson"] == pytest.approx(pearsonr(scores[:, 0], scores[:, 1])[0])
    assert found["spearman"] == pytest.approx(spearmanr(scores[:, 0], scores[:, 1])[0])


@pytest.mark.parametrize("write", [str, float, bool])
def test_whole_numbers_are_labels_however_they_are_written(tmp_path, write):
    rows = [{"sentence": "good", "label": write(i % 2)} for i in range(20)]
    for i, row in enumerate(rows):
        row["label"] = str(i % 2) if write is str else row["label"]
    write_rows(tmp_path / "labels" / "train.jsonl", rows)
    write_rows(tmp_path / "labels" / "validation.jsonl", rows[:4])
    prepared = tiny_understanding(tmp_path, dataset=str(tmp_path / "labels")).prepare()
    labels = [row["labels"] for row in prepared.splits["test"]]
    assert labels == [0, 1, 0, 1]
    assert all(type(label) is int for label in labels)


def test_data_that_changed_under_finished_records_is_refused_by_name(tmp_path, monkeypatch):
    task = tiny_understanding(tmp_path)
    arm = build_arms(task)["baseline"]
    before = resolved_config(task, arm)
    assert sorted(before["data"]) == ["train.jsonl", "validation.jsonl"]
    with (Path(task.dataset) / "validation.jsonl").open("a") as file:
        file.write('{"sentence": "good", "label": 1}\n')
    with pytest.raises(ValueError, match=r"made with other settings \(data\.validation\.jsonl\)"):
        check_same_config(tmp_path / "record.json", before, resolved_config(task, arm))


def test_bad_data_is_named_before_work_is_lost(tmp_path):
    good = tiny_understanding(tmp_path)
    rows = [{"sentence": "good", "label": 0}, {"sentence": "bad", "label": 1}] * 10

    def prepare(name, train, **changes):
        folder = tmp_path / name
        write_rows(folder / "train.jsonl", train)
        first = [{**train[0], "label": 0}] if train else rows
        write_rows(folder / "validation.jsonl", first)
        chosen = replace(good, dataset=str(folder), **changes)
        run_arm(chosen, build_arms(chosen)["rdrop"], 0, tmp_path / "out")

    with pytest.raises(ValueError, match=r"lacks \['sentence'\] and has \['text', 'label'\]"):
        prepare("columns", [{"text": "good", "label": 0}] * 20)
    with pytest.raises(ValueError, match="must hold several classes, got 0 in all 20 rows"):
        prepare("one", rows[:1] * 20)
    with pytest.raises(ValueError, match=r"'sentence' of split 'train' .* got null in row 20"):
        prepare("null", [*rows, {"sentence": None, "label": 0}])
    for name, other in (("list", ["a"]), ("number", 3), ("mapping", {"a": "b"})):
        with pytest.raises(ValueError, match=rf"must hold text, got {re.escape(repr(other))} in"):
            prepare(name, [*rows, {"sentence": other, "label": 0}])
    with pytest.raises(ValueError, match="label"):
        prepare("words", [*rows, {"sentence": "good", "label": "many"}])
    with pytest.raises(ValueError, match="must hold classes from 0 to 1, got 7 in row 0"):
        prepare("labels", [{"sentence": "good", "label": 7}] * 20)
    with pytest.raises(ValueError, match=r"(?:cannot be read|must hold numbers): .*'yes'"):
        prepare("words", [{"sentence": "good", "label": "yes"}] * 20)
    with pytest.raises(ValueError, match="train_examples must be between 1 and the 18"):
        prepare("few", rows, train_examples=19)
    with pytest.raises(ValueError, match="at least 10 rows"):
        prepare("tiny", rows[:3])
    with pytest.raises(ValueError, match="empty"):
        prepare("empty", [])
    with pytest.raises(ValueError, match="there is no folder"):
        replace(good, dataset="./nowhere").prepare()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text("{no json")
    with pytest.raises(ValueError, match="cannot be read"):
        replace(good, dataset=str(tmp_path / "broken")).prepare()
    assert not (tmp_path / "out").exists()


def test_bad_checkpoints_are_named(tmp_path):
    from models import tiny_vit

    good = tiny_understanding(tmp_path)
    tiny_vit().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"must be an encoder with .*, got .* 'vit'"):
        replace(good, model=str(tmp_path / "vit")).prepare()
    with pytest.raises(ValueError, match="there is no folder"):
        replace(good, model="./nowhere").prepare()
    with pytest.raises(ValueError, match="needs the package nowhere_at_all"):
        replace(good, model="package:nowhere_at_all/model").prepare()
    state = load_file(tmp_path / "model" / "model.safetensors")
    kept = {k: v for k, v in state.items() if "word_embeddings" not in k and "pooler" not in k}
    save_file(kept, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of its encoder's, .*word_embeddings"):
        good.prepare().build_model()
    with pytest.raises(ValueError, match="glue_task must be one of"):
        replace(good, glue_task="wnli")
    whole = tiny_understanding(tmp_path / "whole")
    still = replace(whole, dropout=0.0)
    with pytest.raises(ValueError, match="has no dropout above 0"):
        run_arm(still, build_arms(still)["rdrop"], 0, tmp_path / "out")


@pytest.mark.parametrize(("kind", "limit"), [("bert", 40), ("roberta", 39)])
def test_more_tokens_than_a_model_has_positions_for_are_refused(tmp_path, kind, limit):
    good = tiny_understanding(tmp_path, kind=kind)
    write_encoder(tmp_path / "model", kind, max_position_embeddings=40)
    replace(good, max_length=limit).prepare()
    # RoBERTa keeps the rows up to its padding word's, here 0, for itself.
    with pytest.raises(ValueError, match=f"max_length must be at most {limit}: .* positions"):
        replace(good, max_length=limit + 1).prepare()


def test_the_packaged_minilm_is_loaded_with_its_weights_and_dropout(tmp_path):
    chosen = tiny_understanding(tmp_path, model=MINILM)
    model = chosen.prepare().build_model().train()
    assert sum(p.numel() for p in model.base_model.parameters()) == 22_713_216
    assert {source.rate for source in find_dropout(model)} == {0.1}


@pytest.mark.long
@pytest.mark.slow
def test_minilm_learns_real_linguistic_acceptability(tmp_path):
    folder = Path(os.environ.get("REGDROP_TEST_DATA", "nowhere")) / "glue_cola"
    if not folder.is_dir():
        pytest.skip("REGDROP_TEST_DATA names no folder that holds glue_cola")
    preset = PRESETS["minilm-cola"]
    training = replace(preset.training, max_steps=30, eval_steps=30, logging_steps=10)
    chosen = replace(preset, dataset=str(folder), training=training, train_examples=600)
    record = run_arm(chosen, build_arms(chosen)["rdrop"], 0, tmp_path)
    losses = [entry["nll"] for entry in record.history if "nll" in entry]
    assert losses[-1] < losses[0]
    assert len(record.examples["test"]) == 1043
