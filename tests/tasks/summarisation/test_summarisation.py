import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoTokenizer, GenerationConfig

from regdrop.experiments import build_arms, run_arm
from regdrop.experiments.evaluating.evaluate import evaluate
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.tasks import PRESETS
from regdrop.tasks.generate_lines import generate_lines
from regdrop.tasks.summarisation.rouge import rouge_statistics
from text_data import write_encoder, write_encoder_decoder, write_rows
from tiny_tasks import tiny_summarisation


def test_a_run_learns_and_its_model_summarises(tmp_path):
    chosen = tiny_summarisation(tmp_path)
    folder = tmp_path / "run"
    record = train_run(chosen, build_arms(chosen)["rdrop"], 0, RunPaths.alone(folder))
    losses = [entry["nll"] for entry in record.history if "nll" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert set(record.test) == {"rouge1", "rouge2", "rougeLsum", "nll"}
    assert evaluate(folder, "test").metrics == pytest.approx(record.test, rel=1e-4)

    rows = [json.loads(x) for x in (tmp_path / "data/test.jsonl").open()]
    texts = list(generate_lines(folder / "model", [row["text"] for row in rows]))
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    scores = [
        max(scorer.score(target, text)["rouge1"].fmeasure for target in row["summary"])
        for text, row in zip(texts, rows, strict=True)
    ]
    assert record.test["rouge1"] == pytest.approx(np.mean(scores), abs=1e-5)


@pytest.mark.parametrize("kind", ["bart", "pegasus", "t5"])
def test_any_encoder_decoder_is_fine_tuned(tmp_path, kind):
    model = str(write_encoder_decoder(tmp_path / kind, kind))
    chosen = tiny_summarisation(tmp_path, model=model, model_config={}, min_length=4)
    chosen = replace(chosen, training=replace(chosen.training, max_steps=8, eval_steps=4))
    folder = tmp_path / "run"
    record = train_run(chosen, build_arms(chosen)["rdrop"], 0, RunPaths.alone(folder))
    assert np.isfinite(record.test["nll"])
    kept = GenerationConfig.from_pretrained(folder / "model")
    assert (kept.num_beams, kept.length_penalty) == (4, 1.0)
    assert (kept.min_length, kept.max_length) == (4, 10)
    assert AutoTokenizer.from_pretrained(folder / "model")("good").input_ids == [2, 4, 3]


def test_rouge_by_hand():
    found = rouge_statistics(
        ["the dogs run fast", "a cat."], [["the dog runs"], ["dogs", "a cat sleeps"]]
    )
    # Stems: "the dog run fast" against "the dog run", three words and two pairs of them shared.
    precision, recall = 3 / 4, 1.0
    assert found[0, 0] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found[0, 1] == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    # The better of two references.
    assert found[1, 0] == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))


def test_rouge_l_is_of_whole_summaries():
    """Sentences in another order lose nothing there, as rouge-score's own summary level has it."""
    reference = "the dog runs. a cat sleeps."
    found = rouge_statistics(["A cat sleeps. The dog runs."], [[reference]])
    assert found[0, 2] == pytest.approx(1.0)
    assert RougeScorer(["rougeL"]).score(reference, "A cat sleeps. The dog runs.")[
        "rougeL"
    ].fmeasure == pytest.approx(0.5)
    lines = rouge_statistics(["a cat sleeps\nthe dog runs"], [["the dog runs\na cat sleeps"]])
    assert lines[0, 2] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ("кошка сидит", "Кошка сидит.", [1, 1, 1]),
        ("кошка спит", "кошка сидит", [1 / 2, 0, 1 / 2]),
        ("고양이가 앉아 있다", "고양이가 앉아", [4 / 5, 2 / 3, 4 / 5]),
        ("猫坐着。", "猫坐下。", [2 / 3, 1 / 2, 2 / 3]),  # words of one character
        ("狗跑。猫坐。", "猫坐。狗跑。", [1, 2 / 3, 1]),  # two sentences
        ("cafe\u0301s 12", "Cafés 12", [1, 1, 1]),
        ("the dogs of Zürich", "the dog of Zürich", [1, 1, 1]),  # English words are stemmed
    ],
)
def test_rouge_of_other_scripts_is_of_their_words(output, reference, expected):
    assert rouge_statistics([output], [[reference]])[0] == pytest.approx(expected)


