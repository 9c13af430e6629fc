from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForPreTraining, BertForSequenceClassification

from models import labels_for, text_rows, tiny_bert, tiny_vit
from regdrop import repeat_batch
from regdrop.heads import UnknownHeadError
from regdrop.integrations.transformers import find_head
from regdrop.loss import combine_terms
from tiny_batches import tiny_batch
from tiny_models import tiny_model

CASES = [
    ("single_label_classification", 3),
    ("multi_label_classification", 3),
    ("regression", 1),
    ("regression", 3),
]


def one_pass(head, output):
    terms = head.terms(head.outputs(output), head.target, num_passes=1)
    return combine_terms(terms, alpha=0.0, num_passes=1).loss


@pytest.mark.parametrize(("problem_type", "num_labels"), CASES)
@pytest.mark.parametrize("is_given", [True, False])
@pytest.mark.parametrize("size", [1, 5])
def test_one_pass_is_the_models_own_loss(problem_type, num_labels, is_given, size):
    if not is_given and problem_type == "regression" and num_labels > 1:
        is_given = True  # the library infers multi-label there
    model = tiny_bert(num_labels, problem_type if is_given else None, dropout=0.0)
    rows = text_rows(size, num_labels, problem_type)
    head = find_head(model, rows.columns)
    output = model(**rows.columns)
    torch.testing.assert_close(one_pass(head, output), output.loss)


@pytest.mark.parametrize("model", [tiny_bert(), tiny_vit()])
def test_sequences_and_images_are_known(model):
    head = find_head(model, {"labels": labels_for(None, 4, 3)})
    assert head.target.shape == (4,)


def test_options_of_the_likelihood():
    model, logits = tiny_bert(), torch.randn(4, 3)
    labels = labels_for(None, 4, 3)
    head = find_head(model, {"labels": labels}, label_smoothing=0.2, class_weight=(1.0, 2.0, 0.5))
    expected = F.cross_entropy(
        logits, labels, weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.2
    )
    torch.testing.assert_close(one_pass(head, SimpleNamespace(logits=logits)), expected)


@pytest.mark.parametrize(("problem_type", "num_labels"), CASES[1:])
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"class_weight": (1.0, 2.0, 1.0)}])
def test_options_that_an_output_does_not_have_are_refused(problem_type, num_labels, options):
    labels = labels_for(problem_type, 4, num_labels)
    with pytest.raises(ValueError, match="need single-label classification, got problem_type="):
        find_head(tiny_bert(num_labels, problem_type), {"labels": labels}, **options)


def test_class_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match="class_weight must have one entry for each of 3 labels"):
        find_head(tiny_bert(), {"labels": labels_for(None, 4, 3)}, class_weight=(1.0, 2.0))


def test_unknown_heads_are_refused_by_name():
    model = BertForPreTraining(tiny_bert().config)
    with pytest.raises(
        UnknownHeadError, match=r"\*ForSequenceClassif.*got BertForPreTraining; RDrop"
    ):
        find_head(model, {"labels": labels_for(None, 4, 3)})


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match=r"inputs must hold .* 'labels', .*got \['input_ids'\]$"):
        find_head(tiny_bert(), {"input_ids": torch.ones(2, 3)})


@pytest.mark.parametrize(
    ("batch", "names", "renamed"),
    [
        ({"input_ids": 0, "label": 0}, None, "rename 'label' to 'labels'$"),
        (
            {"input_ids": 0, "token_type_ids": 0, "targets": 0},
            None,
            "rename 'targets' to 'labels'$",
        ),
        ({"ids": 0, "goal": 0}, ["goal"], "rename 'goal' to 'labels'$"),
        ({"input_ids": 0}, ["goal"], r"got \['input_ids'\]$"),
    ],
)
def test_labels_under_another_name_are_pointed_out(batch, names, renamed):
    batch = dict.fromkeys(batch, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=f"as the forward of BertForSeq.* calls it, .*{renamed}"):
        find_head(tiny_bert(), batch, label_names=names)


