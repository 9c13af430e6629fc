"""R-Drop as a task of timm: equal to a loop by hand, with what timm does around it."""

import runpy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

timm = pytest.importorskip(
    "timm",
    reason="timm is tested apart: make test installs it into .venv/apart and runs "
    "PYTHONPATH=.venv/apart/timm pytest tests/integrations/apart_timm",
)

from timm.data import Mixup  # noqa: E402
from timm.loss import (  # noqa: E402
    AsymmetricLossSingleLabel,
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyCrossEntropy,
    SoftTargetCrossEntropy,
)
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.task import ClassificationTask, MultiLabelClassificationTask  # noqa: E402

from regdrop import (  # noqa: E402
    RDropConfig,
    find_dropout,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    repeat_batch,
)
from regdrop.commands import app  # noqa: E402
from regdrop.integrations.timm import RDropTask  # noqa: E402

ALPHA, CLASSES, ROWS = 1.5, 3, 4
# A vision transformer that is small enough for a test.
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
FAMILIES = (
    ("vit_tiny_patch16_224", TINY),
    ("convnext_atto", {}),
    ("efficientnet_lite0", {}),
    ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2)}),
    ("resnet18", {"zero_init_last": False}),  # else its branches begin as 0
    ("mobilenetv3_small_050", {}),
    ("mixer_s32_224", {}),
)


def vit(**rates):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **TINY, **rates).train()


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 3, 16, 16, generator=generator)
    return images, torch.tensor([0, 2, 1, 2])


def mixed():
    images, labels = batch()
    mixup = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    images, target = mixup(images, labels)
    assert target.shape == (ROWS, CLASSES)
    return images, target


def smoothed(labels):
    return F.one_hot(labels, CLASSES) * 0.8 + 0.2 / CLASSES


CASES = {
    "classes": (nn.CrossEntropyLoss(), batch, {}),
    "weights": (nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3])), batch, {"weight": [1.0, 2, 3]}),
    "smoothing": (LabelSmoothingCrossEntropy(0.2), batch, {"label_smoothing": 0.2}),
    "mixup and cutmix": (SoftTargetCrossEntropy(), mixed, {}),
    "binary": (BinaryCrossEntropy(0.2), batch, smoothed),
    "binary, soft": (BinaryCrossEntropy(0.2), mixed, lambda target: target),
    "binary, dense": (
        BinaryCrossEntropy(0.2, smooth_dense=True),
        mixed,
        lambda target: target * 0.8 + 0.1,
    ),
}


@pytest.mark.parametrize("rates", [{"drop_path_rate": 0.5}, {"proj_drop_rate": 0.3}])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_a_loop_by_hand(case, rates):
    criterion, make, options = CASES[case]
    images, target = make()
    model = vit(**rates)
    task = RDropTask(model, criterion, rdrop=RDropConfig(alpha=ALPHA)).train()
    torch.manual_seed(7)
    found = task(images, target)
    found["loss"].backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(7)
    logits = model(repeat_batch(images))
    if callable(options):
        expected = rdrop_binary_cross_entropy_with_logits(
            logits, options(target), alpha=ALPHA, scale="mean"
        )
    else:
        given = {n: torch.tensor(v) if n == "weight" else v for n, v in options.items()}
        expected = rdrop_cross_entropy(logits, target, alpha=ALPHA, scale="mean", **given)
    expected.loss.backward()
    assert expected.kl > 1e-5
    for name in ("loss", "nll", "kl"):
        torch.testing.assert_close(found[name], getattr(expected, name), rtol=1e-6, atol=1e-6)
    assert found["alpha"] == ALPHA
    torch.testing.assert_close(found["output"], logits[:ROWS])
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"passes": "sequential"},
        {"passes": "sequential", "fraction": 0.5},
        {"passes": "sequential", "backward_passes": 1},
        {"every_n_steps": 2, "monitor_steps": 1},
    ],
)
def test_the_output_is_that_of_the_first_pass(options):
    """Accuracy is computed from it, against the whole target."""
    images, target = batch()
    model, trained = vit(proj_drop_rate=0.3), []
    model.register_forward_hook(lambda m, i, o: trained.append(o) if o.requires_grad else None)
    task = RDropTask(model, rdrop=RDropConfig(alpha=ALPHA, **options)).train()
    task.step = 1
    assert torch.equal(task(images, target)["output"], trained[0])
    assert len(trained[0]) == len(target)


