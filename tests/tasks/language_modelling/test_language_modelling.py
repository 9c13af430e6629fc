import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from regdrop.experiments import build_arms, run_arm
from regdrop.experiments.evaluating.evaluate import evaluate
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.tasks import PRESETS
from regdrop.tasks.common.vocabulary import learn_words
from regdrop.tasks.generate_lines import generate_lines
from regdrop.tasks.language_modelling.task import WordBlocks
from text_data import WORDS, write_rows
from tiny_tasks import tiny_language_modelling

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("kind", ["ptb", "ptb-adaptive"])
def test_a_run_learns_and_its_perplexity_is_that_of_every_word(tmp_path, kind):
    chosen = tiny_language_modelling(tmp_path, kind)
    folder = tmp_path / "run"
    record = train_run(chosen, build_arms(chosen)["rdrop"], 0, RunPaths.alone(folder))
    losses = [entry["nll"] for entry in record.history if "nll" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert min(entry["kl"] for entry in record.history if "kl" in entry) > 0
    assert record.test["perplexity"] == pytest.approx(np.exp(record.test["nll"]))
    assert evaluate(folder, "test").metrics == pytest.approx(record.test, rel=1e-4)

    # Word by word, each predicted from the eight to eleven before it.
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lines = [json.loads(x)["text"] for x in (tmp_path / "data/test.jsonl").open()]
    words = [tokenizer.eos_token_id, *(w for line in lines for w in tokenizer(line).input_ids)]
    assert len(words) == 1 + sum(len(line.split()) + 1 for line in lines)
    total = 0.0
    for i in range(1, len(words)):
        first = max(0, (i - 1) // 4 * 4 - 8)
        with torch.no_grad():
            logits = model(torch.tensor([words[first:i]])).logits[0, -1]
        total -= logits.log_softmax(-1)[words[i]].item()
    assert record.test["nll"] == pytest.approx(total / (len(words) - 1), rel=1e-4)

    texts = list(generate_lines(folder / "model", ["good bad", ""]))
    assert len(texts) == 2
    assert set(" ".join(texts).split()) <= set(WORDS)


def test_blocks_count_every_word_once_with_its_context():
    words = torch.arange(30)
    for context in (0, 3):
        seen = []
        for block in WordBlocks(words, 8, context):
            inputs, labels = block["input_ids"], block["labels"]
            assert len(inputs) == len(labels) <= 9
            counted = [label for label in labels if label != -100]
            assert all(label in (-100, word) for word, label in zip(inputs, labels, strict=True))
            before = labels.index(counted[0])
            assert before > min(context, counted[0] - 1)
            seen += counted
        assert seen == list(range(1, 30))
    with pytest.raises(ValueError, match="at least one word"):
        WordBlocks(words[:1], 8)


def test_a_test_has_blocks_of_its_own_size(tmp_path):
    prepared = tiny_language_modelling(
        tmp_path, block_size=16, test_block_size=6, context_window=4
    ).prepare()
    longest = {name: max(len(b["input_ids"]) - 1 for b in prepared.splits[name]) for name in SPLITS}
    assert longest == {"train": 16, "validation": 16, "test": 6}
    counted = [sum(x != -100 for x in b["labels"]) for b in prepared.splits["test"]]
    assert set(counted[:-1]) == {2}
    assert sum(counted) == len(prepared.splits["test"].words) - 1
    with pytest.raises(ValueError, match="from 0 to below the 6 words that a test"):
        tiny_language_modelling(tmp_path, test_block_size=6, context_window=6).prepare()


def test_words_are_numbered_by_frequency_and_rare_ones_are_unknown():
    texts = ["a b b c", "b a"]
    tokenizer = learn_words(texts, size=None)
    assert tokenizer.get_vocab() == {"</s>": 0, "<unk>": 1, "b": 2, "a": 3, "c": 4}
    assert tokenizer(["b c z"])["input_ids"] == [[2, 4, 1, 0]]
    assert len(learn_words(texts, size=4)) == 4
    # A text with unknown words of its own has them among the others.
    assert learn_words(["<unk> a <unk>"], size=None).get_vocab() == {"</s>": 0, "<unk>": 1, "a": 2}
    assert "<unk>" in learn_words(["a b <unk> a b"], size=3).get_vocab()


def test_a_part_of_the_training_text_is_its_first_words(tmp_path):
    chosen = tiny_language_modelling(tmp_path, train_words=20)
    prepared = chosen.prepare()
    blocks = prepared.splits["train"]
    assert len(blocks.words) == 1 + 20
    with pytest.raises(ValueError, match="train_words must be at most the"):
        tiny_language_modelling(tmp_path, train_words=100_000).prepare()


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1, ""),
        (2, "a"),
        (3, "a b"),
        (4, "a b /"),
        (5, "a b / c"),
        (6, "a b / c /"),
        (7, "a b / c / d"),
    ],
)
def test_a_stream_that_is_cut_has_its_number_of_words_wherever_a_line_ends(
    tmp_path, limit, expected
):
    lines = ["a b", "c", "d e f g h", "i"]
    stream = tiny_language_modelling(tmp_path, train_words=limit)._stream("train", {"text": lines})
    cut = list(stream)
    assert sum(len(line.split()) + 1 for line in cut) == limit
    assert " / ".join(cut).strip() == expected


