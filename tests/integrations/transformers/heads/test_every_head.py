"""Every kind of head: the model's own loss in one pass, and R-Drop in the Trainer."""

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel, Trainer

import reference
from models import Rows
from regdrop import RDropConfig
from regdrop.integrations.transformers import RDropSeq2SeqTrainer, RDropTrainer, find_head
from regdrop.integrations.transformers.forward.micro_batch import auxiliary_loss
from regdrop.integrations.transformers.forward.verify import compare_losses
from regdrop.loss import combine_terms
from tiny_batches import tiny_batch
from tiny_models import tiny_model
from training import build, logged, parameters, train

BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": 1,
    "init_std": 0.3,
}
MODELS = {
    "BertForTokenClassification": ("BertConfig", {**BERT, "num_labels": 4}, "tokens"),
    "BertForMaskedLM": ("BertConfig", BERT, "tokens"),
    "BertForMultipleChoice": ("BertConfig", BERT, "choices"),
    "BertForQuestionAnswering": ("BertConfig", BERT, "spans"),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 16},
        "tokens",
    ),
    "LlamaForCausalLM": ("LlamaConfig", {**BERT, "num_key_value_heads": 1}, "tokens"),
    "MixtralForCausalLM": (
        "MixtralConfig",
        {
            **BERT,
            "num_key_value_heads": 1,
            "num_local_experts": 4,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.5,
        },
        "tokens",
    ),
    "BartForConditionalGeneration": ("BartConfig", SEQ2SEQ, "sequences"),
    "MarianMTModel": ("MarianConfig", SEQ2SEQ, "sequences"),
    "T5ForConditionalGeneration": (
        "T5Config",
        {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        "sequences",
    ),
}


def make(name: str, **options) -> PreTrainedModel:
    torch.manual_seed(4)
    config, sizes, _ = MODELS[name]
    return getattr(transformers, name)(getattr(transformers, config)(**{**sizes, **options}))