def test_patches_of_a_naflex_model_are_a_batch():
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    model = timm.create_model("naflexvit_base_patch16_gap", proj_drop_rate=0.3, **sizes).train()
    places = torch.cartesian_prod(torch.arange(2), torch.arange(3)).expand(ROWS, -1, -1)
    patches = {
        "patches": torch.randn(ROWS, 6, 16 * 16 * 3),
        "patch_coord": places,
        "patch_valid": torch.ones(ROWS, 6, dtype=torch.bool),
    }
    target = batch()[1]
    torch.manual_seed(7)
    found = RDropTask(model, rdrop=RDropConfig(alpha=ALPHA)).train()(patches, target)
    torch.manual_seed(7)
    logits = model(repeat_batch(patches))
    torch.testing.assert_close(found["output"], logits[:ROWS])
    expected = rdrop_cross_entropy(logits, target, alpha=ALPHA)
    torch.testing.assert_close(found["loss"], expected.loss)


class MultiLabelTask(RDropTask, MultiLabelClassificationTask):
    """Beside R-Drop, the evaluation of timm's own task for several labels."""


def test_several_labels_are_those_of_timm():
    images, target = batch()[0], torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]])
    model, options = vit(proj_drop_rate=0.3), {"criterion_kwargs": {"smoothing": 0.1}}
    task = MultiLabelTask(model, rdrop=RDropConfig(alpha=ALPHA), threshold=0.4, **options).train()
    torch.manual_seed(7)
    found = task(images, target)
    torch.manual_seed(7)
    expected = rdrop_binary_cross_entropy_with_logits(
        model(repeat_batch(images)), target * 0.9 + 0.05, alpha=ALPHA
    )
    torch.testing.assert_close(found["loss"], expected.loss)
    theirs = MultiLabelClassificationTask(model, **options).eval()
    torch.testing.assert_close(task.eval()(images, target), theirs(images, target))
    assert type(task.create_evaluator()) is type(theirs.create_evaluator())


@pytest.mark.parametrize("case", CASES)
def test_one_pass_and_evaluation_are_those_of_timm(case):
    criterion, make, _ = CASES[case]
    images, target = make()
    baseline = RDropConfig(alpha=0, num_passes=1)
    model = vit(proj_drop_rate=0.3)
    for mode, rdrop in ((True, baseline), (False, RDropConfig())):
        found = []
        for task in (
            RDropTask(model, criterion, rdrop=rdrop),
            ClassificationTask(model, criterion),
        ):
            torch.manual_seed(7)
            found.append(task.train(mode)(images, target))
        torch.testing.assert_close(found[0]["loss"], found[1]["loss"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[0]["output"], found[1]["output"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_drop_path_is_found_in_every_family_and_makes_passes_differ(name, options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.5, **options).train()
    nn.init.normal_(model.get_classifier().weight)  # some begin as 0
    sources = [source for source in find_dropout(model) if source.active]
    assert {source.kind for source in sources} == {"stochastic depth"}
    size = options.get("img_size", 224 if name.startswith(("swin", "mixer")) else 64)
    task = RDropTask(model, rdrop=RDropConfig()).train()
    assert task(torch.randn(2, 3, size, size), torch.tensor([0, 1]))["kl"] > 0


def test_schedule_counts_the_steps_of_an_accumulating_loop_and_is_kept_in_checkpoints():
    config = RDropConfig(alpha=2.0, start_step=1, alpha_schedule="linear", alpha_warmup_ratio=1.0)
    options = {"rdrop": config, "grad_accum_steps": 2, "total_steps": 4}
    task = RDropTask(vit(drop_path_rate=0.5), **options).train()
    results = [task(*batch()) for _ in range(6)]
    alphas = [float(result["alpha"]) for result in results]
    assert alphas == pytest.approx([0, 0, 0, 0, 2 / 3, 2 / 3])
    assert results[0]["kl"] == 0 < results[2]["kl"]
    other = RDropTask(vit(drop_path_rate=0.5), **options).train()
    state = task.get_checkpoint_state()
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert other.step == task.step == 3
    assert float(other(*batch())["alpha"]) == pytest.approx(4 / 3)
    other.step = 2
    assert float(other(*batch())["alpha"]) == pytest.approx(2 / 3)


def test_a_loop_whose_epochs_end_inside_a_window_sets_the_step():
    config = RDropConfig(alpha=6.0, alpha_schedule="linear", alpha_warmup_ratio=1.0)
    options = {"rdrop": config, "grad_accum_steps": 2, "total_steps": 4}
    task, steps, alphas = RDropTask(vit(drop_path_rate=0.5), **options).train(), 0, []
    for _ in range(2):
        for is_step in (False, True, True):  # three batches an epoch: a window of two, one of one
            alphas.append(float(task(*batch())["alpha"]))
            if is_step:
                steps += 1
                task.step = steps
    assert alphas == pytest.approx([0, 0, 1.5, 3, 3, 4.5])


def test_moving_average_layer_decay_and_compilation():
    model = vit(drop_path_rate=0.5)
    task = RDropTask(model, rdrop=RDropConfig(alpha=ALPHA)).train()
    task.setup_ema(decay=0.5)
    task.compile(backend="eager")
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, layer_decay=0.5)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    found = task(*batch())
    torch.manual_seed(7)
    plain = RDropTask(model, rdrop=RDropConfig(alpha=ALPHA)).train()(*batch())
    torch.testing.assert_close(found["loss"], plain["loss"], rtol=1e-5, atol=1e-6)
    found["loss"].backward()
    optimizer.step()
    task.update_ema(step=2)
    ema = task.get_trainable_module(ema=True).module.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ema[name], (before[name] + value) / 2)
    task.eval()
    assert set(task(*batch())) == {"loss", "output"}


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (AsymmetricLossSingleLabel(), "got AsymmetricLossSingleLabel"),
        (PolyCrossEntropy(), "got PolyCrossEntropy"),
        (JsdCrossEntropy(), "got JsdCrossEntropy"),
        (BinaryCrossEntropy(sum_classes=True), "got sum_classes=True"),
        (BinaryCrossEntropy(target_threshold=0.2), "target_threshold of BinaryCrossEntropy"),
        (BinaryCrossEntropy(reduction="sum"), "got reduction='sum'"),
        (nn.CrossEntropyLoss(reduction="sum"), "got reduction='sum'"),
        (F.cross_entropy, "got function"),
    ],
)
def test_losses_that_it_would_change_are_refused_by_name(criterion, message):
    with pytest.raises(ValueError, match=message):
        RDropTask(vit(drop_path_rate=0.5), criterion)