def test_a_cut_of_the_training_text_leaves_the_other_splits_whole(tmp_path):
    whole, cut = (
        tiny_language_modelling(tmp_path, train_words=words).prepare() for words in (None, 20)
    )
    assert len(cut.splits["train"].words) == 21 < len(whole.splits["train"].words)
    for name in ("validation", "test"):
        ours, theirs = cut.splits[name], whole.splits[name]
        assert (ours.block_size, ours.context) == (theirs.block_size, theirs.context)
        assert len(ours.words) == len(theirs.words)
        assert [len(b["labels"]) for b in ours] == [len(b["labels"]) for b in theirs]
    assert cut.splits["validation"].context == 0
    assert cut.splits["test"].context == 8


def test_the_unknown_word_has_a_number_within_and_beyond_the_kept_words():
    texts = ["a a a <unk> <unk> b"]
    within = learn_words(texts, size=4)
    assert within.get_vocab() == {"</s>": 0, "a": 1, "<unk>": 2, "b": 3}
    assert within(["z <unk> b"])["input_ids"] == [[2, 2, 3, 0]]
    # Too rare to be among the kept ones it takes the place of the last of them.
    beyond = learn_words(["a a a b b <unk>"], size=3)
    assert beyond.get_vocab() == {"</s>": 0, "a": 1, "<unk>": 2}
    assert beyond(["b z a"])["input_ids"] == [[2, 2, 1, 0]]


