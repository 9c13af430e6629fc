import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from regdrop.experiments import build_arms, run_arm, run_arms
from regdrop.experiments.evaluating.evaluate import evaluate
from regdrop.experiments.running import run as run_module
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.tasks import PRESETS
from regdrop.tasks.common.vocabulary import learn_vocabulary
from regdrop.tasks.generate_lines import generate_lines
from regdrop.tasks.translation import task as translation
from regdrop.tasks.translation.bleu import sentence_statistics
from text_data import write_rows
from tiny_tasks import tiny_translation


def test_a_run_learns_and_its_model_translates(tmp_path):
    chosen = tiny_translation(tmp_path)
    folder = tmp_path / "run"
    record = train_run(chosen, build_arms(chosen)["rdrop"], 0, RunPaths.alone(folder))
    losses = [entry["nll"] for entry in record.history if "nll" in entry]
    assert losses[-1] < 0.6 * losses[0]
    assert record.test["nll"] < 0.6 * losses[0]
    assert set(record.test) == {"bleu", "bleu_lowercase", "nll"}
    assert "case:lc" in record.signatures["bleu_lowercase"]
    statistics = np.array(record.examples["test"])
    assert chosen.compute_metrics(statistics) == pytest.approx(record.test, rel=1e-4)

    # The saved model and tokenizer give the same figures, and the texts from which they come.
    assert evaluate(folder, "test").metrics == pytest.approx(record.test, rel=1e-4)
    rows = [json.loads(x) for x in (tmp_path / "data/test.jsonl").read_text().split("\n") if x]
    texts = list(generate_lines(folder / "model", [row["de"] for row in rows], batch_size=5))
    from sacrebleu.metrics import BLEU

    expected = BLEU(lowercase=True).corpus_score(texts, [[row["en"] for row in rows]]).score
    assert 100 * record.test["bleu_lowercase"] == pytest.approx(expected, abs=1e-6)
    assert next(generate_lines(folder / "model", ["", rows[0]["de"]])) == ""


def test_beam_search_finds_at_least_what_greedy_search_does(tmp_path):
    """The likelihood of the best beam is not below the greedy one's, on each sentence."""
    chosen = tiny_translation(
        tmp_path, training=replace(tiny_translation(tmp_path).training, max_steps=40, eval_steps=40)
    )
    train_run(chosen, build_arms(chosen)["baseline"], 0, RunPaths.alone(tmp_path / "run"))
    from transformers import MarianMTModel

    model = MarianMTModel.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    inputs = tokenizer(["good dog", "the cat runs"], return_tensors="pt", padding=True)
    scores = []
    for beams in (1, 8):
        tokens = model.generate(**inputs, num_beams=beams, length_penalty=0.0, max_length=8)
        labels = tokens[:, 1:]
        with torch.no_grad():
            logits = model(**inputs, decoder_input_ids=tokens[:, :-1]).logits
        log_p = logits.log_softmax(-1).gather(2, labels[..., None])[..., 0]
        scores.append((log_p * labels.ne(tokenizer.pad_token_id)).sum(1))
    assert (scores[1] >= scores[0] - 1e-4).all()


def test_case_counts_in_bleu_and_not_in_lower_cased_bleu(tmp_path):
    """The outputs are right but for their case."""
    chosen = tiny_translation(tmp_path)
    right = "two men are talking in the park ."
    both = [
        sentence_statistics([right.upper()], [right], tokenize="13a", lowercase=lowercase)
        for lowercase in (False, True)
    ]
    rows = np.concatenate([*both, [[12.0, 9.0]]], axis=1)
    figures = chosen.compute_metrics(rows)
    assert figures["bleu_lowercase"] == pytest.approx(1.0)
    assert figures["bleu"] < 0.2
    assert figures["nll"] == pytest.approx(12 / 9)


def test_the_last_checkpoints_are_those_of_the_highest_steps(tmp_path, monkeypatch):
    """Of steps with one and with two digits: by their number, not by their name."""
    training = replace(tiny_translation(tmp_path).training, average_checkpoints=2)
    arm = build_arms(tiny_translation(tmp_path, training=training))["baseline"]
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").touch()
    averaged = []
    monkeypatch.setattr(
        run_module, "average_weights", lambda model, folders: averaged.extend(folders)
    )
    trainer = SimpleNamespace(
        model=None,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        state=SimpleNamespace(global_step=10),
        evaluate=dict,
    )
    step, _ = run_module._select(tiny_translation(tmp_path), arm, trainer, None, tmp_path)
    assert step == 10
    assert [folder.name for folder in averaged] == ["checkpoint-8", "checkpoint-10"]


