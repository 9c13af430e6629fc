"""A loss that the model or the trainer computes, beside the divergence of its logits."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate
from transformers import DPTConfig, DPTForSemanticSegmentation, Trainer

from models import Rows, key_dropout, text_rows, tiny_bert, tiny_gpt2, token_rows
from regdrop import RDropConfig, symmetric_kl
from regdrop.integrations.transformers import RDropTrainer, RDropTrainerMixin
from training import (
    FEATURES,
    NamedRows,
    Plain,
    assert_same_run,
    build,
    logged,
    number_rows,
    parameters,
    record_scores,
    said,
    train,
)

ONE_PASS = RDropConfig(alpha=0.0, num_passes=1)
OWN = RDropConfig(alpha=2.0, likelihood="model")
KEPT = {"remove_unused_columns": False}
SIZE = 16
LABELS = torch.randint(0, 3, (SIZE,), generator=torch.Generator().manual_seed(3))


def focal(logits, target, reduction="mean"):
    entropy = F.cross_entropy(logits, target, reduction="none")
    loss = (1 - (-entropy).exp()) ** 2 * entropy
    return loss.mean() if reduction == "mean" else loss.sum()


class FocalTrainer(Trainer):
    """The way most trainers of one's own are written."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = focal(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class KeywordsTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = focal(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class OldTrainer(Trainer):
    """One that was written before the Trainer counted items."""

    def compute_loss(self, model, inputs, return_outputs=False):
        outputs = model(**inputs)
        loss = focal(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs)