def test_distillation_is_refused():
    model = timm.create_model("deit_tiny_distilled_patch16_224", drop_path_rate=0.1)
    RDropTask(model)  # as long as its second head is not trained
    model.set_distilled_training(True)
    with pytest.raises(ValueError, match="VisionTransformerDistilled in distilled training"):
        RDropTask(model)
    with pytest.raises(ValueError, match="got a task of timm, ClassificationTask"):
        RDropTask(ClassificationTask(vit(drop_path_rate=0.5)))


def test_options_are_checked():
    model = vit(drop_path_rate=0.5)
    with pytest.raises(TypeError, match="rdrop must be an RDropConfig, got float"):
        RDropTask(model, rdrop=1.0)
    with pytest.raises(ValueError, match="alpha_rule must be 'ramp'"):
        RDropTask(model, rdrop=RDropConfig(alpha="auto", alpha_rule="gap"))
    with pytest.raises(ValueError, match="grad_accum_steps must be at least 1, got 0"):
        RDropTask(model, grad_accum_steps=0)
    with pytest.raises(ValueError, match=r"class_weight=.*is an option of loss='cross_entropy'"):
        RDropTask(model, rdrop=RDropConfig(class_weight=(1, 1, 1))).train()(*batch())


def test_default_vit_is_warned_about():
    with pytest.warns(UserWarning, match="VisionTransformer has no source of dropout.*drop_path"):
        RDropTask(vit())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RDropTask(vit(), rdrop=RDropConfig(alpha=0, num_passes=1))
        RDropTask(vit(attn_drop_rate=0.1))


def test_doctor_knows_the_names_of_timm():
    result = CliRunner().invoke(app, ["doctor", "resnet18"])
    assert result.exit_code == 1
    assert "ResNet: sources of dropout" in result.output
    assert "Raise a dropout rate" in result.output or "Add dropout to the model" in result.output


@pytest.mark.slow
def test_example_is_the_plain_loop():
    """Run the example down to its training; three steps by hand have its losses and gradients."""
    source = (Path(__file__).parents[3] / "examples" / "timm_task.py").read_text(encoding="utf-8")
    names = {}
    exec(compile(source[: source.index("\nfor _ in range")], "timm_task", "exec"), names)
    task, model = names["task"], names["model"]
    task.train()

    def gradients(loss):
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    for number, (x, y) in zip(range(3), names["loader"], strict=False):
        torch.manual_seed(number)
        result = task(x, y)
        torch.manual_seed(number)
        first, second = model(x.repeat(2, 1, 1, 1)).chunk(2)
        nll = sum(F.cross_entropy(z, y, label_smoothing=0.1) for z in (first, second)) / 2
        log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
        kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean() / 2
        assert kl > 1e-4
        found, expected = gradients(result["loss"]), gradients(nll + kl / 2)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            for parameter, slope in zip(model.parameters(), found[1:], strict=True):
                parameter.sub_(0.05 * slope)


@pytest.mark.slow
def test_example_learns(capsys):
    runpy.run_path(str(Path(__file__).parents[3] / "examples" / "timm_task.py"))
    printed = capsys.readouterr().out
    assert float(printed.split("accuracy")[1]) > 0.85
    assert "kl" in printed
