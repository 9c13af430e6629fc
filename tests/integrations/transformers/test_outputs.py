"""The tensors that a model's output holds, in all the forms that outputs have."""

from dataclasses import dataclass

import pytest
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from regdrop.integrations.transformers.outputs import (
    find_logits,
    find_loss,
    find_tensor,
    named_tensors,
)

LOSS, LOGITS = torch.tensor(1.5), torch.randn(4, 3)


@dataclass
class Record:
    loss: torch.Tensor
    logits: torch.Tensor
    name: str = "no tensor"


NAMED = {
    "mapping": {"loss": LOSS, "logits": LOGITS, "name": "no tensor"},
    "dataclass": Record(LOSS, LOGITS),
    "library": SequenceClassifierOutput(loss=LOSS, logits=LOGITS),
}


@pytest.mark.parametrize("form", NAMED)
def test_tensors_have_the_names_of_the_output(form):
    assert dict(named_tensors(NAMED[form])) == {"loss": LOSS, "logits": LOGITS}
    assert find_tensor(NAMED[form], "logits") is LOGITS
    assert find_loss(NAMED[form]) == LOSS


@pytest.mark.parametrize("form", [tuple, list])
def test_tensors_of_a_sequence_have_positions_and_its_first_is_the_loss(form):
    output = form([LOSS, None, LOGITS])
    assert dict(named_tensors(output)) == {0: LOSS, 2: LOGITS}
    assert find_tensor(output, 2) is LOGITS
    assert find_loss(output) == LOSS


def test_an_output_may_be_the_logits_themselves():
    assert find_tensor(LOGITS, None) is LOGITS
    assert find_logits(LOGITS, 4) == (None, LOGITS)
    assert find_loss(LOGITS) is None
    with pytest.raises(ValueError, match=r"must hold a tensor 'scores', got \[None\]"):
        find_tensor(LOGITS, "scores")


@pytest.mark.parametrize(
    "output", [{"loss": LOGITS}, {"loss": 1.5}, {"loss": torch.tensor(2)}, (), (LOGITS, LOSS), {}]
)
def test_a_loss_is_one_floating_number(output):
    assert find_loss(output) is None


def test_a_loss_has_no_gradient_and_no_dimension():
    found = find_loss({"loss": torch.ones(1, requires_grad=True)})
    assert found.shape == ()
    assert not found.requires_grad


def test_logits_are_asked_for_where_several_outputs_may_be_meant():
    one = {"loss": torch.tensor(1.0), "scores": torch.randn(4, 3)}
    assert find_logits(one, 4)[0] == "scores"
    several = {**one, "states": torch.randn(4, 8)}
    with pytest.raises(ValueError, match="one of them must be called logits"):
        find_logits(several, 4)
    assert find_logits({**several, "pair_logits": torch.randn(4, 2)}, 4)[0] == ("pair_logits")


@pytest.mark.parametrize("kind", [tuple, list, lambda x: dict(enumerate(x))])
def test_logits_of_several_heads_are_named_in_the_message(kind):
    output = {"loss": torch.tensor(1.0), "logits": kind([LOGITS, torch.randn(4, 2)])}
    message = r"of \(4, 3\), \(4, 2\)'\}: return one tensor of 'logits' as logits"
    with pytest.raises(ValueError, match=message):
        find_logits(output, 4)