class PenaltyTrainer(Trainer):
    """One that adds to the Trainer's own loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        loss = loss + 0.1 * outputs["logits"].square().mean()
        return (loss, outputs) if return_outputs else loss


class CountingTrainer(Trainer):
    """One that divides by the items of the whole window."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        loss = focal(outputs.logits, inputs["labels"], "sum")
        count = len(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch
        loss = loss / count
        return (loss, outputs) if return_outputs else loss


def mixed(kind):
    return type(f"Mixed{kind.__name__}", (RDropTrainerMixin, kind), {})


def func(outputs, labels, num_items_in_batch=None):
    loss = focal(outputs["logits"] if "logits" in outputs else outputs["scores"], labels, "sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


# --- one pass is the run without R-Drop -------------------------------------------------------


@pytest.mark.parametrize("kind", [FocalTrainer, KeywordsTrainer, PenaltyTrainer, CountingTrainer])
def test_the_loss_of_a_trainer_below_the_mixin_is_minimised(tmp_path, kind, caplog):
    plain = train(tmp_path, tiny_bert(), text_rows(), kind=kind)
    with caplog.at_level(logging.WARNING):
        ours = train(tmp_path, tiny_bert(), text_rows(), ONE_PASS, mixed(kind))
    assert_same_run(ours, plain)
    assert logged(ours, "nll") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert len(said(caplog)) == 1
    told = f"the loss is that of {kind.__name__}.compute_loss; that loss is minimised as it is"
    assert told in said(caplog)[0]
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_a_trainer_without_a_number_of_items_evaluates_and_trains(tmp_path):
    trainer = build(tmp_path, tiny_bert(), text_rows(), OWN, mixed(OldTrainer))
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.train()
    assert min(logged(trainer, "kl")) > 0


@pytest.mark.parametrize("is_known", [True, False])
def test_a_compute_loss_func_is_minimised(tmp_path, is_known, caplog):
    def run(kind, rdrop=None, **options):
        model = tiny_bert() if is_known else Plain(F.cross_entropy)
        rows = text_rows() if is_known else number_rows(LABELS)
        further = {"compute_loss_func": func}
        return train(tmp_path, model, rows, rdrop, kind, further, **options, **KEPT)

    plain = run(Trainer)
    with caplog.at_level(logging.WARNING):
        ours = run(RDropTrainer, ONE_PASS)
    assert_same_run(ours, plain)
    assert "the loss is that of compute_loss_func" in said(caplog)[0]
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    # Without dropout it would be one large batch; with it the run is the Trainer's.
    assert_same_run(run(RDropTrainer, ONE_PASS, **split), run(Trainer, **split))


class StrictPlain(nn.Module):
    """A model whose forward takes no other keywords, such as a number of items."""

    def __init__(self):
        super().__init__()
        self.inner = Plain(F.cross_entropy)

    def forward(self, x, labels=None):
        found = self.inner(x, labels=labels)
        return {"logits" if name == "scores" else name: value for name, value in found.items()}


@pytest.mark.parametrize("kind", [PenaltyTrainer, RDropTrainer])
def test_a_model_that_takes_no_number_of_items_is_given_none(tmp_path, kind):
    """By the Trainer's own compute_loss, on which one's own or a compute_loss_func builds."""
    further = {"compute_loss_func": func} if kind is RDropTrainer else {}
    base = Trainer if kind is RDropTrainer else kind
    own = RDropTrainer if kind is RDropTrainer else mixed(kind)
    plain = train(tmp_path, StrictPlain(), number_rows(LABELS), None, base, further)
    ours = train(tmp_path, StrictPlain(), number_rows(LABELS), ONE_PASS, own, further)
    assert_same_run(ours, plain)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def crf(scores, tags):
    """Return the mean over sentences of the negative log-likelihood of a chain of tags."""
    step = 0.3 * torch.eye(scores.shape[-1])
    path = scores.gather(2, tags[..., None]).sum((1, 2)) + step[tags[:, :-1], tags[:, 1:]].sum(1)
    alphas = scores[:, 0]
    for t in range(1, scores.shape[1]):
        alphas = torch.logsumexp(alphas[:, :, None] + step, 1) + scores[:, t]
    return (alphas.logsumexp(1) - path).mean()


def weighted(scores, labels):
    return F.cross_entropy(scores, labels, weight=torch.tensor([1.0, 5.0, 0.2]))


TAGS = torch.randint(0, 3, (SIZE, 5), generator=torch.Generator().manual_seed(3))
MODELS = {
    "focal": (focal, LABELS, None),
    "CRF": (crf, TAGS, 5),
    "weighted": (weighted, LABELS, None),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_loss_of_the_models_own_is_minimised(tmp_path, case, caplog):
    criterion, labels, positions = MODELS[case]

    def run(kind, rdrop=None):
        rows = number_rows(labels, SIZE, positions)
        return train(tmp_path, Plain(criterion), rows, rdrop, kind, **KEPT)

    plain = run(Trainer)
    with caplog.at_level(logging.WARNING):
        ours = run(RDropTrainer, ONE_PASS)
    assert_same_run(ours, plain)
    told = "minimised as it is, beside the KL of output 'scores', read as scores of classes"
    assert told in said(caplog)[0]


# --- the objective ----------------------------------------------------------------------------


def expected(criterion, scores, labels, config):
    """Return loss, likelihood and divergence from the scores of all passes."""
    passes = torch.cat(scores).chunk(config.num_passes)
    nll = sum(criterion(s, labels) for s in passes) / len(passes)
    kl = symmetric_kl(torch.cat(passes), num_passes=len(passes))
    factor = len(passes) if config.scale == "sum" else 1
    return factor * nll + config.alpha * factor / len(passes) * kl, nll, kl


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_passes": 3},
        {"scale": "sum"},
        {"passes": "sequential"},
    ],
    ids=["two", "three", "sum", "sequential"],
)
def test_the_loss_is_the_own_one_and_the_divergence(tmp_path, case, options):
    criterion, labels, positions = MODELS[case]
    config = RDropConfig(alpha=1.5, likelihood="model", **options)
    model = Plain(criterion)
    seen = record_scores(model)
    trainer = train(
        tmp_path, model, number_rows(labels, SIZE, positions), config, max_steps=1, **KEPT
    )
    loss, nll, kl = expected(criterion, seen, labels[:8], config)
    assert kl > 0
    assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-4)]
    assert logged(trainer, "nll") == [pytest.approx(nll.item(), rel=1e-4)]
    assert logged(trainer, "kl") == [pytest.approx(kl.item(), rel=1e-4)]
    assert len(seen) == (config.num_passes if "passes" in options else 1)