def test_the_mean_of_the_last_checkpoints_is_an_option(tmp_path):
    training = replace(
        tiny_translation(tmp_path).training,
        max_steps=6,
        eval_steps=2,
        logging_steps=2,
        average_checkpoints=2,
    )
    chosen = tiny_translation(tmp_path, training=training)
    seen = []
    original = run_module.average_weights

    def spy(model, folders):
        states = [type(model).from_pretrained(folder).state_dict() for folder in folders]
        original(model, folders)
        name = "model.encoder.layers.0.fc1.weight"
        seen.append((states[0][name] + states[1][name]) / 2)
        assert [folder.name for folder in folders] == ["checkpoint-4", "checkpoint-6"]
        assert torch.allclose(model.state_dict()[name], seen[0], atol=1e-7)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "average_weights", spy)
        record = run_arm(chosen, build_arms(chosen)["baseline"], 0, tmp_path / "out")
    assert len(seen) == 1
    assert record.best_step == 6


def test_an_interrupted_run_goes_on_with_the_same_batches_and_vocabulary(tmp_path, monkeypatch):
    training = replace(
        tiny_translation(tmp_path).training, max_steps=12, eval_steps=4, logging_steps=1
    )
    chosen = tiny_translation(tmp_path, training=training)
    arm = build_arms(chosen)["rdrop"]
    whole = run_arm(chosen, arm, 0, tmp_path / "whole")

    from transformers import TrainerCallback

    from regdrop.tasks.common.generation_trainer import GenerationTrainer

    class AtStep10(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 10:
                raise KeyboardInterrupt

    original = GenerationTrainer.__init__

    def with_stop(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(AtStep10())

    with monkeypatch.context() as patch:
        patch.setattr(GenerationTrainer, "__init__", with_stop)
        with pytest.raises(KeyboardInterrupt):
            run_arm(chosen, arm, 0, tmp_path / "cut")
    resumed = run_arm(chosen, arm, 0, tmp_path / "cut")
    assert resumed.test == pytest.approx(whole.test, rel=1e-5)
    losses = [[e["loss"] for e in r.history if "loss" in e] for r in (whole, resumed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_runs_that_share_a_folder_learn_one_vocabulary(tmp_path, monkeypatch):
    """Also when they begin at the same time."""
    learned = []
    original = translation.learn_vocabulary

    def slowly(*args, **kwargs):
        learned.append(kwargs["size"])
        time.sleep(0.2)
        return original(*args, **kwargs)

    monkeypatch.setattr(translation, "learn_vocabulary", slowly)
    chosen, folder = tiny_translation(tmp_path), tmp_path / "shared" / "vocabulary"
    with ThreadPoolExecutor(3) as pool:
        prepared = list(pool.map(lambda _: chosen.prepare(folder), range(3)))
    assert learned == [80]
    assert len({p.processing_class.backend_tokenizer.to_str() for p in prepared}) == 1


def test_a_comparison_learns_one_vocabulary_and_leaves_nothing_unfinished(tmp_path):
    training = replace(tiny_translation(tmp_path).training, max_steps=2, eval_steps=2)
    chosen = tiny_translation(tmp_path, training=training)
    out = tmp_path / "out"
    records = run_arms(
        chosen, [build_arms(chosen)["baseline"]], seeds=[0, 1], folder=out, threads=1
    )
    assert len(records) == 2
    assert sorted(path.name for path in out.iterdir()) == ["details.npz", "records"]


def test_tested_sentences_are_ordered_by_length_and_scored_with_their_own_reference(tmp_path):
    prepared = tiny_translation(tmp_path).prepare()
    split = prepared.splits["test"]
    decode = prepared.processing_class.decode
    lengths = [len(decode(ids, skip_special_tokens=True)) for ids in split["input_ids"]]
    assert lengths == sorted(lengths)
    labels = np.array([row + [-100] * (12 - len(row)) for row in split["labels"]])
    tokens = np.where(labels < 0, prepared.processing_class.pad_token_id, labels)
    prediction = SimpleNamespace(
        predictions=(tokens, np.ones(len(split))), label_ids=(labels, split["example_id"])
    )
    figures = tiny_translation(tmp_path).compute_metrics(prepared.example_statistics(prediction))
    assert figures["bleu_lowercase"] == pytest.approx(1.0)


def test_a_vocabulary_gives_text_back_and_cuts_punctuation_off():
    texts = ["Zwei Hunde laufen, schnell.", "Two dogs run fast!"] * 3
    tokenizer = learn_vocabulary(texts, size=90, lowercase=True, max_length=50)
    assert len(tokenizer) <= 90
    ids = tokenizer(texts[0])["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == texts[0].lower()
    assert "," in tokenizer.convert_ids_to_tokens(ids)


def parameters(vocabulary, width, feed_forward, layers):
    attention = 4 * (width * width + width)
    fully_connected = 2 * width * feed_forward + feed_forward + width
    norm = 2 * width
    encoder = attention + fully_connected + 2 * norm
    decoder = 2 * attention + fully_connected + 3 * norm
    positions = 2 * 256 * width
    return vocabulary * width + layers * (encoder + decoder) + positions


@pytest.mark.parametrize(
    ("prefix", "sizes", "rate", "alpha"),
    [("iwslt", (10_000, 512, 1024, 6), 0.3, 5), ("wmt14", (32_000, 1024, 4096, 6), 0.1, 5)],
)
def test_paper_presets_have_the_papers_settings_and_sizes(prefix, sizes, rate, alpha):
    from transformers import MarianMTModel

    presets = [task for name, task in PRESETS.items() if name.startswith(prefix)]
    assert len(presets) == {"iwslt": 8, "wmt14": 2}[prefix]

    class Vocabulary(SimpleNamespace):
        def __len__(self):
            return sizes[0]

    for preset in presets:
        config = preset.build_config(Vocabulary(pad_token_id=0, eos_token_id=1))
        with torch.device("meta"):
            model = MarianMTModel(config)
        expected = parameters(*sizes)
        if preset.max_length > 255:
            expected += 2 * (preset.max_length + 1 - 256) * sizes[1]
        assert sum(p.numel() for p in model.parameters()) == expected
        assert preset.rdrop.alpha == alpha
        assert config.dropout == rate
        inner = 0.1 if prefix == "wmt14" else 0.0
        assert config.attention_dropout == config.activation_dropout == inner
        assert preset.training.label_smoothing == 0.1
        assert preset.training.lr_scheduler_type == "inverse_sqrt"
        assert preset.vocabulary_size == sizes[0]
        assert len(build_arms(preset)) == 5


def test_the_hubs_column_of_translations_is_read(tmp_path):
    rows = [{"translation": {"de": f"wort {i}", "en": f"word {i}"}} for i in range(40)]
    write_rows(tmp_path / "hub" / "train.jsonl", rows)
    write_rows(tmp_path / "hub" / "test.jsonl", rows[:5])
    prepared = tiny_translation(tmp_path, dataset=str(tmp_path / "hub")).prepare()
    assert len(prepared.splits["train"]) == 36
    assert len(prepared.splits["validation"]) == 4
    assert len(prepared.splits["test"]) == 5


def test_bad_data_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"\['de', 'fr'\]; it lacks \['fr'\]"):
        tiny_translation(tmp_path, target="fr").prepare()
    write_rows(tmp_path / "test" / "test.jsonl", [{"de": "a", "en": "b"}])
    with pytest.raises(ValueError, match="must have a split 'train'"):
        tiny_translation(tmp_path, dataset=str(tmp_path / "test")).prepare()
    write_rows(tmp_path / "number" / "train.jsonl", [{"de": "a", "en": 3}] * 20)
    with pytest.raises(ValueError, match=r"column .* must hold text, got 3 in row 0"):
        tiny_translation(tmp_path, dataset=str(tmp_path / "number")).prepare()
    write_rows(tmp_path / "long" / "train.jsonl", [{"de": "a " * 30, "en": "b"}] * 20)
    with pytest.raises(ValueError, match="has no pair of 1 to 23 tokens"):
        tiny_translation(tmp_path, dataset=str(tmp_path / "long")).prepare().splits["train"]
    with pytest.raises(ValueError, match=r"data '.*data' has no 'tset': split must be one of"):
        tiny_translation(tmp_path).prepare().splits["tset"]
    both = {"translation": {"de": "a", "en": "b"}, "de": "a", "en": "b"}
    write_rows(tmp_path / "both" / "train.jsonl", [both] * 20)
    with pytest.raises(
        ValueError, match=r"'translation' or in columns .* has both, \['de', 'en'\]"
    ):
        tiny_translation(tmp_path, dataset=str(tmp_path / "both")).prepare()


def test_training_pairs_that_are_left_out_are_counted(tmp_path, caplog):
    rows = [{"de": "a " * (30 if i < 3 else 1), "en": "b"} for i in range(40)]
    write_rows(tmp_path / "long" / "train.jsonl", rows)
    write_rows(tmp_path / "long" / "validation.jsonl", rows[3:6])
    chosen = tiny_translation(tmp_path, dataset=str(tmp_path / "long"))
    assert len(chosen.prepare().splits["train"]) == 37
    assert "split 'train' of data" in caplog.text
    assert "3 of 40 pairs are left out" in caplog.text
