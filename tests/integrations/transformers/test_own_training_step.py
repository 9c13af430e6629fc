"""A `training_step` of one's own, as adversarial ones: it divides by the micro-batches itself."""

import pytest
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from models import key_dropout, text_rows, tiny_bert
from regdrop import RDropConfig
from regdrop.integrations.transformers import RDropTrainerMixin
from training import assert_same_rdrop_run, train

SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


class OwnStep:
    """The whole step by hand."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss = loss / self.args.gradient_accumulation_steps
        loss.backward()
        return loss.detach()


class FurtherLoss:
    """The Trainer's step, and a further loss as it is under an attack; here without one."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        further = self.compute_loss(model, self._prepare_inputs(inputs))
        (further / self.args.gradient_accumulation_steps).backward()
        return loss


class Uncounted:
    """One that was written before the Trainer counted items."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs)


class Dropping:
    """A `compute_loss` above the mixin that hands no number of items on, as many are written."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, output = super().compute_loss(model, inputs, return_outputs=True)
        return (loss, output) if return_outputs else loss


class Focal:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        output = model(**inputs)
        nll = F.cross_entropy(output.logits, labels, reduction="none")
        loss = ((1 - (-nll).exp()) ** 2 * nll).mean()
        return (loss, output) if return_outputs else loss


class Counting:
    """A loss that divides by the items that it is given, if it is given any."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        output = model(**inputs)
        items: Tensor | int = len(labels) if num_items_in_batch is None else num_items_in_batch
        loss = F.cross_entropy(output.logits, labels, reduction="sum") / items
        return (loss, output) if return_outputs else loss


def below(*parts):
    return type("Below", (RDropTrainerMixin, type("Own", (*parts, Trainer), {})), {})


def above(*parts):
    own, *rest = parts
    base = type("Base", (*rest, Trainer), {})
    return type("Above", (own, RDropTrainerMixin, base), {})


@pytest.mark.parametrize(
    ("step", "place", "losses"),
    [
        (OwnStep, below, ()),
        (OwnStep, below, (Focal,)),
        (OwnStep, below, (Counting,)),
        (OwnStep, above, ()),
        (OwnStep, above, (Counting,)),
        (Dropping, above, ()),
        (Dropping, above, (Counting,)),
        (Uncounted, below, (Focal,)),
        (Uncounted, above, (Counting,)),
    ],
)
def test_a_step_by_hand_is_the_trainers(tmp_path, step, place, losses):
    """Micro-batches of as many items each make either way of dividing the same."""

    def run(kind, **options):
        model = key_dropout(tiny_bert(dropout=0.3))
        return train(tmp_path, model, text_rows(), RDropConfig(alpha=3.0), kind, **options)

    assert_same_rdrop_run(run(place(step, *losses), **SPLIT), run(below(*losses), **SPLIT))


@pytest.mark.parametrize(
    ("place", "losses"), [(below, ()), (below, (Counting,)), (above, (Focal,))]
)
def test_a_further_loss_has_the_weight_of_the_first(tmp_path, place, losses):
    def run(kind, **options):
        model = key_dropout(tiny_bert(dropout=0.3))
        return train(tmp_path, model, text_rows(), RDropConfig(alpha=3.0), kind, **options)

    once = run(below(*losses), learning_rate=0.2, max_steps=1, **SPLIT)
    twice = run(place(FurtherLoss, *losses), learning_rate=0.1, max_steps=1, **SPLIT)
    for a, b in zip(once.model.parameters(), twice.model.parameters(), strict=True):
        assert a.detach().numpy() == pytest.approx(b.detach().numpy(), rel=1e-4, abs=1e-6)
