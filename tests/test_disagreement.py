import json
import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from models import key_dropout, text_rows, tiny_bert, tiny_bert_of, tiny_gpt2, token_rows
from regdrop.diagnostics import measure_disagreement
from regdrop.integrations.transformers.disagreement import measure_model
from regdrop.tasks import PRESETS
from text_data import write_encoder, write_glue, write_translation

NEAR = {"rtol": 0, "atol": 1e-9}


class Recorder:
    """Calls a model and keeps what it returned: dropout off first, then each mask."""

    def __init__(self, model):
        self.model, self.outputs = model, []

    def __call__(self, inputs):
        self.outputs.append(self.model(inputs))
        return self.outputs[-1]


def network(rate=0.4):
    layers = nn.Linear(5, 16), nn.ReLU(), nn.Dropout(rate), nn.Linear(16, 4)
    return nn.Sequential(*layers).double()


def items(size=30, classes=4, features=5):
    return torch.randn(size, features, dtype=torch.float64), torch.randint(0, classes, (size,))


def measured(num_masks=7):
    recorder = Recorder(network())
    x, y = items()
    result = measure_disagreement(recorder.model, [(x, y)], num_masks, forward=recorder)
    deployed, *masks = recorder.outputs
    return result, torch.stack(masks).softmax(-1), deployed.softmax(-1), y


def mean_kl(p, q):
    return float((p * (p / q).log()).sum(-1).mean())


def naive_calibration_error(p, y):
    confidence, guess = p.max(-1)
    error = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            gap = confidence[inside].mean() - (guess[inside] == y[inside]).double().mean()
            error += float(gap.abs() * inside.double().mean())
    return error


def check_predictions(found, p, y):
    assert found.nll == pytest.approx(float(F.nll_loss(p.log(), y)), abs=1e-9)
    assert found.accuracy == pytest.approx(float((p.argmax(-1) == y).double().mean()))
    assert found.calibration_error == pytest.approx(naive_calibration_error(p, y))


def test_every_figure_is_what_a_loop_over_masks_gives():
    result, masks, deployed, y = measured()
    mean = masks.mean(0)
    geometric = masks.log().mean(0).softmax(-1)
    expected = {
        "epkl": np.mean([mean_kl(p, q) for p, q in product(masks, masks)]),
        "kl_submodel_mean": np.mean([mean_kl(p, mean) for p in masks]),
        "kl_mean_submodel": np.mean([mean_kl(mean, p) for p in masks]),
        "kl_submodel_geometric": np.mean([mean_kl(p, geometric) for p in masks]),
        "kl_geometric_submodel": np.mean([mean_kl(geometric, p) for p in masks]),
        "kl_geometric_deployed": mean_kl(geometric, deployed),
        "kl_mean_deployed": mean_kl(mean, deployed),
    }
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value, abs=1e-9), name
        assert value > 1e-3, name
    pairs = [mean_kl(p, q) for i, p in enumerate(masks) for j, q in enumerate(masks) if i != j]
    assert result.kl_of_two_masks == pytest.approx(np.mean(pairs))
    assert (result.items, result.num_masks) == (30, 7)
    check_predictions(result.mean, mean, y)
    check_predictions(result.geometric, geometric, y)
    check_predictions(result.deployed, deployed, y)
    each = [naive_calibration_error(p, y) for p in masks]
    assert result.submodel.calibration_error == pytest.approx(np.mean(each))
    assert result.submodel.nll == pytest.approx(np.mean([F.nll_loss(p.log(), y) for p in masks]))
    assert result.submodel.accuracy == pytest.approx(float((masks.argmax(-1) == y).double().mean()))


def test_the_identities_hold_exactly():
    result, *_ = measured()
    correction = result.geometric.nll - result.deployed.nll  # mean log D(y) / G(y)
    for left, right in (
        (result.epkl, result.kl_submodel_mean + result.kl_mean_submodel),
        (result.epkl, result.kl_submodel_geometric + result.kl_geometric_submodel),
        (result.submodel.nll, result.geometric.nll + result.kl_geometric_submodel),
        (result.gap, result.kl_geometric_submodel + correction),
    ):
        torch.testing.assert_close(left, right, **NEAR)