def test_padding_is_no_item_of_the_divergence(tmp_path):
    """A tagger's labels are padded by a label, as a chain of tags needs: the mask tells."""

    class Tagger(Plain):
        def forward(self, x, attention_mask, labels=None):
            return super().forward(x, labels=labels)

    rows = number_rows(TAGS, SIZE, 5)
    mask = torch.arange(5) < torch.arange(SIZE)[:, None] % 4 + 2
    rows.columns["attention_mask"] = mask.long()
    model = Tagger(crf)
    seen = record_scores(model)
    trainer = train(tmp_path, model, rows, RDropConfig(), max_steps=1)
    kl = symmetric_kl(seen[0], mask=mask[:8])
    assert logged(trainer, "kl") == [pytest.approx(kl.item(), rel=1e-4)]


def test_every_second_step_and_a_part_of_the_batch(tmp_path):
    config = RDropConfig(alpha=1.5, likelihood="model", every_n_steps=2, start_step=1, scale="sum")
    model = Plain(focal)
    seen = record_scores(model)
    trainer = train(tmp_path, model, number_rows(LABELS), config, max_steps=2, **KEPT)
    assert [len(scores) for scores in seen] == [8, 16]
    first = 2 * focal(seen[0], LABELS[:8])
    passes = seen[1].chunk(2)
    nll = sum(focal(s, LABELS[8:]) for s in passes)
    second = nll + 2 * 1.5 * symmetric_kl(seen[1])
    assert logged(trainer, "loss") == pytest.approx([first.item(), second.item()], rel=1e-4)

    config = RDropConfig(alpha=1.5, likelihood="model", fraction=0.5)
    model = Plain(focal)
    seen = record_scores(model)
    trainer = train(tmp_path, model, number_rows(LABELS), config, max_steps=1, **KEPT)
    assert [len(scores) for scores in seen] == [8, 4]
    assert logged(trainer, "nll") == [pytest.approx(focal(seen[0], LABELS[:8]).item(), rel=1e-4)]
    assert logged(trainer, "loss")[0] == pytest.approx(
        logged(trainer, "nll")[0] + 1.5 / 2 * logged(trainer, "kl")[0], rel=1e-4
    )


def quiet(function, *args, **kwargs):
    with pytest.warns(UserWarning, match="R-Drop has nothing to compare"):
        return function(*args, **kwargs)


@pytest.mark.parametrize(("case", "num_passes"), [("focal", 2), ("CRF", 3)])
def test_one_backward_pass_without_dropout_has_the_whole_gradient(tmp_path, case, num_passes):
    criterion, labels, positions = MODELS[case]

    def run(**options):
        config = RDropConfig(likelihood="model", num_passes=num_passes, **options)
        rows = number_rows(labels, SIZE, positions)
        return quiet(train, tmp_path, Plain(criterion, dropout=0.0), rows, config, **KEPT)

    assert_same_run(run(backward_passes=1), run())


def test_a_known_head_keeps_its_divergence(tmp_path):
    """A causal model's own loss moves the labels by one; so does the divergence's mask."""
    model = tiny_gpt2()
    seen = record_scores(model, "logits")
    rows = token_rows(8)
    trainer = train(tmp_path, model, rows, OWN, max_steps=1)
    counted = rows.columns["labels"][:, 1:] != -100
    kl = symmetric_kl(seen[0][:, :-1], mask=counted)
    assert logged(trainer, "kl") == [pytest.approx(kl.item(), rel=1e-4)]
    targets = rows.columns["labels"][:, 1:].repeat(2, 1).flatten()
    # The Trainer counts the first labels too, which predict nothing.
    nll = F.cross_entropy(seen[0][:, :-1].flatten(0, 1), targets, reduction="sum") / 2
    nll = nll / (rows.columns["labels"] != -100).sum()
    assert logged(trainer, "nll") == [pytest.approx(nll.item(), rel=1e-4)]


