"""Models of no known class: the loss that their first batch tells is the one that is minimised."""

import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
)

from models import VOCABULARY, Rows, text_rows, tiny_bert, tiny_gpt2, token_rows
from regdrop import RDropConfig, symmetric_kl
from regdrop.integrations.transformers import RDropTrainer
from regdrop.integrations.transformers.likelihood import recipe
from regdrop.integrations.transformers.likelihood.detection import detect_recipe
from training import (
    FEATURES,
    Plain,
    assert_same_run,
    build,
    logged,
    number_rows,
    record_scores,
    said,
    train,
)

ONE_PASS = RDropConfig(alpha=0.0, num_passes=1)
KEPT = {"remove_unused_columns": False}
SIZE = 16


def drawn(function, *arguments, seed=3):
    return function(*arguments, generator=torch.Generator().manual_seed(seed))


def class_labels(*shape, num_classes=3):
    return drawn(lambda generator: torch.randint(0, num_classes, shape, generator=generator))


def some_ignored(labels, ignored):
    share = drawn(lambda generator: torch.rand(labels.shape, generator=generator))
    return labels.masked_fill(share < 0.3, ignored)


def shifted(logits, target):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())


def by_position(logits, target, **options):
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), **options)


def numbers(*shape):
    return drawn(lambda generator: torch.randn(shape, generator=generator))


# Name: the criterion, the model's options, labels, positions of the input, and what is said.
CASES = {
    "classes": (F.cross_entropy, {}, class_labels(SIZE), None, "cross entropy"),
    "column of classes": (
        lambda z, y: F.cross_entropy(z, y.view(-1)),
        {},
        class_labels(SIZE, 1),
        None,
        "cross entropy",
    ),
    "tokens": (
        by_position,
        {},
        some_ignored(class_labels(SIZE, 5), -100),
        5,
        "cross entropy",
    ),
    "causal": (shifted, {}, class_labels(SIZE, 5), 5, "cross entropy, labels moved by one"),
    "flat": (
        lambda z, y: F.cross_entropy(z, y.flatten()),
        {"shape": lambda z: z.flatten(0, 1)},
        class_labels(SIZE, 5),
        5,
        "cross entropy",
    ),
    "classes in dim 1": (
        F.cross_entropy,
        {"shape": lambda z: z.movedim(-1, 1)},
        class_labels(SIZE, 5),
        5,
        "cross entropy",
    ),
    "ignored 255": (
        partial(by_position, ignore_index=255),
        {},
        some_ignored(class_labels(SIZE, 5), 255),
        5,
        "cross entropy, ignoring 255",
    ),
    "padded by 0": (
        partial(by_position, ignore_index=0),
        {},
        some_ignored(class_labels(SIZE, 5), 0),
        5,
        "cross entropy, ignoring 0",
    ),
    "probabilities": (F.cross_entropy, {}, numbers(SIZE, 3).softmax(-1), None, "cross entropy"),
    "binary": (
        F.binary_cross_entropy_with_logits,
        {},
        class_labels(SIZE, 3, num_classes=2).float(),
        None,
        "binary cross entropy",
    ),
    "one chance": (
        lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y.float()),
        {"width": 1},
        class_labels(SIZE, num_classes=2),
        None,
        "binary cross entropy",
    ),
    "one chance without a dimension": (
        F.binary_cross_entropy_with_logits,
        {"width": 1, "shape": lambda z: z[:, 0]},
        class_labels(SIZE, num_classes=2).float(),
        None,
        "binary cross entropy",
    ),
    "one number": (
        lambda z, y: F.mse_loss(z[:, 0], y),
        {"width": 1},
        numbers(SIZE),
        None,
        "mean squared error",
    ),
    "absolute": (F.l1_loss, {}, numbers(SIZE, 3), None, "mean absolute error"),
    "smooth": (F.smooth_l1_loss, {}, 3 * numbers(SIZE, 3), None, "smooth L1"),
    "numbers": (F.mse_loss, {}, numbers(SIZE, 3), None, "mean squared error"),
    "chances of many answers": (
        lambda z, y: F.binary_cross_entropy_with_logits(z, y) * z.shape[1],
        {},
        drawn(lambda generator: torch.rand(SIZE, 3, generator=generator)),
        None,
        "binary cross entropy, summed over each row",
    ),
}