def test_bad_data_and_settings_are_named(tmp_path):
    good = tiny_language_modelling(tmp_path)
    with pytest.raises(ValueError, match="context_window must be from 0 to below the 12 words"):
        replace(good, context_window=12).prepare()
    rows = [{"text": "a b"}]
    for name in ("train", "validation", "test"):
        write_rows(tmp_path / "wrong" / f"{name}.jsonl", [{"words": "a b"}])
        write_rows(tmp_path / "numbers" / f"{name}.jsonl", [{"text": 3}])
    write_rows(tmp_path / "lone" / "train.jsonl", rows)
    for folder, message in (
        ("wrong", r"must have the columns \['text'\]"),
        ("numbers", "must hold text, got 3"),
        ("lone", "must have a split 'validation'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(good, dataset=str(tmp_path / folder)).prepare()
    model_config = {
        **tiny_language_modelling(tmp_path, "ptb-adaptive").model_config,
        "cutoffs": [5, 100],
    }
    wrong = replace(tiny_language_modelling(tmp_path, "ptb-adaptive"), model_config=model_config)
    with pytest.raises(ValueError, match="cutoffs must rise and be between 1 and"):
        run_arm(wrong, build_arms(wrong)["rdrop"], 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "vocabulary", "expected"),
    [
        # Embeddings; 12 layers of 4 products and biases, 2 of the feed-forward, 2 norms; last norm.
        (
            "wikitext103",
            267_744,
            267_744 * 768
            + 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768)
            + 2 * 768,
        ),
        # The paper's 247 million: bands of 1024, 256 and 64, their projections, two tails' rows.
        (
            "wikitext103-adaptive",
            267_744,
            20_000 * 1024
            + 40_000 * 256
            + 207_744 * 64
            + 1024 * (1024 + 256 + 64 + 2)
            + 16 * (4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024),
        ),
    ],
)
def test_the_papers_models_have_their_size(name, vocabulary, expected):
    tokenizer = learn_words(["a"], size=None)
    tokenizer.add_tokens([f"w{i}" for i in range(vocabulary - len(tokenizer))])
    config = PRESETS[name].build_config(tokenizer)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == expected
    if name == "wikitext103-adaptive":
        assert expected == pytest.approx(247e6, rel=0.01)


def test_perplexity_does_not_depend_on_label_smoothing(tmp_path):
    from regdrop.experiments.running.building import build_trainer

    figures = []
    for smoothing in (0.0, 0.3):
        chosen = tiny_language_modelling(tmp_path)
        training = replace(chosen.training, label_smoothing=smoothing)
        chosen = replace(chosen, training=training)
        prepared = chosen.prepare()
        torch.manual_seed(0)
        arm = build_arms(chosen)["baseline"]
        model = prepared.build_model()
        trainer = build_trainer(chosen, arm, 0, tmp_path / "out", prepared, model)
        statistics = prepared.example_statistics(trainer.predict(prepared.splits["test"]))
        figures.append(chosen.compute_metrics(statistics)["perplexity"])
    assert figures[0] == figures[1]


def test_the_end_of_a_sentence_has_an_embedding_like_any_other(tmp_path):
    for kind in ("ptb", "ptb-adaptive"):
        model = tiny_language_modelling(tmp_path, kind).prepare().build_model()
        embedding = model.get_input_embeddings()
        vectors = embedding(torch.arange(5))
        assert vectors[0].norm() > 0.3 * vectors[1:].norm(dim=1).mean()
        vectors[0].sum().backward()
        table = embedding.bands[0] if "adaptive" in kind else embedding
        assert table.weight.grad[0].abs().min() > 0


def test_the_softmax_computes_in_the_autocast_dtype_of_its_forward(tmp_path):
    model = tiny_language_modelling(tmp_path, "ptb-adaptive").prepare().build_model()
    words = torch.tensor([[1, 2, 3, 8]])
    for is_cast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            states = model(words, return_logits=False).softmax_states
        softmax = model.adaptive_softmax()
        assert {tail(states.float()).dtype for tail in softmax.tail} == {dtype}
    assert model(words, labels=words).loss.dtype == torch.float32


def test_bands_are_initialised_by_their_own_width():
    from regdrop.tasks.language_modelling.adaptive_input import (
        AdaptiveInputConfig,
        AdaptiveInputForCausalLM,
    )

    config = AdaptiveInputConfig(
        vocab_size=3_000, d_model=64, ffn_dim=16, num_layers=1, attention_heads=2, cutoffs=[99, 999]
    )
    torch.manual_seed(0)
    embedding = AdaptiveInputForCausalLM(config).get_input_embeddings()
    for band, width in zip(embedding.bands, (64, 16, 4), strict=True):
        assert band.weight.shape[1] == width
        assert band.weight.std().item() == pytest.approx(width**-0.5, rel=0.05)
    words = torch.tensor([5, 500, 2_000])
    norms = embedding(words).norm(dim=1)
    assert norms.max() < 4 * norms.min()