@pytest.mark.parametrize("kind", ["XLNet", "XLM", "Flaubert"])
def test_question_answering_by_a_beam_is_refused(kind):
    ends = {f"{end}_positions": torch.tensor([2]) for end in ("start", "end")}
    model = tiny_model(f"{kind}ForQuestionAnswering")
    with pytest.raises(UnknownHeadError, match=f"^{kind}ForQ.* loss of its own, that of a beam"):
        find_head(model, {"input_ids": torch.ones(1, 7).long(), **ends})


def test_an_unknown_problem_type_is_refused():
    model = tiny_bert()
    model.config.__dict__["problem_type"] = "ranking"
    with pytest.raises(ValueError, match=r"config\.problem_type must be .* got 'ranking'"):
        find_head(model, {"labels": labels_for(None, 4, 3)})


def test_the_model_inside_an_adapter_is_found():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], lora_dropout=0.1)
    model = peft.get_peft_model(tiny_bert(), config)
    assert not isinstance(model, BertForSequenceClassification)
    assert find_head(model, {"labels": labels_for(None, 4, 3)}).target.shape == (4,)


PROMPTS = ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"]
PROMPTED = {
    "CAUSAL_LM": "LlamaForCausalLM",
    "SEQ_2_SEQ_LM": "T5ForConditionalGeneration",
    "SEQ_CLS": "BertForSequenceClassification",
    "TOKEN_CLS": "BertForTokenClassification",
    "QUESTION_ANS": "BertForQuestionAnswering",
}


def prompted(task: str, prompt: str):
    """Return a model with three learned tokens, its batch with padding, and where words begin."""
    peft = pytest.importorskip("peft")
    name = PROMPTED[task]
    model = tiny_model(name)
    batch = tiny_batch(model, name)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 6:] = 0
    torch.manual_seed(1)
    config = getattr(peft, prompt)(task_type=task, num_virtual_tokens=3)
    added = 0 if prompt == "PrefixTuningConfig" or task == "SEQ_2_SEQ_LM" else 3
    return peft.get_peft_model(model, config), batch, added


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("task", PROMPTED)
def test_learned_tokens_before_every_sequence_count_as_they_do_for_peft(task, prompt):
    model, batch, added = prompted(task, prompt)
    model.eval()
    head = find_head(model, batch)
    if task in ("CAUSAL_LM", "TOKEN_CLS"):
        assert head.target.shape == (4, batch["input_ids"].shape[1] + added)
        # Behind learned tokens a language model predicts the first word too.
        first = int(task == "CAUSAL_LM" and added == 0)
        assert head.counts().kl == (batch["labels"][:, first:] != -100).sum()
    own = dict(batch)
    if task == "TOKEN_CLS":
        # PEFT leaves the labels of its tokens to the caller.
        own["labels"] = F.pad(batch["labels"], (added, 0), value=-100)
        assert torch.equal(find_head(model, own).target, head.target)
    torch.testing.assert_close(
        one_pass(head, model(**head.inputs)), model(**own).loss, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("prompt", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_two_passes_over_learned_tokens_differ(prompt):
    model, batch, _ = prompted("CAUSAL_LM", prompt)
    head = find_head(model.train(), batch)
    stacked = repeat_batch(head.inputs)
    terms = head.terms(head.outputs(model(**stacked)), head.target, num_passes=2)
    assert terms.kl.sum() > 1e-3


@pytest.mark.parametrize(
    ("task", "prompt", "options", "found"),
    [
        ("CAUSAL_LM", "CPTConfig", {"cpt_token_ids": [5, 6]}, "PEFT's CPT"),
        (
            "SEQ_2_SEQ_LM",
            "MultitaskPromptTuningConfig",
            {"num_tasks": 2},
            "MULTITASK_PROMPT_TUNING",
        ),
    ],
)
def test_prompts_with_a_loss_of_their_own_are_refused(task, prompt, options, found):
    peft = pytest.importorskip("peft")
    model = tiny_model(PROMPTED[task])
    batch = tiny_batch(model, PROMPTED[task])
    config = getattr(peft, prompt)(task_type=task, num_virtual_tokens=2, **options)
    with pytest.raises(UnknownHeadError, match=f"{PROMPTED[task]} is tuned by .*{found}"):
        find_head(peft.get_peft_model(model, config), batch)


@pytest.mark.parametrize(
    "name",
    [
        "BertForSequenceClassification",
        "BertForQuestionAnswering",
        "MobileNetV2ForSemanticSegmentation",
        "FSMTForConditionalGeneration",
        "EncoderDecoderModel",
    ],
)
def test_outputs_have_names_where_the_config_wants_a_tuple(name):
    model = tiny_model(name)
    batch = tiny_batch(model, name)
    model.config.return_dict = False
    head = find_head(model, batch)
    torch.testing.assert_close(one_pass(head, model(**head.inputs)), model(**batch)[0])


@pytest.mark.parametrize(
    "name", ["M2M100ForConditionalGeneration", "WhisperForConditionalGeneration"]
)
def test_a_decoder_reads_the_labels_moved_right(name):
    model = tiny_model(name)
    batch = tiny_batch(model, name)
    labels = batch["labels"]
    words = find_head(model, batch).inputs["decoder_input_ids"]
    assert (words[:, 0] == model.config.decoder_start_token_id).all()
    assert torch.equal(words[:, 1:], labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0))
    given = batch | {"decoder_input_ids": words + 1}
    assert torch.equal(find_head(model, given).inputs["decoder_input_ids"], words + 1)


def test_the_first_word_of_a_decoder_may_stand_in_the_generation_config():
    name = "M2M100ForConditionalGeneration"
    model = tiny_model(name)
    batch = tiny_batch(model, name)
    model.config.decoder_start_token_id, model.generation_config.decoder_start_token_id = None, 7
    assert (find_head(model, batch).inputs["decoder_input_ids"][:, 0] == 7).all()
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"decoder_start_token_id of M2M100For.* must be set"):
        find_head(model, batch)