def test_a_micro_batch_without_an_item_is_a_part_of_its_window(tmp_path):
    """A loss that divides by the items of the window is 0 there, and a mean counts that."""
    rows = token_rows(8)
    rows.columns["labels"][4:] = -100

    def run(**options):
        torch.manual_seed(0)
        model = key_dropout(tiny_gpt2())
        return train(tmp_path, model, rows, OWN, max_steps=1, **options)

    halves = run(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert_same_run(halves, run(), ("loss", "nll", "kl"))


def test_a_monitored_run_is_the_same_run(tmp_path):
    def run(**options):
        config = RDropConfig(alpha=0.0, num_passes=1, likelihood="model", **options)
        return train(tmp_path, Plain(focal), number_rows(LABELS), config, **KEPT)

    plain, monitored = run(), run(monitor_steps=1)
    assert all(map(torch.equal, parameters(plain), parameters(monitored)))
    assert not logged(plain, "kl")
    assert min(logged(monitored, "kl")) > 0


def test_label_smoothing_is_the_trainers(tmp_path):
    def run(kind, rdrop=None):
        rows = text_rows()
        return train(tmp_path, tiny_bert(), rows, rdrop, kind, label_smoothing_factor=0.2)

    own = RDropConfig(alpha=0.0, num_passes=1, likelihood="model")
    assert_same_run(run(RDropTrainer, own), run(Trainer))


# --- accumulation -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_a_loss_that_counts_items_is_exact_under_accumulation(tmp_path, scale):
    config = RDropConfig(alpha=3.0, likelihood="model", scale=scale)

    def run(kind, **options):
        model = key_dropout(tiny_bert(dropout=0.3))
        return train(tmp_path, model, text_rows(), config, mixed(kind), **options)

    whole = run(CountingTrainer, per_device_train_batch_size=8)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = run(CountingTrainer, **split)
    assert min(logged(whole, "kl")) > 1e-4
    assert_same_run(parts, whole, rtol=1e-4)
    for name in ("nll", "kl"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-4)


def test_a_loss_that_does_not_is_the_mean_of_its_micro_batches(tmp_path, caplog):
    config = RDropConfig(alpha=3.0, likelihood="model")
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}

    def run(**options):
        model = key_dropout(tiny_bert(dropout=0.3))
        return train(tmp_path, model, text_rows(), config, mixed(FocalTrainer), **options)

    whole = run(per_device_train_batch_size=8)
    parts = run(**split)
    # All micro-batches hold two items each, so that their mean is that of the whole.
    assert_same_run(parts, whole, rtol=1e-4)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, tiny_bert(), text_rows(), ONE_PASS, mixed(FocalTrainer), **split)
    assert "micro-batches count alike, however many items they hold" in said(caplog)[-1]


class ScaledTrainer(FocalTrainer):
    loss_is_scaled_for_ga = False


def test_a_base_that_says_its_loss_is_not_scaled(tmp_path):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    rows = text_rows()
    plain = train(tmp_path, tiny_bert(dropout=0.0), rows, kind=ScaledTrainer, **split)
    ours = train(tmp_path, tiny_bert(dropout=0.0), rows, ONE_PASS, mixed(ScaledTrainer), **split)
    whole = train(tmp_path, tiny_bert(dropout=0.0), rows, ONE_PASS, mixed(ScaledTrainer))
    assert_same_run(ours, plain)
    assert_same_run(ours, whole)


# --- rows that depend on each other -----------------------------------------------------------