def test_presets_have_the_papers_settings():
    plain, adaptive = PRESETS["wikitext103"], PRESETS["wikitext103-adaptive"]
    assert {task.rdrop.alpha for task in (plain, adaptive)} == {1.0}
    assert plain.training.max_steps == 50_000
    assert plain.training.lr_scheduler_type == "inverse_sqrt"
    assert plain.training.batch_size * plain.block_size == 8 * 16 * 3 * 512
    assert plain.model_config["activation_function"] == "gelu"
    assert plain.model_config["attention_dropout"] == 0.1
    assert adaptive.training.max_steps == 320_000
    assert plain.context_window == adaptive.context_window == 400
    assert (plain.test_block_size or plain.block_size) == adaptive.test_block_size == 512
    assert adaptive.training.optim_args == "momentum=0.99,nesterov=true"
    assert (adaptive.training.max_grad_norm, adaptive.block_size) == (0.1, 3072)
    assert plain.model_config["dropout"] == adaptive.model_config["dropout"] == 0.1


def test_the_adaptive_models_optimiser_is_nesterovs_with_a_cosine(tmp_path):
    from regdrop.experiments.running.building import build_trainer

    chosen = tiny_language_modelling(
        tmp_path, "ptb-adaptive", training=PRESETS["wikitext103-adaptive"].training
    )
    prepared = chosen.prepare()
    trainer = build_trainer(
        chosen,
        build_arms(chosen)["rdrop"],
        0,
        Path(tmp_path / "out"),
        prepared,
        prepared.build_model(),
        train=prepared.splits["train"],
        validation=prepared.splits["validation"],
    )
    trainer.create_optimizer_and_scheduler(320_000)
    group = trainer.optimizer.param_groups[0]
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert (group["momentum"], group["nesterov"]) == (0.99, True)
    rate = trainer.lr_scheduler.lr_lambdas[0]
    assert rate(16_000) == pytest.approx(1.0)
    assert rate(168_000) == pytest.approx(0.5)


def test_an_interrupted_run_goes_on_with_the_same_words(tmp_path):
    chosen = tiny_language_modelling(tmp_path, "ptb-adaptive")
    chosen = replace(
        chosen, training=replace(chosen.training, max_steps=12, eval_steps=4, logging_steps=1)
    )
    arm = build_arms(chosen)["rdrop"]
    whole = run_arm(chosen, arm, 0, tmp_path / "whole")

    def stop(step, figures):
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_arm(chosen, arm, 0, tmp_path / "cut", progress=stop)
    assert run_arm(chosen, arm, 0, tmp_path / "cut").test == pytest.approx(whole.test, rel=1e-5)


_OTHER_DECODERS = {
    "gpt2": {"n_embd": 16, "n_inner": 16, "n_layer": 1, "n_head": 2},
    "bart": {
        "d_model": 16,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 16,
    },
    "bert": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}


@pytest.mark.parametrize("kind", _OTHER_DECODERS)
def test_every_class_is_scored_by_the_next_word_whatever_its_own_loss_is(tmp_path, kind):
    config = {"model_type": kind, **_OTHER_DECODERS[kind]}
    chosen = tiny_language_modelling(tmp_path, model_config=config)
    chosen = replace(chosen, training=replace(chosen.training, max_steps=2, eval_steps=2))
    folder = tmp_path / "run"
    record = train_run(chosen, build_arms(chosen)["rdrop"], 0, RunPaths.alone(folder))
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    nll, count = 0.0, 0
    for block in WordBlocks(chosen.prepare(folder / "model").splits["test"].words, 12, 8):
        words = torch.tensor(block["input_ids"])
        with torch.no_grad():
            log_p = model(words[None]).logits[0].log_softmax(-1)
        for i, label in enumerate(block["labels"]):
            if label != -100:
                nll -= log_p[i - 1, label].item()
                count += 1
    assert record.test["nll"] == pytest.approx(nll / count, rel=1e-4)
    # What the model itself would minimise is the same: nobody learns to copy.
    own = 0.0
    for block in chosen.prepare(folder / "model").splits["test"]:
        batch = {name: torch.tensor([value]) for name, value in block.items()}
        with torch.no_grad():
            own += model(**batch).loss.item() * sum(label != -100 for label in block["labels"])
    assert own == pytest.approx(nll, rel=1e-4)