def make(case, **changes):
    criterion, options, labels, positions, told = CASES[case]
    return Plain(criterion, **{**options, **changes}), number_rows(labels, SIZE, positions), told


# --- the same run as the Trainer's ------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_one_pass_is_the_plain_trainer_and_the_loss_is_named_once(tmp_path, case, caplog):
    model, rows, told = make(case)
    plain = train(tmp_path, model, rows, kind=Trainer, **KEPT)
    model, rows, _ = make(case)
    with caplog.at_level(logging.WARNING):
        ours = train(tmp_path, model, rows, ONE_PASS, **KEPT)
    assert_same_run(ours, plain)
    assert len(said(caplog)) == 1
    assert f"its own loss on the first batch is {told}, which is minimised" in said(caplog)[0]


@pytest.mark.parametrize(
    "case", ["causal", "flat", "classes in dim 1", "probabilities", "one chance", "smooth"]
)
def test_passes_differ_and_evaluation_is_the_trainers(tmp_path, case):
    model, rows, _ = make(case)
    trainer = train(tmp_path, model, rows, RDropConfig(), **KEPT)
    kl, nll = logged(trainer, "kl"), logged(trainer, "nll")
    assert min(kl) > 0
    assert logged(trainer, "loss") == pytest.approx(
        [a + b / 2 for a, b in zip(nll, kl, strict=True)], rel=1e-4
    )
    plain = build(tmp_path, trainer.model, rows, kind=Trainer, **KEPT)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


@pytest.mark.parametrize(
    ("output", "needs_labels"),
    [
        ("dict", True),
        ("tuple", False),
        ("tuple", True),
        ("dataclass", False),
        ("model output", False),
    ],
)
def test_every_kind_of_output(tmp_path, output, needs_labels):
    def run(kind, rdrop=None):
        model, rows, _ = make("tokens", output=output, needs_labels=needs_labels)
        return train(tmp_path, model, rows, rdrop, kind, **KEPT)

    assert_same_run(run(RDropTrainer, ONE_PASS), run(Trainer))
    assert min(logged(run(RDropTrainer, RDropConfig()), "kl")) > 0