def test_softmax_regression_deploys_the_geometric_mean_and_its_gap_is_bounded():
    features, layer = 6, nn.Linear(6, 3).double()
    masks = [torch.tensor(m, dtype=torch.float64) * 2 for m in product((0, 1), repeat=features)]
    x, y = items(20, classes=3, features=features)
    order = iter(masks)

    class AllMasks(nn.Module):
        def forward(self, x):
            return layer(x * next(order)) if self.training else layer(x)

    result = measure_disagreement(AllMasks(), [(x, y)], num_masks=len(masks))
    torch.testing.assert_close(result.kl_geometric_deployed, 0.0, **NEAR)
    torch.testing.assert_close(result.geometric.nll, result.deployed.nll, **NEAR)
    torch.testing.assert_close(result.gap, result.kl_geometric_submodel, **NEAR)
    assert 0.01 < result.gap < result.epkl


def test_with_little_dropout_half_of_the_disagreement_is_the_penalty():
    torch.manual_seed(1)
    x, y = items(200)
    result = measure_disagreement(network(rate=0.01), [(x, y)], num_masks=100)
    assert result.epkl < 0.02
    assert result.kl_geometric_submodel == pytest.approx(result.epkl / 2, rel=0.02)
    assert result.kl_submodel_mean == pytest.approx(result.epkl / 2, rel=0.02)


def rows_as_batch(rows, index=slice(None)):
    return {name: column[index] for name, column in rows.columns.items()}


def assert_close(one, other, tolerance=1e-5):
    assert (one.items, one.num_masks) == (other.items, other.num_masks)
    for name in ("epkl", "kl_mean_submodel", "kl_geometric_submodel", "kl_geometric_deployed"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=tolerance), name
    for name in ("submodel", "mean", "geometric", "deployed"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert ours.nll == pytest.approx(theirs.nll, abs=tolerance)
        assert ours.accuracy == pytest.approx(theirs.accuracy)
        assert ours.calibration_error == pytest.approx(theirs.calibration_error, abs=tolerance)


def test_batches_may_be_cut_in_any_way_and_ignored_items_do_not_count():
    model, rows = key_dropout(tiny_bert(dropout=0.3), num_passes=5), text_rows(16)
    rows.columns["labels"][4:9] = -100
    counted = rows.columns["labels"] != -100
    whole = measure_disagreement(model, [rows_as_batch(rows)], num_masks=5)
    parts = [rows_as_batch(rows, index) for index in counted.nonzero()[:, 0].split(4)]
    assert whole.items == 11
    assert whole.epkl > 1e-3
    assert_close(whole, measure_disagreement(model, parts, num_masks=5))


def test_the_caller_finds_everything_as_it_was():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model.train()
    model[2].eval()
    x, y = torch.randn(12, 5), torch.randint(0, 4, (12,))
    modes = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = measure_disagreement(model, [(x, y)], num_masks=3)
    assert first.epkl > 1e-3
    assert [module.training for module in model.modules()] == modes
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        assert torch.equal(buffer, before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert measure_disagreement(model, [(x, y)], num_masks=3) == first

    def stop(inputs):
        model(inputs)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_disagreement(model, [(x, y)], forward=stop)
    assert [module.training for module in model.modules()] == modes


def test_statistics_of_batches_are_no_disagreement_and_a_model_without_dropout_is_named():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    batch = torch.randn(12, 5), torch.randint(0, 4, (12,))
    with pytest.warns(UserWarning, match="all sub-models are the same"):
        result = measure_disagreement(model, [batch], num_masks=3)
    assert result.epkl == pytest.approx(0, abs=1e-12)
    assert result.kl_mean_deployed == pytest.approx(0, abs=1e-12)
    assert result.submodel.nll == pytest.approx(result.deployed.nll)


def test_dropout_acts_where_evaluation_has_a_fast_path_of_its_own():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.3, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(x).mean(1))

    batch = torch.randn(6, 4, 8), torch.randint(0, 3, (6,))
    result = measure_disagreement(Encoder().eval(), [batch], num_masks=4)
    assert result.epkl > 1e-4


def test_classes_that_are_masked_have_no_part():
    torch.manual_seed(0)
    model = network()
    x, y = items(classes=3)
    mask = torch.tensor([0, 0, 0, -torch.inf])
    masked = measure_disagreement(model, [(x, y)], 5, forward=lambda x: model(x) + mask)
    cut = measure_disagreement(model, [(x, y)], 5, forward=lambda x: model(x)[:, :3])
    assert_close(masked, cut, tolerance=1e-9)


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([items()], {"num_masks": 1}, ValueError, "num_masks must be at least 2, got 1"),
        ([items()], {"num_masks": 2.0}, TypeError, "num_masks must be an integer, got float"),
        ([], {}, ValueError, "at least one item that counts"),
        ([torch.randn(3, 5)], {}, TypeError, "pairs .inputs, target. or mappings"),
        ([{"x": torch.randn(3, 5)}], {}, ValueError, 'must hold "labels"'),
        ([(items()[0], torch.rand(30, 4))], {}, TypeError, "class indices.*got torch.float32"),
        ([(items()[0], torch.zeros(29).long())], {}, ValueError, "classes last; got .30, 4."),
        ([(items()[0], torch.full((30,), 4))], {}, ValueError, "from 0 to 3 or ignore_index"),
        ([items()], {"forward": lambda x: "no"}, TypeError, "must return logits.*got str"),
    ],
)
def test_bad_input_is_named(batches, options, error, message):
    with pytest.raises(error, match=message):
        measure_disagreement(network(), batches, **options)