class TwoTowers(nn.Module):
    """Queries and documents: each is told from the other documents of the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.tower = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.3))

    def forward(self, x, other):
        scores = self.tower(x) @ self.tower(other).T
        return {"loss": F.cross_entropy(scores, torch.arange(len(x))), "logits": scores}


def two_towers_rows():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(SIZE, FEATURES, generator=generator)
    return NamedRows(x=x, other=torch.randn(SIZE, FEATURES, generator=generator))


def test_negatives_of_the_batch_are_those_of_one_pass(tmp_path, caplog):
    model = TwoTowers()
    seen = record_scores(model, "logits")
    config = RDropConfig(alpha=1.5)
    with caplog.at_level(logging.WARNING):
        trainer = train(tmp_path, model, two_towers_rows(), config, max_steps=1, **KEPT)
    assert [tuple(scores.shape) for scores in seen] == [(8, 8), (8, 8)]
    own = torch.stack([F.cross_entropy(scores, torch.arange(8)) for scores in seen])
    assert logged(trainer, "nll") == [pytest.approx(own.mean().item(), rel=1e-4)]
    kl = symmetric_kl(torch.cat(seen))
    assert logged(trainer, "loss") == [pytest.approx((own.mean() + 0.75 * kl).item(), rel=1e-4)]
    assert any("passes run one after the other" in line for line in said(caplog))
    with pytest.raises(ValueError, match=r"fraction=0.5 takes some rows of a batch, and here"):
        train(tmp_path, TwoTowers(), two_towers_rows(), RDropConfig(fraction=0.5), **KEPT)


class RewardTrainer(Trainer):
    """Pairs of rows: the better answers first, then the worse ones."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        chosen, rejected = outputs["scores"].flatten().chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        return (loss, outputs) if return_outputs else loss


def test_pairs_are_compared_by_the_chance_of_the_better_row(tmp_path):
    model = Plain(F.mse_loss, width=1)
    seen = record_scores(model)
    config = RDropConfig(alpha=1.5)
    rows = NamedRows(x=number_rows(LABELS).columns["x"])
    trainer = train(tmp_path, model, rows, config, mixed(RewardTrainer), max_steps=1, **KEPT)
    assert [tuple(scores.shape) for scores in seen] == [(8, 1), (8, 1)]
    a, b = (scores[:4, 0] - scores[4:, 0] for scores in seen)
    nll = -(F.logsigmoid(a).mean() + F.logsigmoid(b).mean()) / 2
    # The symmetric KL of two Bernoulli variables.
    kl = ((a.sigmoid() - b.sigmoid()) * (a - b) / 2).mean()
    assert logged(trainer, "nll") == [pytest.approx(nll.item(), rel=1e-4)]
    assert logged(trainer, "kl") == [pytest.approx(kl.item(), rel=1e-4)]
    assert logged(trainer, "loss") == [pytest.approx((nll + 0.75 * kl).item(), rel=1e-4)]


class SeveralTrainer(Trainer):
    """Several labels a row, in the way that many write it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.binary_cross_entropy_with_logits(outputs.logits, labels.float())
        return (loss, outputs) if return_outputs else loss


class TasksTrainer(Trainer):
    """Two tasks, each with classes of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        parts = zip(outputs.logits.chunk(2, -1), labels.unbind(-1), strict=True)
        loss = sum(F.cross_entropy(scores, target) for scores, target in parts)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("dtype", [torch.long, torch.float])
def test_several_labels_a_row_are_each_a_yes_or_no(tmp_path, dtype):
    """The model's config says nothing of them, so that whole numbers look like classes."""
    labels = torch.randint(2, (16, 4), generator=torch.Generator().manual_seed(1)).to(dtype)
    rows = Rows(**{**text_rows().columns, "labels": labels})
    model = tiny_bert(num_labels=4)
    seen = record_scores(model, "logits")
    trainer = train(tmp_path, model, rows, RDropConfig(), mixed(SeveralTrainer), max_steps=1)
    a, b = seen[0].chunk(2)
    kl = ((a.sigmoid() - b.sigmoid()) * (a - b) / 2).mean()
    assert logged(trainer, "kl") == [pytest.approx(kl.item(), rel=1e-4)]