def batch_for(name: str, size: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    kind = MODELS[name][2]
    batch = {"input_ids": draw(3, 40, size, 7), "attention_mask": torch.ones(size, 7).long()}
    if kind == "tokens":
        labels = draw(0, MODELS[name][1].get("num_labels", 40), size, 7)
        labels[0, 4:] = labels[1, 2] = -100
        # Nobody predicts the first token; yet transformers 5.23 counts it for GPT-2.
        labels[:, 0] = -100
        return {**batch, "labels": labels}
    if kind == "sequences":
        labels = draw(3, 40, size, 5)
        labels[0, 3:] = -100
        return {**batch, "labels": labels}
    if kind == "choices":
        choices = {"input_ids": draw(3, 40, size, 4, 7)}
        return {**choices, "labels": draw(0, 4, size)}
    # The second answer begins beyond the truncated text.
    return {
        **batch,
        "start_positions": torch.tensor([1, 9, 0])[:size],
        "end_positions": torch.tensor([2, 9, 6])[:size],
    }


def trainer_for(folder, name, model=None, rdrop=None, kind=RDropTrainer, size=8, **options):
    defaults = {"learning_rate": 0.05, "max_steps": 3, "per_device_train_batch_size": 4}
    batch = batch_for(name, 3)
    rows = {k: v.repeat(3, *[1] * (v.dim() - 1))[:size] for k, v in batch.items()}
    rows.setdefault("labels", rows.get("start_positions"))
    if MODELS[name][2] == "spans":
        rows["labels"] = torch.arange(size)  # gives the length alone
    data = Rows(**rows)
    if MODELS[name][2] == "spans":
        data = [{k: v for k, v in data[i].items() if k != "labels"} for i in range(size)]
    model = make(name) if model is None else model
    return build(folder, model, data, rdrop, kind, **{**defaults, **options})


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_one_pass_is_the_models_own_loss(name):
    model, batch = make(name).eval(), batch_for(name)
    before = dict(batch)
    head = find_head(model, batch)
    own = model(**batch)
    output = model(**head.inputs)
    terms = head.terms(head.outputs(output), head.target, num_passes=1)
    loss = combine_terms(terms, alpha=0.0, num_passes=1).loss
    auxiliary = auxiliary_loss(model, output)
    torch.testing.assert_close(loss if auxiliary is None else loss + auxiliary, own.loss)
    assert (auxiliary is not None) == (name == "MixtralForCausalLM")
    counts = head.counts()
    assert terms.kl_count == counts.kl == counts.nll
    assert list(batch) == list(before)
    assert all(batch[key] is value for key, value in before.items())
    assert compare_losses(model, head, batch).agrees


def test_labels_are_held_back_and_nothing_else(name):
    inputs = find_head(make(name), batch_for(name)).inputs
    assert not {"labels", "start_positions", "end_positions"} & set(inputs)
    assert "input_ids" in inputs
    assert ("decoder_input_ids" in inputs) == (MODELS[name][2] == "sequences")


def test_the_shift_of_causal_models_leaves_out_the_last_position():
    batch = batch_for("GPT2LMHeadModel")
    head = find_head(make("GPT2LMHeadModel"), batch)
    assert torch.equal(head.target[:, :-1], batch["labels"][:, 1:])
    assert (head.target[:, -1] == -100).all()
    assert head.counts().kl == (batch["labels"][:, 1:] != -100).sum()


def test_answers_beyond_the_text_count_in_neither_term():
    name = "BertForQuestionAnswering"
    head = find_head(make(name), batch_for(name))
    assert head.counts().kl == 4
    logits = torch.randn(6, 2, 7, dtype=torch.float64)
    terms = head.terms(logits, head.target, num_passes=2)
    assert (terms.kl > 0).tolist() == [[True, True], [False, False], [True, True]]
    # Each of the two heads has its own divergence.
    for i in range(2):
        rows = logits.view(2, 3, 2, 7)[:, 0, i].tolist()
        assert terms.kl[0, i].item() == pytest.approx(reference.symmetric_kl(rows))


def test_rdrop_in_the_trainer(tmp_path, name):
    options = {"attention_dropout": 0.3} if name[:5] in ("Llama", "Mixtr") else {}
    seen = []

    def note(module, args, kwargs):
        if module.training:
            seen.append((len(kwargs["input_ids"]), set(kwargs)))

    model = make(name, **options)
    model.register_forward_pre_hook(note, with_kwargs=True)
    kind = RDropSeq2SeqTrainer if MODELS[name][2] == "sequences" else RDropTrainer
    trainer = trainer_for(tmp_path, name, model, RDropConfig(alpha=2.0), kind)
    trainer.train()
    assert [rows for rows, _ in seen] == [8] * 3
    assert not any({"labels", "start_positions"} & names for _, names in seen)
    kl = logged(trainer, "kl")
    assert len(kl) == 3
    assert min(kl) > 0
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2)])
def test_one_pass_is_the_plain_trainer_where_the_models_loss_is_exact(
    tmp_path, name, batch, accumulation
):
    def run(kind):
        options = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
        }
        rdrop = None if kind is Trainer else RDropConfig(alpha=0.0, num_passes=1)
        trainer = trainer_for(tmp_path, name, rdrop=rdrop, kind=kind, **options)
        trainer.train()
        return parameters(trainer)

    for x, y in zip(run(RDropTrainer), run(Trainer), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_auxiliary_loss_of_experts_is_kept_with_the_weight_of_the_likelihood(tmp_path, scale):
    name = "MixtralForCausalLM"
    trainer = trainer_for(tmp_path, name, rdrop=RDropConfig(alpha=0.0, scale=scale))
    model, batch = trainer.model.train(), batch_for(name)
    with pytest.warns(UserWarning, match="nothing to compare"):
        loss, output = trainer.compute_loss(model, batch, return_outputs=True)
    # No dropout is on: both passes are the same, and the balance of the experts too.
    own = model(**batch).loss
    torch.testing.assert_close(loss, own * (2 if scale == "sum" else 1))
    assert output.aux_loss > 0


def test_auxiliary_losses_of_a_window_add_up_by_their_items(tmp_path):
    name = "MixtralForCausalLM"
    rdrop = RDropConfig(alpha=0.0, num_passes=1)
    trainer = trainer_for(tmp_path, name, rdrop=rdrop)
    model = trainer.model.train()
    whole = batch_for(name)
    parts = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(3)]
    heads = [find_head(model, part) for part in parts]
    count = sum(head.counts().kl for head in heads)
    loss = sum(trainer.compute_loss(model, part, num_items_in_batch=count) for part in parts)
    shares = [head.counts().kl / count for head in heads]
    expected = sum(share * model(**part).loss for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(loss, expected)


def test_experts_are_balanced_in_a_window_without_an_item(tmp_path):
    name = "MixtralForCausalLM"
    rdrop = RDropConfig(alpha=0.0, num_passes=1)
    trainer = trainer_for(tmp_path, name, rdrop=rdrop)
    model, batch = trainer.model.train(), batch_for(name)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    trainer.current_gradient_accumulation_steps = 2
    loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(0))
    balance = auxiliary_loss(model, model(**batch))
    torch.testing.assert_close(loss, balance / 2)
    assert balance > 0