def own_loss(model, batch):
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


@pytest.mark.parametrize("build", [tiny_bert, tiny_bert_of("ForTokenClassification"), tiny_gpt2])
def test_hugging_face_models_are_measured_by_their_own_items(build):
    rows = token_rows() if "Token" in type(build()).__name__ else text_rows()
    batch = rows_as_batch(rows)
    if build is tiny_gpt2:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :3] = -100
    model = build(dropout=0.2)
    result = measure_model(model, [batch], num_masks=3)
    assert result.deployed.nll == pytest.approx(own_loss(model, batch), abs=1e-5)
    assert result.items == int((batch["labels"] != -100).sum())
    assert result.epkl > 1e-4


def test_a_causal_model_is_not_measured_with_labels_that_did_not_move():
    batch = rows_as_batch(text_rows())
    batch["labels"] = batch["input_ids"].clone()
    with pytest.raises(ValueError, match=r"a causal model moves its labels.*measure_model"):
        measure_disagreement(tiny_gpt2(), [batch])


@pytest.mark.parametrize(
    ("num_labels", "problem"), [(1, "regression"), (3, "multi_label_classification")]
)
def test_numbers_and_several_labels_are_refused_by_name(num_labels, problem):
    rows = text_rows(num_labels=num_labels, problem_type=problem)
    model = tiny_bert(num_labels, problem)
    with pytest.raises(ValueError, match=r"must have classes or words.*BertForSequenceClassif"):
        measure_model(model, [rows_as_batch(rows)])


def test_an_adaptive_softmax_is_measured_over_all_words():
    from regdrop.tasks.language_modelling.adaptive_input import (
        AdaptiveInputConfig,
        AdaptiveInputForCausalLM,
    )

    config = AdaptiveInputConfig(
        vocab_size=50, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2,
        cutoffs=[10, 25], band_factor=2, dropout=0.2, tail_dropout=0.2,
    )  # fmt: skip
    model = AdaptiveInputForCausalLM(config)
    words = torch.randint(0, 50, (4, 9))
    result = measure_model(model, [{"input_ids": words, "labels": words}], num_masks=3)
    expected = own_loss(model, {"input_ids": words, "labels": words})
    assert result.deployed.nll == pytest.approx(expected, abs=1e-5)
    assert result.items == 4 * 8
    assert result.epkl > 1e-4


