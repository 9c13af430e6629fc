"""R-Drop around the losses of sentence-transformers: equal to a loop by hand, logged, refused."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.cross_encoder import losses as pair_losses
from sentence_transformers.sentence_transformer import losses, modules
from sentence_transformers.util import cos_sim

from processes import run_in_two_processes
from regdrop import RDropConfig, rdrop_cross_entropy, repeat_batch, symmetric_kl
from regdrop.integrations.sentence_transformers import FollowSteps, RDropLoss
from text_data import WORDS, write_encoder

ALPHA, ROWS = 1.5, 6
DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_encoder(tmp_path_factory.mktemp("encoder"), initializer_range=0.3, **DROPOUT))


def texts(column, rows=ROWS):
    generator = torch.Generator().manual_seed(column)
    drawn = torch.randint(len(WORDS), (rows, 5), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) for row in drawn]


def cross_encoder(folder, num_labels):
    torch.manual_seed(1)
    return CrossEncoder(folder, num_labels=num_labels, device="cpu")


def encoder(folder):
    transformer = modules.Transformer(folder)
    pooling = modules.Pooling(transformer.get_embedding_dimension())
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def columns_of(model, number):
    return [model.preprocess(texts(i)) for i in range(number)]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def check_equal(model, compute, expected):
    """Hold a loss and its gradients under one seed against those of a loop by hand."""
    torch.manual_seed(7)
    parts = compute()
    found = sum(parts.values())
    ours = gradients(model, found)
    torch.manual_seed(7)
    loss, nll, kl = expected()
    theirs = gradients(model, loss)
    assert kl > 1e-3
    for one, other in ((found, loss), (parts["nll"], nll), (parts["kl"], kl)):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert parts["alpha"] == ALPHA
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_a_cross_encoder_is_that_of_a_loop_by_hand(folder):
    model = cross_encoder(folder, 3).train()
    weight = torch.tensor([0.5, 1.0, 2.0])
    own = pair_losses.CrossEntropyLoss(model, weight=weight, label_smoothing=0.1)
    inputs, labels = [texts(0), texts(1)], torch.tensor([0, 2, 1, 1, 0, 2])
    tokens = model.preprocess(list(zip(*inputs, strict=True)))

    def by_hand():
        logits = model(repeat_batch(tokens))["scores"]
        options = {"weight": weight, "label_smoothing": 0.1, "scale": "mean"}
        return rdrop_cross_entropy(logits, labels, alpha=ALPHA, **options)

    check_equal(model, lambda: RDropLoss(own, ALPHA)(inputs, labels), by_hand)


def test_binary_cross_entropy_has_the_bernoulli_kl(folder):
    model = cross_encoder(folder, 1).train()
    own = pair_losses.BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(2.0))
    inputs, labels = [texts(0), texts(1)], torch.tensor([0.0, 1, 1, 0.5, 0, 1])
    tokens = model.preprocess(list(zip(*inputs, strict=True)))

    def by_hand():
        a, b = model(repeat_batch(tokens))["scores"].view(2, ROWS)
        weight = torch.tensor(2.0)
        nll = [F.binary_cross_entropy_with_logits(z, labels, pos_weight=weight) for z in (a, b)]
        kl = ((a.sigmoid() - b.sigmoid()) * (a - b) / 2).mean()
        nll = sum(nll) / 2
        return nll + ALPHA / 2 * kl, nll.detach(), kl.detach()

    check_equal(model, lambda: RDropLoss(own, ALPHA)(inputs, labels), by_hand)


@pytest.mark.parametrize("num_columns", [2, 3])
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_in_batch_softmax_of_each_pass_has_its_own_candidates(folder, is_symmetric, num_columns):
    model = encoder(folder).train()
    symmetric = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    options = symmetric if is_symmetric else {}
    own = losses.MultipleNegativesRankingLoss(model, scale=5.0, **options)
    columns, target = columns_of(model, num_columns), torch.arange(ROWS)

    def by_hand():
        embeddings = embed_columns(model, [repeat_batch(dict(c)) for c in columns])
        passes = list(zip(*(e.chunk(2) for e in embeddings), strict=True))
        scores = [5 * cos_sim(one[0], torch.cat(one[1:])) for one in passes]
        back = [5 * cos_sim(one[1], one[0]) for one in passes]
        nll = sum(F.cross_entropy(s, target) for s in scores) / 2
        kl = symmetric_kl(torch.cat(scores))
        if is_symmetric:
            nll = (nll + sum(F.cross_entropy(s, target) for s in back) / 2) / 2
            kl = (kl + symmetric_kl(torch.cat(back))) / 2
        return nll + ALPHA / 2 * kl, nll.detach(), kl.detach()

    def compute():
        return RDropLoss(own, ALPHA)([dict(c) for c in columns], None)

    check_equal(model, compute, by_hand)


def test_one_softmax_over_both_directions_is_compared_as_one(folder):
    model = encoder(folder).train()
    directions = ("query_to_doc", "doc_to_query")
    own = losses.MultipleNegativesRankingLoss(model, scale=5.0, directions=directions)
    columns = columns_of(model, 2)
    torch.manual_seed(7)
    found = RDropLoss(own, ALPHA)([dict(c) for c in columns], None)
    torch.manual_seed(7)
    embeddings = embed_columns(model, [repeat_batch(dict(c)) for c in columns])
    passes = list(zip(*(e.chunk(2) for e in embeddings), strict=True))
    scores = [torch.cat([5 * cos_sim(q, d), 5 * cos_sim(d, q)], 1) for q, d in passes]
    torch.testing.assert_close(found["kl"], symmetric_kl(torch.cat(scores)), rtol=1e-6, atol=1e-6)


def pairwise_losses(model):
    cosine_distance = losses.SiameseDistanceMetric.COSINE_DISTANCE
    return {
        "cosine": (losses.CosineSimilarityLoss(model), torch.cosine_similarity),
        "cosent": (losses.CoSENTLoss(model), torch.cosine_similarity),
        "contrastive": (losses.ContrastiveLoss(model, cosine_distance), cosine_distance),
        "online": (losses.OnlineContrastiveLoss(model), cosine_distance),
    }


@pytest.mark.parametrize("name", ["cosine", "cosent", "contrastive", "online"])
def test_pairs_have_the_squared_difference_of_their_similarities(folder, name):
    model = encoder(folder).train()
    own, compare = pairwise_losses(model)[name]
    columns, labels = columns_of(model, 2), torch.tensor([0.0, 1, 1, 0, 0, 1])

    def by_hand():
        embeddings = embed_columns(model, [repeat_batch(dict(c)) for c in columns])
        passes = list(zip(*(e.chunk(2) for e in embeddings), strict=True))
        nll = sum(own.compute_loss_from_embeddings([*one], labels) for one in passes) / 2
        kl = (compare(*passes[0]) - compare(*passes[1])).square().mean()
        return nll + ALPHA / 2 * kl, nll.detach(), kl.detach()

    def compute():
        return RDropLoss(own, ALPHA)([dict(c) for c in columns], labels)

    check_equal(model, compute, by_hand)


def test_stacked_and_sequential_passes_are_alike_without_dropout(folder):
    model = encoder(folder).eval()
    model.training = True  # dropout below stays off
    own = losses.MultipleNegativesRankingLoss(model)
    columns = columns_of(model, 3)
    with pytest.warns(UserWarning, match="nothing to compare"):
        found = [
            RDropLoss(own, rdrop=RDropConfig(passes=passes))([dict(c) for c in columns], None)
            for passes in ("stacked", "sequential")
        ]
    for name in ("nll", "rest"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0]["nll"], own([dict(c) for c in columns], None))


def test_evaluation_is_the_loss_itself(folder):
    model = cross_encoder(folder, 3).eval()
    own = pair_losses.CrossEntropyLoss(model)
    inputs, labels = [texts(0), texts(1)], torch.tensor([0, 2, 1, 1, 0, 2])
    assert torch.equal(RDropLoss(own)(inputs, labels), own(inputs, labels))
    embedder = encoder(folder).eval()
    own = losses.MultipleNegativesRankingLoss(embedder)
    columns = columns_of(embedder, 2)
    expected = own([dict(c) for c in columns], None)
    assert torch.equal(RDropLoss(own)([dict(c) for c in columns], None), expected)


ARGUMENTS = {
    "per_device_train_batch_size": 3,
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
}


def test_trainer_of_embeddings_logs_the_parts_and_follows_the_schedule(folder, tmp_path):
    model = encoder(folder)
    data = Dataset.from_dict({"anchor": texts(0, 12), "positive": texts(1, 12)})
    config = RDropConfig(
        alpha=2.0, start_step=1, alpha_schedule="linear", alpha_warmup_ratio=1.0, scale="mean"
    )
    loss = RDropLoss(losses.MultipleNegativesRankingLoss(model), rdrop=config)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(str(tmp_path), **ARGUMENTS),
        train_dataset=data,
        eval_dataset=data,
        loss=loss,
        callbacks=[FollowSteps(loss)],
    )
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["alpha"] for log in logs] == pytest.approx([0, 0, 2 / 3, 4 / 3], abs=1e-3)
    assert logs[0]["kl"] == 0
    assert logs[1]["kl"] > 0
    for log in logs:
        assert log["loss"] == pytest.approx(log["nll"] + log["alpha"] / 2 * log["kl"], abs=3e-4)
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "eval_nll" not in trainer.evaluate()


def test_trainer_of_cross_encoders_logs_the_parts(folder, tmp_path):
    model = cross_encoder(folder, 1)
    labels = [0, 1] * 6
    data = Dataset.from_dict({"a": texts(0, 12), "b": texts(1, 12), "label": labels})
    trainer = CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(str(tmp_path), **ARGUMENTS),
        train_dataset=data,
        loss=RDropLoss(pair_losses.BinaryCrossEntropyLoss(model), ALPHA),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log in logs:
        assert log["kl"] > 0
        assert log["loss"] == pytest.approx(log["nll"] + ALPHA / 2 * log["kl"], abs=3e-4)


def test_schedule_without_steps_is_refused_before_the_first_step(folder):
    model = cross_encoder(folder, 1).train()
    own = pair_losses.BinaryCrossEntropyLoss(model)
    loss = RDropLoss(own, rdrop=RDropConfig(start_step=3))
    with pytest.raises(ValueError, match=r"add_callback\(FollowSteps\(loss\)\)"):
        loss([texts(0), texts(1)], torch.ones(ROWS))
    loss = RDropLoss(own, rdrop=RDropConfig(alpha="auto"))
    loss.step = 0
    with pytest.raises(ValueError, match=r"set loss\.total_steps beside loss\.step, or add Follow"):
        loss([texts(0), texts(1)], torch.ones(ROWS))


def test_matryoshka_around_it_is_the_weighted_sum_of_a_loop_by_hand(folder):
    model = encoder(folder).train()
    columns, dims, weights = columns_of(model, 2), [16, 8], [1.0, 0.5]
    own = losses.MultipleNegativesRankingLoss(model)

    def by_hand():
        a, b = embed_columns(model, [repeat_batch(c) for c in columns])
        total = torch.zeros(3)
        for dim, weight in zip(dims, weights, strict=True):
            passes = list(zip(*(F.normalize(x[:, :dim]).chunk(2) for x in (a, b)), strict=True))
            scores = [cos_sim(x, y) * own.scale for x, y in passes]
            nll = sum(F.cross_entropy(s, torch.arange(ROWS)) for s in scores) / 2
            kl = symmetric_kl(torch.cat(scores))
            total = total + weight * torch.stack([nll + ALPHA / 2 * kl, nll, kl])
        return total

    loss = losses.MatryoshkaLoss(model, RDropLoss(own, ALPHA), dims, weights)
    check_equal(model, lambda: loss([dict(c) for c in columns], None), by_hand)
    for around in (losses.AdaptiveLayerLoss, partial(losses.Matryoshka2dLoss, matryoshka_dims=[8])):
        with pytest.raises(ValueError, match=r"must not be in AdaptiveLayerLoss or Matryoshka2d"):
            around(model, RDropLoss(own, ALPHA))([dict(c) for c in columns], None)


def test_steps_are_told_to_every_loss_of_several_data_sets(folder, tmp_path):
    model = encoder(folder)
    config = RDropConfig(alpha=2.0, alpha_schedule="linear", alpha_warmup_ratio=1.0)
    own = losses.MultipleNegativesRankingLoss(model)
    several = {
        "a": RDropLoss(own, rdrop=config),
        "b": losses.MatryoshkaLoss(model, RDropLoss(own, rdrop=config), [16, 8]),
        "c": own,
    }
    data = Dataset.from_dict({"anchor": texts(0, 6), "positive": texts(1, 6)})
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(str(tmp_path), **ARGUMENTS),
        train_dataset=DatasetDict(dict.fromkeys(several, data)),
        loss=several,
        callbacks=[FollowSteps(several)],
    )
    trainer.train()
    steps = [
        (m.step, m.total_steps)
        for loss in several.values()
        for m in loss.modules()
        if isinstance(m, RDropLoss)
    ]
    assert steps == [(3, 4), (3, 4)]
    for loss in (own, {"c": own}, {}, None):
        with pytest.raises(TypeError, match="loss must be or hold an RDropLoss"):
            FollowSteps(loss)


def test_losses_that_it_would_change_are_refused_by_name(folder):
    model, pairs = encoder(folder), cross_encoder(folder, 1)
    ranking = losses.MultipleNegativesRankingLoss
    for loss, message in (
        (losses.CachedMultipleNegativesRankingLoss(model), "must not be CachedMultipleNegatives"),
        (pair_losses.CachedMultipleNegativesRankingLoss(pairs), "must not be CachedMultipleNeg"),
        (losses.MegaBatchMarginLoss(model), "must not be MegaBatchMarginLoss"),
        (losses.MatryoshkaLoss(model, ranking(model), [16, 8]), r"one of .*\.MatryoshkaLoss"),
        (pair_losses.LambdaLoss(pairs), r"one of .*\.LambdaLoss"),
        (
            pair_losses.MultipleNegativesRankingLoss(pairs),
            r"a CrossEncoder one of [^M]*MSELoss, or of .* got \S*cross_encoder\S*RankingLoss",
        ),
        (losses.MSELoss(model), r"a SentenceTransformer one of .* got \S*sentence_transformer\S*"),
        (ranking(model, gather_across_devices=True), "gather_across_devices"),
        (
            ranking(model, hardness_mode="all_negatives", hardness_strength=1.0),
            "hardness_mode of MultipleNegativesRankingLoss must be None",
        ),
        (ranking(model, directions=("query_to_doc", "doc_to_doc")), "directions of .*doc_to_doc"),
        (pair_losses.MSELoss(pairs, reduction="sum"), "reduction of MSELoss must be 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            RDropLoss(loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.5}, "fraction must be 1 for MultipleNegativesRankingLoss"),
        ({"dropout_rates": (0.1, 0.2), "passes": "sequential"}, "dropout_rates must be None"),
        ({"alpha": "auto", "alpha_rule": "stall"}, "alpha_rule must be 'ramp'"),
        ({"method": "fraternal"}, "method must be 'rdrop'"),
        ({"fused_linear": True}, "fused_linear must be 'auto' or False"),
    ],
)
def test_options_that_do_not_act_are_refused(folder, options, message):
    own = losses.MultipleNegativesRankingLoss(encoder(folder))
    with pytest.raises(ValueError, match=message):
        RDropLoss(own, rdrop=RDropConfig(**options))


def test_alpha_is_given_once(folder):
    own = losses.MultipleNegativesRankingLoss(encoder(folder))
    with pytest.raises(ValueError, match="alpha must be given in rdrop"):
        RDropLoss(own, 1.0, rdrop=RDropConfig())
    with pytest.raises(TypeError, match="rdrop must be an RDropConfig, got dict"):
        RDropLoss(own, rdrop={"alpha": 1.0})


def test_rows_that_cannot_be_stacked_are_named(folder):
    model = encoder(folder).train()
    loss = RDropLoss(losses.MultipleNegativesRankingLoss(model))
    columns = [{**c, "grid": torch.ones(5, 3)} for c in columns_of(model, 2)]
    with pytest.raises(ValueError, match=r"must be 'sequential'.*grid has 5 rows for 6 items"):
        loss(columns, None)


def test_model_without_dropout_is_warned_about(tmp_path):
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = cross_encoder(str(write_encoder(tmp_path, **none)), 1).train()
    loss = RDropLoss(pair_losses.BinaryCrossEntropyLoss(model))
    with pytest.warns(UserWarning, match="no active source of dropout"):
        loss([texts(0), texts(1)], torch.ones(ROWS))


def _train_in_process(rank, folder, output):
    model = encoder(folder)
    data = Dataset.from_dict({"anchor": texts(0, 12), "positive": texts(1, 12)})
    arguments = SentenceTransformerTrainingArguments(
        str(output), **{**ARGUMENTS, "ddp_backend": "gloo", "max_steps": 2}
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        loss=RDropLoss(losses.MultipleNegativesRankingLoss(model), ALPHA),
    )
    trainer.train()
    torch.save((model.state_dict(), trainer.state.log_history), output / f"{rank}.pt")


@pytest.mark.long
def test_two_processes_keep_one_model(folder, tmp_path):
    run_in_two_processes(_train_in_process, folder, tmp_path)
    (first, logs), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert all(log["kl"] > 0 for log in logs if "loss" in log)