def test_rouge_of_references_in_ascii_is_rouge_scores_own():
    """Whatever the outputs hold."""
    outputs = ["The café’s dogs_run fast — 3.5%", "кошка", "it's naïve"]
    references = ["The caf s dogs run fast 3 5", "a cat", "“it’s” na ve"]
    scorer = RougeScorer(["rouge1", "rouge2"], use_stemmer=True)
    own = [scorer.score(x, y) for x, y in zip(references, outputs, strict=True)]
    found = rouge_statistics(outputs, [[x] for x in references])
    assert found[:, 0].tolist() == [x["rouge1"].fmeasure for x in own]
    assert found[:, 1].tolist() == [x["rouge2"].fmeasure for x in own]


def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match="each of 2 outputs must have a reference, got 1"):
        rouge_statistics(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="must have a reference"):
        rouge_statistics(["a"], [[]])


def test_the_papers_preset_builds_its_model():
    from transformers import BartConfig, BartForConditionalGeneration

    preset = PRESETS["cnn-dailymail"]
    assert (preset.rdrop.alpha, preset.training.max_steps) == (0.7, 20_000)
    assert (preset.training.max_grad_norm, preset.training.label_smoothing) == (0.1, 0.1)
    assert (preset.num_beams, preset.length_penalty, preset.no_repeat_ngram_size) == (4, 2.0, 3)
    assert (preset.min_length, preset.max_length) == (56, 142)
    assert (preset.model, preset.dataset) == ("facebook/bart-large", "abisee/cnn_dailymail")
    # BART-large: 12 layers a side, 1024 wide, 50,265 tokens.
    config = BartConfig(**preset.model_config)
    with torch.device("meta"):
        model = BartForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == 406_291_456
    assert config.dropout == config.attention_dropout == 0.1


def test_bad_data_and_models_are_named_before_work_is_lost(tmp_path):
    good = tiny_summarisation(tmp_path)
    arm = build_arms(good)["rdrop"]
    write_rows(tmp_path / "empty" / "train.jsonl", [{"text": "a", "summary": []}] * 20)
    write_rows(tmp_path / "empty" / "test.jsonl", [{"text": "a", "summary": []}] * 2)
    encoder = str(write_encoder(tmp_path / "bert"))
    bart = str(write_encoder_decoder(tmp_path / "bart"))
    for changed, message in (
        (replace(good, target="title"), r"it lacks \['title'\]"),
        (replace(good, dataset=str(tmp_path / "empty")), "must hold a text or a list of at least"),
        (replace(good, model=encoder, model_config={}), "must be an encoder-decoder, got a"),
        (replace(good, model=encoder), "model_config must have a model_type where there is no"),
        (replace(good, model_config={}), "model_config must have a model_type where there is no"),
        (replace(good, model=bart, model_config={}, max_source_length=2_000), "the 1024 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            run_arm(changed, arm, 0, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("a", 3),
        ("a", None),
        (["a"], []),
        (["a"], None),
        (["a"], [None]),
        (["a"], ["a", 3]),
        (["a"], {"b": "a"}),
    ],
)
def test_a_reference_that_is_no_text_is_named_by_data_split_and_row(tmp_path, split, right, wrong):
    for name in ("train", "test"):
        rows = [{"text": "a b", "summary": right} for _ in range(20)]
        if name == split:
            rows[7]["summary"] = wrong
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    task = tiny_summarisation(tmp_path / "other", dataset=str(tmp_path / "data"))
    where = f"column 'summary' of split '{split}' of data '{task.dataset}' must hold "
    shown = "null" if right == "a" and wrong is None else re.escape(repr(wrong))
    with pytest.raises(ValueError, match=rf"{where}.*, got {shown} in row 7$"):
        task.prepare()


@pytest.mark.parametrize("write", [json.dumps, str, lambda texts: str(np.array(texts))])
def test_lists_that_are_written_as_text_are_refused(tmp_path, write):
    rows = [{"text": "a b", "summary": write([f"a {i}", "b"])} for i in range(20)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    task = tiny_summarisation(tmp_path / "other", dataset=str(tmp_path / "data"))
    with pytest.raises(
        ValueError, match=r"'summary' of split 'train' .* lists that are written as"
    ):
        task.prepare()
    rows[0]["summary"] = "[a] is one text"
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    task.prepare()


@pytest.mark.parametrize("empty", [" ", ["", " "]])
def test_empty_references_are_said_with_split_and_row(tmp_path, caplog, empty):
    right = "a b" if isinstance(empty, str) else ["a b"]
    rows = [{"text": "a b", "summary": empty if i in (2, 5) else right} for i in range(20)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    tiny_summarisation(tmp_path / "other", dataset=str(tmp_path / "data")).prepare()
    assert "column 'summary' of split 'train'" in caplog.text
    assert "is empty in 2 rows, the first of them row 2" in caplog.text
