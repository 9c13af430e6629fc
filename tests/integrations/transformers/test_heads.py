from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForPreTraining, BertForSequenceClassification

from models import labels_for, text_rows, tiny_bert, tiny_vit
from regdrop.integrations.transformers import find_head
from regdrop.loss import combine_terms

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
    with pytest.raises(ValueError, match=r"\*ForSequenceClassification.*got BertForPreTraining"):
        find_head(model, {"labels": labels_for(None, 4, 3)})


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match="inputs must hold a tensor named 'labels', got"):
        find_head(tiny_bert(), {"input_ids": torch.ones(2, 3)})


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