def test_labels_under_another_name(tmp_path):
    def run(kind, rdrop=None):
        model = Plain(F.cross_entropy, label="target")
        rows = number_rows(class_labels(SIZE), SIZE, label="target")
        return train(tmp_path, model, rows, rdrop, kind, label_names=["target"], **KEPT)

    assert_same_run(run(RDropTrainer, ONE_PASS), run(Trainer))
    trainer = run(RDropTrainer, RDropConfig())
    assert min(logged(trainer, "kl")) > 0
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("case", ["tokens", "causal", "binary"])
def test_accumulation_is_one_large_batch_whatever_the_models_own_loss_does(tmp_path, case):
    def run(**options):
        model, rows, _ = make(case, dropout=0.0)
        return train(tmp_path, model, rows, ONE_PASS, **options, **KEPT)

    whole = run(per_device_train_batch_size=8)
    parts = run(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_run(parts, whole)


def test_options_of_the_likelihood_are_kept(tmp_path):
    rdrop = RDropConfig(alpha=0.0, num_passes=1, class_weight=(1.0, 9.0, 0.1))
    model, rows, _ = make("classes", dropout=0.0)
    ours = train(tmp_path, model, rows, rdrop, max_steps=1, **KEPT)
    fresh, _, _ = make("classes", dropout=0.0)
    x, y = rows.columns["x"][:8], rows.columns["labels"][:8]
    expected = F.cross_entropy(fresh(x)["scores"], y, weight=torch.tensor([1.0, 9.0, 0.1]))
    assert logged(ours, "loss") == [pytest.approx(expected.item(), rel=1e-5)]


@pytest.mark.parametrize("case", ["binary", "numbers"])
def test_options_of_classes_beside_another_loss_are_refused(tmp_path, case):
    model, rows, _ = make(case)
    with pytest.raises(ValueError, match="class_weight and unlabelled_index need a cross entropy"):
        train(tmp_path, model, rows, RDropConfig(class_weight=(1.0,) * 3), **KEPT)


# --- what is found ----------------------------------------------------------------------------


def detect(model, batch, names=("labels",)):
    return detect_recipe(model, model, batch, names)


def test_memory_that_runs_out_is_said():
    """It does not say that a model cannot run without its labels."""

    class Large(Plain):
        def forward(self, x, **labels):
            if not labels:
                raise torch.OutOfMemoryError("no memory")
            return super().forward(x, **labels)

    batch = {"x": torch.randn(SIZE, FEATURES), "labels": class_labels(SIZE)}
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        detect(Large(F.cross_entropy), batch)


def test_memory_that_runs_out_in_a_loss_that_is_tried_is_said(monkeypatch):
    """It does not say that the loss is another."""

    def terms(*arguments, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(recipe, "cross_entropy_terms", terms)
    batch = {"x": torch.randn(SIZE, FEATURES), "labels": class_labels(SIZE)}
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        detect(Plain(F.cross_entropy), batch)


def test_a_new_language_model_whose_logits_are_all_zero():
    """With and without the shift the loss is log(V): parameters moved by chance tell which."""
    config = GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=16,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config).train()
    nn.init.zeros_(model.lm_head.weight)
    words = text_rows(4).columns["input_ids"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(9)
    expected_draw = torch.rand(3)
    torch.manual_seed(9)
    recipe = detect(model, {"input_ids": words, "labels": words})
    assert recipe.is_shifted
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.rand(3), expected_draw)
    assert model.training


def test_a_new_head_of_tokens_whose_logits_are_all_zero():
    model = Plain(by_position)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    batch = {"x": numbers(4, 5, FEATURES), "labels": class_labels(4, 5)}
    recipe = detect(model, batch)
    assert (recipe.family, recipe.is_shifted) == ("cross entropy", False)


def test_a_new_head_whose_labels_are_padded_by_a_word():
    """Where all logits are 0, any share of the labels has the same mean."""
    model = Plain(partial(by_position, ignore_index=0), width=4)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    labels = some_ignored(class_labels(4, 5, num_classes=4), 0)
    recipe = detect(model, {"x": numbers(4, 5, FEATURES), "labels": labels})
    assert (recipe.ignore_index, recipe.is_shifted) == (0, False)


@pytest.mark.parametrize("case", ["causal", "classes", "binary", "numbers"])
def test_a_model_in_half_precision(case):
    model, rows, told = make(case)
    batch = {name: column[:8] for name, column in rows.columns.items()}
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    assert str(detect(model.bfloat16(), half)) == told


def test_modes_and_buffers_stay_as_they_are():
    model = nn.Module.__new__(Plain)
    Plain.__init__(model, F.cross_entropy)
    model.body = nn.Sequential(nn.BatchNorm1d(FEATURES), *model.body)
    model.train()
    model.body[1].eval()
    before = [b.clone() for b in model.buffers()]
    detect(model, {"x": numbers(8, FEATURES), "labels": class_labels(8)})
    assert all(map(torch.equal, before, model.buffers()))
    assert (model.training, model.body[0].training, model.body[1].training) == (True, True, False)


@pytest.mark.parametrize(
    "criterion",
    [
        lambda z, y: ((1 - z.softmax(-1).gather(1, y[:, None])[:, 0]) ** 2).mean(),
        partial(F.cross_entropy, weight=torch.tensor([1.0, 7.0, 0.1])),
        partial(F.cross_entropy, label_smoothing=0.3),
        lambda z, y: F.cross_entropy(z, y) + 0.01 * z.square().mean(),
    ],
    ids=["focal", "class weights", "label smoothing", "penalty"],
)
def test_another_loss_is_none_of_the_known(criterion):
    model = Plain(criterion)
    assert detect(model, {"x": numbers(8, FEATURES), "labels": class_labels(8)}) is None


def test_a_sum_over_items_is_none_of_the_known():
    model = Plain(partial(F.cross_entropy, reduction="sum"))
    assert detect(model, {"x": numbers(8, FEATURES), "labels": class_labels(8)}) is None


def test_a_batch_of_one_label_that_is_ignored_throughout_tells_nothing():
    model = Plain(by_position)
    labels = torch.full((4, 5), -100)
    assert detect(model, {"x": numbers(4, 5, FEATURES), "labels": labels}) is None


# --- known names ------------------------------------------------------------------------------


def test_a_known_class_is_found_by_its_name_and_nothing_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, tiny_gpt2(), token_rows(), RDropConfig())
    assert said(caplog) == []