def test_labels_stay_as_they_are_where_the_model_writes_into_them():
    name = "FSMTForConditionalGeneration"
    model = tiny_model(name)
    batch = tiny_batch(model, name)
    del batch["decoder_input_ids"]
    labels = batch["labels"].clone()
    head = find_head(model, batch)
    assert torch.equal(batch["labels"], labels)
    assert torch.equal(head.target, labels)
    assert (labels == -100).any()


def test_a_decoder_does_not_see_the_words_that_it_is_to_predict():
    name = "FSMTForConditionalGeneration"
    model = tiny_model(name)
    head = find_head(model, tiny_batch(model, name))
    changed = head.inputs["decoder_input_ids"].clone()
    changed[:, -1] = 9
    logits = [
        model(**head.inputs | {"decoder_input_ids": w}).logits[:, :-1]
        for w in (changed, head.inputs["decoder_input_ids"])
    ]
    torch.testing.assert_close(*logits)


def test_the_first_word_is_hidden_where_the_pair_of_models_hides_it():
    name = "EncoderDecoderModel"
    model = tiny_model(name, decoder_start_token_id=0)
    batch = tiny_batch(model, name)
    head = find_head(model, batch)
    assert head.inputs["decoder_attention_mask"][0].tolist() == [0, 1, 1, 1, 1, 0]
    torch.testing.assert_close(one_pass(head, model(**head.inputs)), model(**batch).loss)


@pytest.mark.parametrize("size", [16, 32])
def test_pixels_that_show_a_thing_or_not(size):
    name = "SegformerForSemanticSegmentation"
    model = tiny_model(name, num_labels=1)
    labels = torch.randint(0, 2, (4, size, size), generator=torch.Generator().manual_seed(0))
    labels[0, :5], labels[1, 2] = 255, -1
    batch = tiny_batch(model, name) | {"labels": labels}
    head = find_head(model, batch)
    output = model(**head.inputs)
    torch.testing.assert_close(one_pass(head, output), model(**batch).loss)
    # The library divides by all pixels; those that are ignored have no divergence.
    logits = torch.cat([head.outputs(output), head.outputs(output) + 1])
    terms = head.terms(logits, head.target, num_passes=2)
    counted = (labels >= 0) & (labels < 2)
    assert head.counts() == (labels.numel(), counted.sum()) == (terms.nll_count, terms.kl_count)
    assert torch.equal(terms.kl > 0, counted)
    rows = torch.tensor([2, 0])
    part = head.terms(torch.cat([logits[rows], logits[rows + 4]]), labels[rows], num_passes=2)
    torch.testing.assert_close(part.kl, terms.kl[rows])