def test_pixels_are_compared_as_their_head_does_beside_the_loss_of_an_auxiliary_head(tmp_path):
    config = DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        num_labels=3,
        hidden_dropout_prob=0.3,
        initializer_range=0.2,
    )
    model = DPTForSemanticSegmentation(config)
    assert config.use_auxiliary_head
    labels = torch.randint(3, (8, 40, 40), generator=torch.Generator().manual_seed(0))
    labels[0, :20] = 255
    pictures = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen = record_scores(model, "logits")
    rows = Rows(pixel_values=pictures, labels=labels)
    trainer = train(tmp_path, model, rows, RDropConfig(), max_steps=1)
    (scores,) = seen
    whole = F.interpolate(scores, size=(40, 40), mode="bilinear", align_corners=False)
    kl = symmetric_kl(whole, class_dim=1, mask=labels != 255)
    assert logged(trainer, "kl") == [pytest.approx(kl.item(), rel=1e-4)]


def test_a_loss_of_the_models_own_is_minimised_under_autocast(tmp_path):
    """The logits that a model returns are then a copy of what its loss read."""
    config = RDropConfig(likelihood="model")
    trainer = train(tmp_path, Plain(focal), number_rows(LABELS), config, bf16=True, **KEPT)
    assert min(logged(trainer, "kl")) > 1e-4


class PaddedNumbersTrainer(Trainer):
    """Numbers, of which some are not there; or of which one may be -100."""

    leaves_out = True
    is_yes_or_no = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        function = F.binary_cross_entropy_with_logits if self.is_yes_or_no else F.mse_loss
        losses = function(outputs.logits, labels, reduction="none")
        counted = (labels != -100) if self.leaves_out else torch.ones_like(labels, dtype=torch.bool)
        loss = (losses * counted).sum() / counted.sum()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("padded_from", [0, 8])
@pytest.mark.parametrize(
    ("leaves_out", "is_yes_or_no"), [(True, False), (True, True), (False, False)]
)
def test_numbers_that_a_loss_leaves_out_are_not_compared(
    tmp_path, leaves_out, is_yes_or_no, padded_from
):
    """The first batch may hold none of them."""
    class_ = mixed(PaddedNumbersTrainer)
    class_.leaves_out, class_.is_yes_or_no = leaves_out, is_yes_or_no
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (16, 4), generator=generator).float()
    labels = labels if is_yes_or_no else labels * 3 - 1
    labels[padded_from:].view(-1)[::3] = -100
    rows = Rows(**{**text_rows().columns, "labels": labels})
    model = tiny_bert(num_labels=4)
    seen = record_scores(model, "logits")
    options = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    trainer = train(tmp_path, model, rows, RDropConfig(), class_, **options)
    counted = (labels != -100) if leaves_out else torch.ones_like(labels, dtype=torch.bool)
    for scores, own, kl in zip(seen, counted.split(8), logged(trainer, "kl"), strict=True):
        a, b = scores.chunk(2)
        difference = (a.sigmoid() - b.sigmoid()) if is_yes_or_no else (a - b)
        scale = 0.5 if is_yes_or_no else 1
        expected = (scale * difference * (a - b))[own].mean()
        assert kl == pytest.approx(expected.item(), rel=1e-4)


def test_several_tasks_are_trained_by_the_loss_that_knows_them(tmp_path):
    labels = torch.randint(2, (16, 2), generator=torch.Generator().manual_seed(1))
    rows = Rows(**{**text_rows().columns, "labels": labels})
    model = tiny_bert(num_labels=4)
    seen = record_scores(model, "logits")
    trainer = train(tmp_path, model, rows, RDropConfig(), mixed(TasksTrainer), max_steps=1)
    assert [len(scores) for scores in seen] == [16]
    kl = symmetric_kl(seen[0])
    assert logged(trainer, "kl") == [pytest.approx(kl.item(), rel=1e-4)]