def test_a_known_name_with_another_loss_of_a_known_kind(tmp_path, caplog):
    """A class that is called a causal model and does not shift."""

    class OwnForCausalLM(GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask=None, labels=None):
            output = super().forward(input_ids, attention_mask=attention_mask)
            if labels is not None:
                output.loss = by_position(output.logits, labels)
            return output

    def run(kind, rdrop=None):
        model = OwnForCausalLM(tiny_gpt2().config)
        torch.manual_seed(1)
        return train(tmp_path, model, token_rows(), rdrop, kind)

    torch.manual_seed(0)
    plain = run(Trainer)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        ours = run(RDropTrainer, ONE_PASS)
    assert_same_run(ours, plain)
    assert len(said(caplog)) == 1
    assert "OwnForCausalLM has a loss of its own" in said(caplog)[0]
    assert "is cross entropy, which is minimised" in said(caplog)[0]


def test_a_mean_of_the_rows_means_is_none_of_the_losses(tmp_path):
    """On a first batch without ignored labels it equals the mean over tokens."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(20, 8), nn.Linear(8, 5)

        def forward(self, input_ids, labels=None):
            logits = self.out(self.words(input_ids))
            if labels is None:
                return {"logits": logits}
            nll = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
            rows = nll.sum(1) / labels.ne(-100).sum(1)
            return {"loss": rows.mean(), "logits": logits}

    batch = {"input_ids": torch.randint(20, (3, 6)), "labels": torch.randint(5, (3, 6))}
    model = Rows()
    flat = nn.functional.cross_entropy(model(batch["input_ids"])["logits"].mT, batch["labels"])
    torch.testing.assert_close(model(**batch)["loss"], flat)
    assert detect_recipe(model, model, batch, ["labels"]) is None


def active(logits, labels, mask):
    """Return the loss of tokens that the mask tells, as many write it."""
    kept = mask.bool()
    return F.cross_entropy(logits[kept], labels[kept])


class Active(nn.Module):
    """A tagger whose labels are padded by one of themselves."""

    def __init__(self, criterion=active):
        super().__init__()
        self.words, self.out = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.drop, self.criterion = nn.Dropout(0.3), criterion

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.out(self.drop(self.words(input_ids)))
        if labels is None:
            return {"logits": logits}
        return {"loss": self.criterion(logits, labels, attention_mask), "logits": logits}


# The same behind a familiar name.
ActiveForTokenClassification = type("ActiveForTokenClassification", (Active,), {})
ActiveForTokenClassification.config = BertConfig(num_labels=3)


@pytest.mark.parametrize("kind", [Active, ActiveForTokenClassification])
def test_what_a_mask_leaves_out_shows_on_a_first_batch_without_padding(tmp_path, kind):
    """Padding that comes later counts neither in the NLL nor in the KL."""
    words, tags = class_labels(SIZE, 6, num_classes=20), class_labels(SIZE, 6)
    mask = torch.ones_like(words)
    mask[8:] = torch.arange(6) < torch.arange(8)[:, None] % 4 + 2
    rows = Rows(input_ids=words, attention_mask=mask, labels=tags)
    torch.manual_seed(1)
    model = kind()
    seen = record_scores(model, "logits")
    trainer = train(tmp_path, model, rows, RDropConfig(), learning_rate=0.0)
    nll = sum(active(scores, tags[8:], mask[8:]) for scores in seen[1].chunk(2)) / 2
    kl = symmetric_kl(seen[1], mask=mask[8:].bool())
    assert logged(trainer, "nll")[1] == pytest.approx(nll.item(), rel=1e-4)
    assert logged(trainer, "kl")[1] == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("kind", [Active, ActiveForTokenClassification])
def test_a_mask_that_the_loss_does_not_read_changes_nothing(tmp_path, caplog, kind):
    words, tags = class_labels(SIZE, 6, num_classes=20), class_labels(SIZE, 6)
    rows = Rows(input_ids=words, attention_mask=torch.ones_like(words), labels=tags)
    model = kind(lambda logits, labels, mask: by_position(logits, labels))
    with caplog.at_level(logging.WARNING):
        train(tmp_path, model, rows, RDropConfig())
    assert all("minimised as it is" not in line for line in said(caplog))


def test_a_later_batch_tells_of_a_class_of_the_library_that_no_name_tells(tmp_path, caplog):
    sizes = {"vocab_size": 20, "hidden_size": 8, "embedding_size": 8, "intermediate_size": 8}
    model = ElectraForPreTraining(
        ElectraConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    )
    labels = class_labels(SIZE, 6, num_classes=2)
    labels[8:] = 0
    rows = Rows(input_ids=class_labels(SIZE, 6, num_classes=20), labels=labels)

    class LaterLoss(TrainerCallback):
        """Adds to the loss after the first step."""

        def on_step_end(self, args, state, control, **kwargs):
            def add(module, args, output):
                if output.loss is not None:
                    output.loss = output.loss + 1

            model.register_forward_hook(add)

    with caplog.at_level(logging.WARNING):
        trainer = build(tmp_path, model, rows, RDropConfig())
        trainer.add_callback(LaterLoss())
        trainer.train()
    assert "binary cross entropy, which is minimised" in said(caplog)[0]
    assert "in step 1 the loss of ElectraForPreTraining" in said(caplog)[1]


class FreshBertForSequenceClassification(BertForSequenceClassification):
    """A head of a familiar name, whose loss is another one: at first all classes are alike."""

    own = staticmethod(lambda logits, labels: F.cross_entropy(logits, labels))

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            output.loss = self.own(output.logits, labels)
        return output


def weighted(logits, labels):
    return F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 10.0, 3.0]))


def smoothed(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize("loss", [weighted, smoothed])
def test_a_loss_behind_a_familiar_name_is_told_from_its_kind_at_a_fresh_head(
    tmp_path, caplog, loss
):
    def model():
        fresh = FreshBertForSequenceClassification(tiny_bert(dropout=0.0).config)
        fresh.own = loss
        with torch.no_grad():
            fresh.classifier.weight.zero_()
        return fresh

    single = RDropConfig(alpha=0.0, num_passes=1)
    with caplog.at_level(logging.WARNING):
        ours = train(tmp_path, model(), text_rows(), single)
    assert "has a loss of its own" in said(caplog)[0]
    assert_same_run(ours, train(tmp_path, model(), text_rows(), kind=Trainer), rtol=1e-4)


@pytest.mark.parametrize("kind", ["cross entropy", "binary cross entropy"])
def test_weights_that_the_first_batch_does_not_show_are_kept(tmp_path, kind):
    """A first batch of one class, or without a positive label, gives the loss without weights."""

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.out = nn.Linear(FEATURES, 3)

        def forward(self, x, labels=None):
            logits = self.out(x)
            if labels is None:
                return {"logits": logits}
            weight = torch.tensor([1.0, 5.0, 9.0])
            if kind == "cross entropy":
                return {"loss": F.cross_entropy(logits, labels, weight=weight), "logits": logits}
            own = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)
            return {"loss": own, "logits": logits}

    labels = torch.zeros(16, dtype=torch.long)
    labels[8:] = torch.arange(8) % 3
    if kind != "cross entropy":
        labels = (F.one_hot(labels, 3) * (labels > 0)[:, None]).float()
    rows = Rows(x=torch.randn(16, FEATURES), labels=labels)
    ours = train(tmp_path, Weighted(), rows, RDropConfig(alpha=0.0, num_passes=1))
    assert_same_run(ours, train(tmp_path, Weighted(), rows, kind=Trainer), rtol=1e-4)


@pytest.mark.parametrize("shape", ["tuple", "dict", "needs labels"])
def test_a_familiar_name_with_another_output_is_understood(tmp_path, caplog, shape):
    class OddBertForSequenceClassification(BertForSequenceClassification):
        def forward(self, input_ids=None, labels=None, **kwargs):
            output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            if shape == "needs labels":
                assert labels is not None
                return output
            if shape == "tuple":
                return output.to_tuple()
            named = {"scores": output.logits}
            return named if labels is None else {"loss": output.loss, **named}

    def model():
        torch.manual_seed(1)
        return OddBertForSequenceClassification(tiny_bert(dropout=0.0).config)

    with caplog.at_level(logging.WARNING):
        ours = train(tmp_path, model(), text_rows(), RDropConfig(alpha=0.0, num_passes=1))
    assert "is not what its name says" in said(caplog)[0]
    assert_same_run(ours, train(tmp_path, model(), text_rows(), kind=Trainer), rtol=1e-4)
