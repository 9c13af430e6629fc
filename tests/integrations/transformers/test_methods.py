"""R3F and fraternal dropout, each against the formula of its paper."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import BartConfig, BartForConditionalGeneration

from models import LENGTH, VOCABULARY, Rows, tiny_bert, tiny_bert_of, tiny_gpt2
from regdrop import RDropConfig
from regdrop.experiments.arms import compared_arms, optional_arms
from regdrop.experiments.evaluating.evaluate import evaluate
from regdrop.experiments.running.run import RunPaths, train_run
from regdrop.passes import embedding_noise
from regdrop.tasks import PRESETS
from training import BY_ITSELF, build, logged, train


def bert_batch(items=6):
    return {
        "input_ids": torch.randint(2, VOCABULARY, (items, LENGTH)),
        "labels": torch.randint(3, (items,)),
    }


def test_r3f_is_its_papers_formula(tmp_path):
    """L = -log p(y|x) + lambda [KL(p||q) + KL(q||p)], q behind noisy embeddings."""
    model, batch = tiny_bert(dropout=0.0).train(), bert_batch()
    config = RDropConfig(alpha=4 * 0.7, method="r3f", noise=0.5)
    ours = build(tmp_path, model, rdrop=config)
    torch.manual_seed(3)
    loss = ours.compute_loss(model, dict(batch))
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    embedding = model.get_input_embeddings()
    clean = embedding(batch["input_ids"])
    torch.manual_seed(3)
    noisy = clean + 0.5 * torch.randn_like(clean)
    p, q = (model(inputs_embeds=x).logits.log_softmax(-1) for x in (clean, noisy))
    kl = [F.kl_div(b, a, log_target=True, reduction="batchmean") for a, b in ((p, q), (q, p))]
    expected = F.nll_loss(p, batch["labels"]) + 0.7 * sum(kl)
    torch.testing.assert_close(loss, expected)
    assert sum(kl) > 1e-2
    reference = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    for a, b in zip(gradients, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_r3f_of_multiple_choice_has_noise_on_the_second_pass_alone(tmp_path):
    """An embedding has a row for each choice, the target one for each question."""
    model = tiny_bert_of("ForMultipleChoice")(dropout=0.0).train()
    batch = {
        "input_ids": torch.randint(2, VOCABULARY, (3, 4, LENGTH)),
        "labels": torch.randint(4, (3,)),
    }
    seen = []
    model.bert.embeddings.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    ours = build(tmp_path, model, rdrop=RDropConfig(alpha=4.0, method="r3f", noise=0.5))
    loss = ours.compute_loss(model, dict(batch))
    first, second = seen[-1].chunk(2)
    model.bert.embeddings(batch["input_ids"].flatten(0, 1))
    assert torch.equal(first, seen[-1])
    assert ((second - first).abs() > 0).float().mean() > 0.99

    own = model(**batch)
    assert loss > own.loss
    with torch.no_grad():
        quiet = build(tmp_path, model, rdrop=RDropConfig(alpha=0.0, method="r3f", noise=0.5))
        torch.testing.assert_close(quiet.compute_loss(model.train(), dict(batch)), own.loss)


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_fraternal_dropout_is_its_papers_formula(tmp_path, make):
    """L = 1/2 [l(z1) + l(z2)] + kappa / m ||z1 - z2||^2, m the size of a logit vector."""
    model = make(3).train()
    if make is tiny_bert:
        batch = bert_batch()
        target = batch["labels"]
    else:
        words = torch.randint(2, VOCABULARY, (4, LENGTH))
        labels = words.clone()
        labels[0, 3:] = -100
        batch, target = {"input_ids": words, "labels": labels}, labels[:, 1:]
    config = RDropConfig(alpha=2 * 0.3, method="fraternal")
    ours = build(tmp_path, model, rdrop=config)
    torch.manual_seed(3)
    loss = ours.compute_loss(model, dict(batch))
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    torch.manual_seed(3)
    stacked = model(input_ids=batch["input_ids"].repeat(2, 1)).logits
    stacked = stacked if make is tiny_bert else stacked[:, :-1]
    first, second = stacked.chunk(2)
    nll = [F.cross_entropy(z.flatten(0, -2), target.flatten()) for z in (first, second)]
    valid = target != -100
    distance = (first - second).square().mean(-1)[valid].mean()
    expected = sum(nll) / 2 + 0.3 * distance
    torch.testing.assert_close(loss, expected)
    assert distance > 1e-3
    reference = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for a, b in zip(gradients, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_noise_is_on_the_second_pass_of_the_first_call_alone():
    embedding = torch.nn.Embedding(5, 4)
    words = torch.tensor([1, 2, 1, 2])
    with embedding_noise(embedding, 2, std=1.0):
        first, second = embedding(words), embedding(words)
    plain = embedding(words)
    assert torch.equal(first[:2], plain[:2])
    assert (first[2:] != plain[2:]).all()
    assert torch.equal(second, plain)
    with (
        pytest.raises(ValueError, match="must call its embedding"),
        embedding_noise(embedding, 2, 1),
    ):
        pass


def test_noise_is_scaled_as_the_embedding_is():
    embedding = torch.nn.Embedding(500, 40)
    embedding.embed_scale = 8.0
    words = torch.arange(500).repeat(2)
    with embedding_noise(embedding, 2, std=0.5):
        output = embedding(words)
    assert (output[500:] - output[:500]).std().item() == pytest.approx(4.0, rel=0.05)


def test_a_squared_difference_is_not_logged_as_a_kl(tmp_path):
    rows = Rows(input_ids=torch.randint(2, VOCABULARY, (8, LENGTH)), labels=torch.arange(8) % 3)
    config = RDropConfig(method="fraternal")
    ours = train(tmp_path, tiny_bert(), rows, config)
    assert logged(ours, "nll")
    assert not logged(ours, "kl")


def test_an_encoder_decoder_has_noise_on_its_source_alone(tmp_path):
    sizes = {"d_model": 16, "vocab_size": VOCABULARY, "dropout": 0.0}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_ffn_dim": 16, f"{side}_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(**sizes, attention_dropout=0.0)).train()
    words = torch.randint(4, VOCABULARY, (3, LENGTH))
    config = RDropConfig(alpha=4.0, method="r3f", noise=0.5)
    seen = {}
    for name in ("encoder", "decoder"):
        getattr(model.model, name).layernorm_embedding.register_forward_hook(
            lambda m, i, o, name=name: seen.update({name: o.detach()})
        )
    ours = build(tmp_path, model, rdrop=config)
    ours.compute_loss(model, {"input_ids": words, "labels": words})
    assert not torch.allclose(seen["encoder"][:3], seen["encoder"][3:], atol=1e-2)
    assert torch.allclose(seen["decoder"][:3], seen["decoder"][3:])


@pytest.mark.parametrize("method", ["r3f", "fraternal"])
def test_training_by_another_method_learns(tmp_path, method):
    rows = Rows(input_ids=torch.randint(2, VOCABULARY, (24, LENGTH)), labels=torch.arange(24) % 3)
    config = RDropConfig(alpha=0.1, method=method)
    options = {"learning_rate": 1e-2, "max_steps": 40, "logging_steps": 5, **BY_ITSELF}
    losses = logged(train(tmp_path, tiny_bert(), rows, config, **options), "nll")
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method must be one of"),
        ({"method": "r3f", "fraction": 0.5}, "method='r3f' needs fraction=1.0, got 0.5"),
        ({"method": "r3f", "backward_passes": 1}, "needs backward_passes=None, got 1"),
        ({"method": "fraternal", "num_passes": 3}, "method='fraternal' needs num_passes=2"),
        ({"method": "r3f", "noise": -1}, "noise must be finite and at least 0"),
    ],
)
def test_what_a_method_cannot_have_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        RDropConfig(**options)


def test_fraternal_dropout_needs_classes(tmp_path):
    model = tiny_bert(1).train()
    batch = {**bert_batch(), "labels": torch.rand(6)}
    ours = build(tmp_path, model, rdrop=RDropConfig(method="fraternal"))
    with pytest.raises(ValueError, match="compares the logits of classes"):
        ours.compute_loss(model, batch)


def test_every_arm_weights_classes_alike_and_a_task_is_r_drops():
    task = PRESETS["digits"]
    weighted = replace(task, rdrop=replace(task.rdrop, class_weight=(1.0,) * 10, noise=0.1))
    names = ["baseline", "baseline-2x", "alpha-0", "rdrop", "r3f", "fraternal"]
    arms = compared_arms(weighted, names)
    assert {arm.rdrop.class_weight for arm in arms} == {(1.0,) * 10}
    assert arms[4].rdrop.noise == 0.1
    with pytest.raises(ValueError, match="arms of their own, r3f, fraternal"):
        compared_arms(replace(task, rdrop=RDropConfig(method="r3f")))


@pytest.mark.slow
def test_a_run_of_another_method_is_evaluated(tmp_path):
    task = PRESETS["digits"]
    training = replace(task.training, max_steps=4, eval_steps=2)
    task = replace(task, training=training, dropout=0.0)  # noise alone makes passes differ
    arm = optional_arms(task)["r3f"]
    arm = replace(arm, rdrop=replace(arm.rdrop, noise=0.1))
    record = train_run(task, arm, 0, RunPaths.alone(tmp_path))
    assert evaluate(tmp_path, "test").metrics == pytest.approx(record.test, rel=1e-4)


def test_other_methods_are_arms_by_name():
    task = PRESETS["digits"]
    assert {arm.rdrop.method for arm in compared_arms(task)} == {"rdrop"}
    assert [arm.name for arm in compared_arms(task, ["rdrop", "r3f"])] == ["rdrop", "r3f"]
    assert {name: arm.rdrop.alpha for name, arm in optional_arms(task).items()} == {
        "matched-dropout": 0.0,
        "two-thirds-batch": task.rdrop.alpha,
        "r3f": 4.0,
        "fraternal": 0.3,
    }