def test_no_gradient_is_asked_of_parameters_that_are_spread_over_processes(tmp_path, monkeypatch):
    """FSDP does not survive a part of a backward."""

    class Split(RDropTrainer):
        def _splits_parameters(self):
            return True

    def refuse(*args, **kwargs):
        raise AssertionError("a slope was asked")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with pytest.raises(AssertionError, match="a slope was asked"):
        train(tmp_path, tiny_gpt2(), token_rows(8), OWN, max_steps=1)
    ours = train(tmp_path, tiny_gpt2(), token_rows(8), OWN, Split, max_steps=1)
    assert min(logged(ours, "kl")) > 0


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weight": (1.0, 2.0, 3.0)}, r"class_weight=\(1.0, 2.0, 3.0\) needs an NLL"),
        ({"unlabelled_index": -1}, "unlabelled_index=-1 needs an NLL that regdrop computes"),
        ({"method": "fraternal"}, "method='fraternal' needs an NLL that regdrop computes"),
    ],
)
def test_options_of_a_likelihood_of_ours_are_refused(tmp_path, options, message):
    config = RDropConfig(**options)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, tiny_bert(), text_rows(), config, mixed(FocalTrainer))
    with pytest.raises(ValueError, match=message):
        train(tmp_path, Plain(focal), number_rows(LABELS), config, **KEPT)


def test_a_loss_before_the_mixin_must_call_it(tmp_path):
    class Deaf(RDropTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    class Adding(RDropTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    with pytest.raises(ValueError, match=r"Deaf must call RDropTrainerMixin.compute_loss"):
        train(tmp_path, tiny_bert(), text_rows(), RDropConfig(), Deaf)
    assert logged(train(tmp_path, tiny_bert(), text_rows(), RDropConfig(), Adding), "kl")


def test_a_loss_without_outputs_is_refused(tmp_path):
    class Short(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    with pytest.raises(ValueError, match=r"Short.compute_loss must return \(loss, outputs\)"):
        train(tmp_path, tiny_bert(), text_rows(), RDropConfig(), mixed(Short))


@pytest.mark.parametrize("output", ["dict", "tuple"])
def test_a_model_that_returns_no_loss_is_refused(tmp_path, output):
    class Silent(Plain):
        def forward(self, x, labels=None):
            return super().forward(x)

    message = r"Silent is not a class .* no loss that could be minimised .*override rdrop_head"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, Silent(focal, output=output), number_rows(LABELS), RDropConfig(), **KEPT)


def test_an_output_of_one_number_a_row_without_labels_is_refused(tmp_path):
    model = Plain(F.mse_loss, width=1)

    class Norm(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs["scores"].square().mean()
            return (loss, outputs) if return_outputs else loss

    rows = NamedRows(x=number_rows(LABELS).columns["x"])
    with pytest.raises(ValueError, match=r"is one number a row, .*override rdrop_head"):
        train(tmp_path, model, rows, RDropConfig(), mixed(Norm), **KEPT)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_divergence_of_an_unknown_word_model_is_at_the_logits_that_its_loss_reads(
    tmp_path, caplog, is_causal
):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.drop, self.out = nn.Embedding(90, 8), nn.Dropout(0.5), nn.Linear(8, 5)

        def forward(self, input_ids, labels=None, **kwargs):
            logits = self.out(self.drop(self.words(input_ids)))
            if labels is None:
                return {"logits": logits}
            z, y = (logits[:, :-1], labels[:, 1:]) if is_causal else (logits, labels)
            nll = F.cross_entropy(z.mT, y, reduction="none")[y != -100]
            return {"loss": ((1 - (-nll).exp()) ** 2 * nll).mean(), "logits": logits}

    rows = token_rows(num_labels=5)
    with caplog.at_level(logging.WARNING):
        trainer = train(tmp_path, Words(), rows, RDropConfig(alpha=1.0), max_steps=1)
    assert ("moved by one" in said(caplog)[0]) is is_causal
    counted = trainer._head(default_collate([rows[i] for i in range(4)])).target
    valid = rows.columns["labels"][:4] != -100
    expected = F.pad(valid[:, 1:], (0, 1), value=False) if is_causal else valid
    assert torch.equal(counted, expected)