def test_the_lines_of_the_page_run(capsys):
    page = (Path(__file__).parent.parent / "docs/disagreement.md").read_text("utf-8")
    block = page.split("```python\n")[1].split("```")[0]
    x, y = items()
    exec(block, {"model": network(), "x": x, "y": y})
    assert len(capsys.readouterr().out.split()) == 4


@pytest.mark.slow
def test_the_command_measures_a_kept_model(tmp_path):
    from regdrop.commands import app

    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    run, output = str(tmp_path / "run"), tmp_path / "out"
    trained = runner.invoke(app, ["train", "digits", "--steps", "60", "--output", run])
    assert trained.exit_code == 0, trained.output
    options = ["--num-masks", "6", "--examples", "1197", "--output", str(output)]
    result = runner.invoke(app, ["measure", run, *options])
    assert result.exit_code == 0, result.output
    assert "mutual information" in result.output
    assert "1,197 test items" in result.output
    assert (output / "measure-test.png").exists()
    kept = json.loads((output / "measure-test.json").read_text())
    record = json.loads((tmp_path / "run/record.json").read_text())
    test = kept["splits"]["test"]
    assert test["deployed"]["nll"] == pytest.approx(record["test"]["nll"], rel=1e-4)
    assert test["deployed"]["accuracy"] == pytest.approx(record["test"]["accuracy"])
    assert kept["splits"]["train"]["items"] == 300
    assert test["epkl"] > 1e-4

    again = runner.invoke(app, ["measure", run, *options])
    assert json.loads((output / "measure-test.json").read_text()) == kept, again.output
    refused = runner.invoke(app, ["measure", run, "--split", "tset"])
    assert refused.exit_code == 2
    assert "split must be one of" in refused.output


def short(preset, **changes):
    training = replace(preset.training, max_steps=4, eval_steps=4, logging_steps=4, batch_size=256)
    return replace(preset, training=training, **changes)


@pytest.mark.slow
def test_words_are_measured_under_teacher_forcing(tmp_path):
    from regdrop.experiments import build_arms
    from regdrop.experiments.evaluating.measure import measure
    from regdrop.experiments.running.run import RunPaths, train_run

    preset = PRESETS["multi30k-de-en"]
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    task = short(
        preset,
        dataset=str(write_translation(tmp_path / "data")),
        model_config={**preset.model_config, **sizes},
        vocabulary_size=80,
        num_beams=1,
    )
    run = tmp_path / "run"
    record = train_run(task, build_arms(task)["rdrop"], 0, RunPaths.alone(run))
    found = measure(run, "test", num_masks=2, examples=10_000)
    assert found.splits["test"].deployed.nll == pytest.approx(record.test["nll"], rel=1e-4)
    assert found.splits["train"].items > 100
    fewer = measure(run, "validation", num_masks=2, examples=3)
    assert set(fewer.splits) == {"train", "validation"}
    assert fewer.splits["train"].items < 40


@pytest.mark.slow
def test_a_run_that_predicts_numbers_is_refused_by_name(tmp_path):
    from regdrop.experiments import build_arms
    from regdrop.experiments.evaluating.measure import measure
    from regdrop.experiments.running.run import RunPaths, train_run

    task = short(
        PRESETS["bert-base-stsb"],
        dataset=str(write_glue(tmp_path / "data", "stsb")),
        model=str(write_encoder(tmp_path / "model")),
        max_length=32,
    )
    train_run(task, build_arms(task)["baseline"], 0, RunPaths.alone(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"classes or words.*the loss 'mse_terms'"):
        measure(tmp_path / "run")
    assert not list((tmp_path / "run").glob("measure*"))