def test_moved_labels_are_the_next_words_and_count_the_same():
    words = torch.arange(30)
    for own, moved in zip(
        WordBlocks(words, 8, 3), WordBlocks(words, 8, 3, moves_labels=True), strict=True
    ):
        assert own["input_ids"] == moved["input_ids"]
        assert moved["labels"] == [*own["labels"][1:], -100]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**_OTHER_DECODERS["bert"], "is_decoder": False}, "BertLMHeadModel sees the words"),
        (
            {**_OTHER_DECODERS["bert"], "model_type": "roberta"},
            "RobertaForCausalLM cannot read blocks of words, which have no padding word",
        ),
        (
            {**_OTHER_DECODERS["gpt2"], "model_type": "gpt2", "n_positions": 12},
            "block_size must be at most 11: GPT2LMHeadModel has positions for 12 tokens; got 12",
        ),
    ],
)
def test_models_that_cannot_do_the_task_are_named_before_it_begins(tmp_path, config, message):
    chosen = tiny_language_modelling(tmp_path, model_config={"model_type": "bert", **config})
    with pytest.raises(ValueError, match=message):
        run_arm(chosen, build_arms(chosen)["rdrop"], 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_looking_ahead_is_looked_for_without_drawing_from_the_runs_generator(tmp_path):
    prepared = tiny_language_modelling(tmp_path).prepare()
    torch.manual_seed(0)
    model = prepared.build_model()
    assert model.training
    after = torch.rand(1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model.config)
    assert torch.equal(after, torch.rand(1))


def test_a_saved_model_is_evaluated_on_no_more_words_than_it_has_positions_for(tmp_path):
    config = {"model_type": "gpt2", **_OTHER_DECODERS["gpt2"]}
    chosen = tiny_language_modelling(tmp_path, model_config=config)
    prepared = chosen.prepare(tmp_path / "saved")
    prepared.build_model().save_pretrained(tmp_path / "saved")
    longer = replace(chosen, block_size=20).prepare(tmp_path / "saved")
    with pytest.raises(ValueError, match="block_size must be at most 12"):
        longer.load_model(tmp_path / "saved")


def test_a_prompt_is_told_of_unknown_words_and_refused_beyond_the_positions(tmp_path, caplog):
    config = {"model_type": "gpt2", **_OTHER_DECODERS["gpt2"]}
    prepared = tiny_language_modelling(tmp_path, model_config=config).prepare()
    folder = tmp_path / "saved"
    prepared.build_model().save_pretrained(folder)
    prepared.processing_class.save_pretrained(folder)
    (text,) = generate_lines(folder, ["good zyzzyva bad"])
    assert text.startswith("good bad")
    assert "Words that the model does not know are left out: zyzzyva" in caplog.text
    # 13 positions: the end of a sentence before the line, and 12 words.
    (text,) = generate_lines(folder, ["good " * 12])
    assert 12 <= len(text.split()) <= 13
    with pytest.raises(ValueError, match=r"at most 12 words, .* got 13: 'good good"):
        list(generate_lines(folder, ["good " * 13]))


def test_many_unknown_words_are_said_when_a_split_is_read(tmp_path, caplog):
    splits = tiny_language_modelling(tmp_path, vocabulary_size=3).prepare().splits
    splits["test"]
    assert "of the words of split 'test' of data" in caplog.text
    assert "are unknown to the vocabulary" in caplog.text
    caplog.clear()
    tiny_language_modelling(tmp_path).prepare().splits["test"]
    assert not caplog.text