def test_the_check_of_the_loss_leaves_the_run_as_it_was():
    model, batch = make("BertForMaskedLM").train(), batch_for("BertForMaskedLM")
    model.bert.encoder.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert compare_losses(model, find_head(model, batch), batch).agrees
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BertForQuestionAnswering", "need classes, and the ends of an answer are positions"),
        ("BertForMultipleChoice", "class_weight needs classes, and choices are none"),
        ("BertForTokenClassification", "one entry for each of 4 labels of BertFor.*, got 2"),
        ("GPT2LMHeadModel", "one entry for each of 40 labels of GPT2.*, got 2"),
    ],
)
def test_class_weights_that_do_not_fit_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find_head(make(name), batch_for(name), class_weight=(1.0, 2.0))


def test_label_smoothing_of_the_trainer_under_the_causal_shift(tmp_path):
    def run(kind):
        options = {"label_smoothing_factor": 0.2}
        rdrop = None if kind is Trainer else RDropConfig(alpha=0.0, num_passes=1)
        trainer = trainer_for(tmp_path, "GPT2LMHeadModel", rdrop=rdrop, kind=kind, **options)
        trainer.train()
        return parameters(trainer)

    for x, y in zip(run(RDropTrainer), run(Trainer), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_an_auxiliary_loss_without_a_coefficient_is_refused():
    model = make("MixtralForCausalLM")
    output = model(**find_head(model, batch_for("MixtralForCausalLM")).inputs)
    model.config = transformers.BertConfig()
    with pytest.raises(ValueError, match="BertConfig has no router_aux_loss_coef"):
        auxiliary_loss(model, output)


TINY = [
    "ASTForAudioClassification",
    "BartForCausalLM",
    "BertForNextSentencePrediction",
    "EncoderDecoderModel",
    "M2M100ForConditionalGeneration",
    "SegformerForSemanticSegmentation",
    "UniSpeechForCTC",
    "VideoMAEForVideoClassification",
    "Wav2Vec2ForAudioFrameClassification",
    "WhisperForConditionalGeneration",
]


def train_tiny(folder, name, rdrop, **options):
    """Train a small model on eight rows, and return its trainer."""
    model = tiny_model(name)
    columns = tiny_batch(model, name, rows=8)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module  # no statistics of a batch
    return train(folder, model, Rows(**columns), rdrop, learning_rate=0.05, **options)


@pytest.mark.parametrize("name", TINY)
def test_sounds_pictures_and_pairs_of_models_in_the_trainer(tmp_path, name, caplog):
    rdrop = RDropConfig(alpha=1.0)
    kl = logged(train_tiny(tmp_path, name, rdrop, per_device_train_batch_size=4), "kl")
    assert len(kl) == 2
    assert min(kl) > 1e-4
    assert "R-Drop" not in caplog.text  # its loss is known, so that nothing is said


@pytest.mark.parametrize("name", TINY)
def test_small_batches_of_a_window_are_one_large_batch(tmp_path, name, monkeypatch):
    monkeypatch.setattr("tiny_models.DROPOUT", 0.0)
    rdrop = RDropConfig(alpha=0.0, num_passes=1)

    def run(rows, steps):
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        return parameters(train_tiny(tmp_path, name, rdrop, **options))

    for x, y in zip(run(4, 1), run(1, 4), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