def test_an_auxiliary_head_without_a_weight_is_none():
    name = "UperNetForSemanticSegmentation"
    model = tiny_model(name, use_auxiliary_head=True, auxiliary_in_channels=32)
    batch = tiny_batch(model, name)
    with pytest.raises(UnknownHeadError, match=r"UperNet.* auxiliary head, times 0.4, .*use_aux"):
        find_head(model, batch)
    model.config.auxiliary_loss_weight = 0.0
    head = find_head(model, batch)
    torch.testing.assert_close(one_pass(head, model(**head.inputs)), model(**batch).loss)


def test_frames_are_labelled_by_rows_of_one_and_zeros():
    name = "Wav2Vec2ForAudioFrameClassification"
    model = tiny_model(name)
    batch = tiny_batch(model, name)
    labels = batch["labels"]
    # Indices, also of as many frames as there are classes; rows of another number of classes.
    for wrong in (labels.argmax(-1), labels[:, 0], F.pad(labels, (0, 1))):
        with pytest.raises(
            ValueError, match=r"must be one-hot, \(batch, frames, 3\), .* got shape \(4, "
        ):
            find_head(model, batch | {"labels": wrong})


def test_class_weights_and_unlabelled_items_reach_every_head_of_classes():
    model = tiny_model("BertForTokenClassification")
    batch = tiny_batch(model, "BertForTokenClassification")
    batch["labels"][2] = -1
    head = find_head(model, batch, class_weight=(1.0, 2.0, 0.5), unlabelled_index=-1)
    labelled = batch["labels"] >= 0
    weight = torch.tensor([1.0, 2.0, 0.5])[batch["labels"][labelled]].sum()
    assert head.counts() == (weight, labelled.sum() + 8)


@pytest.mark.parametrize("name", ["Wav2Vec2ForCTC", "UniSpeechForCTC", "ParakeetForCTC"])
def test_frames_behind_the_end_of_a_sound_count_in_neither_term(name):
    model = tiny_model(name)
    batch = tiny_batch(model, name)
    head = find_head(model, batch)
    with torch.no_grad():
        logits = head.outputs(model(**head.inputs))
    frames = head.target[:, 0]
    assert frames[1] < logits.shape[1]
    logits[1, frames[1] :] = float("nan")
    stacked = torch.cat([logits, logits + torch.randn_like(logits)])
    terms = head.terms(stacked, head.target, num_passes=2)
    assert (terms.kl > 0).all()
    assert terms.nll.isfinite().all()
    assert head.counts() == (terms.nll_count, terms.kl_count)
    assert terms.kl_count == (1 if name == "Wav2Vec2ForCTC" else 4)
    # Rows that are chosen keep their numbers of frames.
    rows = torch.tensor([2, 1])
    part = head.terms(
        torch.cat([stacked[rows], stacked[rows + 4]]), head.target[rows], num_passes=2
    )
    torch.testing.assert_close(part.kl, terms.kl[rows])
    torch.testing.assert_close(part.nll, terms.nll[rows])


def test_all_frames_count_where_there_is_no_mask():
    name = "Wav2Vec2ForCTC"
    model = tiny_model(name)
    batch = tiny_batch(model, name)
    del batch["attention_mask"]
    head = find_head(model, batch)
    output = model(**head.inputs)
    assert (head.target[:, 0] == output.logits.shape[1]).all()
    terms = head.terms(output.logits, head.target, num_passes=1)
    torch.testing.assert_close(terms.nll.sum(), model(**batch).loss)


def test_options_of_classes_are_refused_beside_ctc():
    model = tiny_model("Wav2Vec2ForCTC")
    with pytest.raises(ValueError, match=r"need a class for every frame, .* \(Wav2Vec2ForCTC\)"):
        find_head(model, tiny_batch(model, "Wav2Vec2ForCTC"), label_smoothing=0.1)
