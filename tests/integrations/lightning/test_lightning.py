"""R-Drop in Lightning: equal to a loop by hand, logged, scheduled by optimiser steps, refused."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from regdrop import RDropConfig, rdrop_step
from regdrop.integrations.lightning import RDropMixin
from regdrop.loss import cross_entropy_terms

ALPHA, SEED = 1.5, 11


def data(size=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 4, generator=generator)
    return TensorDataset(x, torch.randint(3, (size,), generator=generator))


def network(dropout=0.5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


class Classifier(RDropMixin, pl.LightningModule):
    """A network in whose place every batch begins with the masks of one seed."""

    def __init__(self, rdrop, dropout=0.5):
        super().__init__()
        self.rdrop, self.network, self.logs = rdrop, network(dropout), []

    def forward(self, x):
        return self.network(x)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(SEED + batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        values = {k: float(v) for k, v in self.trainer.callback_metrics.items()}
        self.logs.append({**values, "loss": float(outputs["loss"])})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(module, steps=2, loader=None, **options):
    trainer = pl.Trainer(**{"max_steps": steps, **QUIET, **options})
    if loader is None and not is_overridden("train_dataloader", module):
        loader = DataLoader(data(), batch_size=4)
    trainer.fit(module, loader)
    return module


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_those_of_a_loop_by_hand(accumulation, precision):
    config = RDropConfig(alpha=ALPHA)
    module = fit(Classifier(config), accumulate_grad_batches=accumulation, precision=precision)
    model, index, logs = network(), 0, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = list(DataLoader(data(), batch_size=4))
    for step in range(2):
        for _ in range(accumulation):
            torch.manual_seed(SEED + index)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                output = rdrop_step(model, *batches[index], config=config, step=step)
            (output.loss / accumulation).backward()
            logs.append({"nll": float(output.nll), "kl": float(output.kl), "alpha": ALPHA})
            index += 1
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(module.network.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(module.logs, logs, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-5)
    assert module.logs[0]["kl"] > 1e-3


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_schedule_counts_optimiser_steps_and_knows_the_end_of_the_run():
    config = RDropConfig(
        alpha=2.0, start_step=1, alpha_schedule="linear", alpha_warmup_ratio=1.0, monitor_steps=1
    )
    loader = DataLoader(data(32), batch_size=4)
    module = fit(Classifier(config), -1, loader, max_epochs=1, accumulate_grad_batches=2)
    # Eight micro-batches are four steps, of which the first has one pass.
    alphas = [log.get("alpha", 0.0) for log in module.logs]
    assert alphas == pytest.approx([0, 0, 0, 0, 2 / 3, 2 / 3, 4 / 3, 4 / 3])
    assert all(log["kl"] > 0 for log in module.logs)
    assert module.trainer.global_step == 4


class Dictionaries(Classifier):
    """Batches that are no pair, and a loss of one's own."""

    def __init__(self, rdrop):
        super().__init__(rdrop)
        self.rdrop_loss = partial(cross_entropy_terms, label_smoothing=0.2)

    def rdrop_batch(self, batch):
        return {"x": batch["x"]}, batch["y"]

    def forward(self, inputs):
        return self.network(inputs["x"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_hook_and_loss_of_ones_own():
    x, y = data().tensors
    rows = [{"x": one, "y": label} for one, label in zip(x, y, strict=True)]
    config = RDropConfig(alpha=ALPHA)
    module = fit(Dictionaries(config), 1, DataLoader(rows, batch_size=4))
    terms, model = partial(cross_entropy_terms, label_smoothing=0.2), network()
    torch.manual_seed(SEED)
    expected = rdrop_step(model, x[:4], y[:4], config=config, step=0, loss=terms)
    assert module.logs[0]["loss"] == pytest.approx(expected.loss.item(), rel=1e-6)


class Opaque:
    """Inputs that are no structure of tensors, as a graph of another library."""

    def __init__(self, x):
        self.x = x


class Opaques(Classifier):
    def rdrop_batch(self, batch):
        return Opaque(batch[0]), batch[1]

    def forward(self, inputs):
        return self.network(inputs.x)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_sequential_passes_take_inputs_of_any_kind():
    config = RDropConfig(alpha=ALPHA, passes="sequential")
    module = fit(Opaques(config), 1)
    (x, y), model = data().tensors, network()
    torch.manual_seed(SEED)
    expected = rdrop_step(model, x[:4], y[:4], config=config, step=0)
    assert module.logs[0]["nll"] == pytest.approx(expected.nll.item(), rel=1e-6)
    assert module.logs[0]["kl"] == pytest.approx(expected.kl.item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_options_are_saved_with_the_checkpoint(tmp_path):
    module = fit(Classifier(RDropConfig(alpha=ALPHA)), 1)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["rdrop"]
    assert RDropConfig.from_dict(saved) == RDropConfig(alpha=ALPHA)


class Saved(Classifier):
    """Keeps its arguments, the options among them, as hyperparameters."""

    def __init__(self, rdrop, dropout=0.5):
        super().__init__(rdrop, dropout)
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_options_among_the_hyperparameters_come_back_with_the_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    fit(Saved(RDropConfig(alpha=ALPHA)), 1).trainer.save_checkpoint(path)
    assert Saved.load_from_checkpoint(path).rdrop == RDropConfig(alpha=ALPHA)
    module, loader = Saved(RDropConfig()), DataLoader(data(), batch_size=4)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    pl.Trainer(max_steps=2, **options).fit(module, loader, ckpt_path=path)
    assert len(module.logs) == 1


class Manual(Classifier):
    """Optimises by itself."""

    @property
    def automatic_optimization(self):
        return False


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_what_has_no_meaning_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match="automatic_optimization must be True"):
        fit(Manual(RDropConfig()))
    with pytest.raises(TypeError, match="got Tensor: override rdrop_batch of Classifier"):
        fit(Classifier(RDropConfig()), 1, DataLoader(data().tensors[0], batch_size=4))
    with pytest.raises(TypeError, match="got list of 3: override rdrop_batch"):
        fit(Classifier(RDropConfig()), 1, DataLoader([(*row, 0) for row in data()], batch_size=4))
    with pytest.raises(TypeError, match="rdrop must be an RDropConfig, got dict"):
        fit(Classifier({"alpha": 1.0}))
    with pytest.raises(ValueError, match="alpha_rule must be 'ramp', got 'stall'"):
        fit(Classifier(RDropConfig(alpha="auto", alpha_rule="stall")))
    rates = RDropConfig(dropout_rates=(0.1, 0.2), passes="sequential")
    with pytest.raises(ValueError, match=r"dropout_rates.*must hold until the backward"):
        fit(Classifier(rates))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from data()


RAMP = {"alpha_schedule": "linear"}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*`max_epochs` was not set")
@pytest.mark.parametrize("options", [{"alpha": "auto"}, {**RAMP, "alpha_warmup_ratio": 0.5}])
@pytest.mark.parametrize("run", ["time", "data"])
def test_a_run_whose_length_nobody_knows_has_a_ramp_of_known_length(options, run):
    endless = DataLoader(Endless(), batch_size=4)
    loader, limits = {
        "time": (None, {"max_epochs": -1, "max_time": {"seconds": 5}}),
        "data": (endless, {"max_epochs": 1}),
    }[run]
    with pytest.raises(ValueError, match=r"by Trainer\(max_steps=...\), .* alpha_warmup_steps"):
        fit(Classifier(RDropConfig(**options)), -1, loader, **limits)
    # The ways out that are told.
    told = RDropConfig(alpha=2.0, **RAMP, alpha_warmup_steps=2)
    found = fit(Classifier(told), -1, loader, **{**limits, "max_epochs": 1}, limit_train_batches=2)
    assert [log["alpha"] for log in found.logs] == [0.0, 1.0]
    assert len(fit(Classifier(RDropConfig(**options)), 2, loader).logs) == 2


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_accumulation_that_changes_between_epochs_has_a_ramp_of_known_length():
    changing = GradientAccumulationScheduler({0: 2, 1: 1})
    ratio = RDropConfig(alpha=6.0, **RAMP, alpha_warmup_ratio=1.0)
    with pytest.raises(ValueError, match=r"GradientAccumulationScheduler .* without max_epochs"):
        fit(Classifier(ratio), -1, max_epochs=2, callbacks=[changing])
    # The ways out that are told; four batches are two steps in the first epoch, four in the second.
    told = RDropConfig(alpha=6.0, **RAMP, alpha_warmup_steps=6)
    for config, limits in ((ratio, {"max_steps": 6}), (told, {"max_epochs": 2})):
        found = fit(Classifier(config), -1, **limits, callbacks=[changing])
        assert [log["alpha"] for log in found.logs] == [0, 0, 1, 1, 2, 3, 4, 5]


class ForLearningRates(pl.Callback):
    """A callback of one's own, which schedules something else."""

    def __init__(self):
        self.scheduling = {0: 2, 1: 1}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (ForLearningRates(), [0, 1, 2, 3]),
        (GradientAccumulationScheduler({0: 2, 1: 1}), [0, 0, 2, 2]),
        (GradientAccumulationScheduler({0: 2, 1: 2}), [0, 0, 2, 2]),
    ],
)
def test_accumulation_that_stays_through_the_run_has_a_known_length(callback, expected):
    ratio = RDropConfig(alpha=4.0, **RAMP, alpha_warmup_ratio=1.0)
    found = fit(Classifier(ratio), -1, max_epochs=1, callbacks=[callback])
    assert [log["alpha"] for log in found.logs] == expected


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_scheduler_of_the_other_package_of_lightning_is_known():
    """Lightning is two packages of the same code, and its classes are not the same."""
    other = pytest.importorskip("pytorch_lightning")

    class OfOther(RDropMixin, other.LightningModule):
        def __init__(self):
            super().__init__()
            self.rdrop, self.network = RDropConfig(**RAMP, alpha_warmup_ratio=1.0), network()

        forward, configure_optimizers = Classifier.forward, Classifier.configure_optimizers

    scheduler = other.callbacks.GradientAccumulationScheduler({0: 2, 1: 1})
    trainer = other.Trainer(max_epochs=2, callbacks=[scheduler], **QUIET)
    with pytest.raises(ValueError, match="a GradientAccumulationScheduler changes the steps"):
        trainer.fit(OfOther(), DataLoader(data(), batch_size=4))


class SharedStep(Classifier):
    """Validates by the step that it trains by, as many modules do."""

    def validation_step(self, batch, batch_idx):
        self.found = self.training_step(batch, batch_idx)
        self.expected = nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_validation_that_calls_the_step_has_the_nll_of_one_pass():
    module = SharedStep(RDropConfig(alpha=ALPHA, scale="sum"))
    passes = []
    module.network.register_forward_hook(lambda m, inputs, output: passes.append(len(output)))
    loader = DataLoader(data(), batch_size=4)
    fit(module, -1, loader, max_epochs=1)
    trained = module.trainer.callback_metrics
    passes.clear()
    module.trainer.validate(module, loader, verbose=False)
    torch.testing.assert_close(module.found, module.expected)
    assert passes == [4] * 8
    assert trained["kl"] > 0
    assert not module.trainer.callback_metrics


def test_module_without_dropout_is_warned_about():
    with pytest.warns(UserWarning, match="no active source of dropout"):
        fit(Classifier(RDropConfig(), dropout=0.0))


class FadedSecondPass(nn.Module):
    """Stands for dropout: two passes differ, and always by the same."""

    def forward(self, x):
        factor = torch.ones(len(x), 1, dtype=x.dtype)
        factor[len(x) // 2 :] = 0.1
        return x * factor


class Exact(Classifier):
    """Passes that differ alike in every process."""

    def __init__(self, rdrop, path=None):
        super().__init__(rdrop)
        self.network[2], self.path = FadedSecondPass(), path
        self.double()

    def forward(self, x):
        return self.network(x.double())

    def train_dataloader(self):
        size, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(data(), size, rank, shuffle=False)
        return DataLoader(data(), batch_size=8 // size, sampler=sampler)

    def on_fit_end(self):
        if self.path is not None:
            torch.save(self.network.state_dict(), f"{self.path}/{self.global_rank}.pt")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_two_processes_have_the_gradient_of_one_batch(tmp_path):
    config = RDropConfig(alpha=ALPHA)
    spread = {"strategy": "ddp_spawn", "devices": 2, "use_distributed_sampler": False}
    fit(Exact(config, tmp_path), **spread)
    expected = fit(Exact(config)).network
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-9, atol=1e-12)


class OwnStep(Classifier):
    """Has a training_step of its own, as before R-Drop."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Plain(pl.LightningModule):
    training_step = OwnStep.training_step


class PlainBefore(Plain, Classifier):
    """Inherits first from a module that has a training_step."""


class Around(Classifier):
    """Adds to the step of the mixin."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0


def warnings_of(module, recwarn):
    fit(module)
    return [str(one.message) for one in recwarn if "R-Drop is off" in str(one.message)]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("kind", [OwnStep, PlainBefore])
def test_a_training_step_of_ones_own_is_warned_about_once(kind, recwarn):
    (message,) = warnings_of(kind(RDropConfig()), recwarn)
    assert f"another that {kind.__name__} has. Delete that one" in message


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("kind", [Classifier, Around])
def test_the_mixins_step_is_not_warned_about(kind, recwarn):
    assert not warnings_of(kind(RDropConfig()), recwarn)


def test_a_mixin_behind_lightnings_own_class_is_refused():
    with pytest.raises(TypeError, match=r"first base of Late, got \(Plain, RDropMixin\)"):
        type("Late", (Plain, RDropMixin), {})


def test_without_a_trainer_the_function_is_named():
    module = Classifier(RDropConfig())
    batch = tuple(tensor[:4] for tensor in data().tensors)
    with pytest.raises(ValueError, match=r"needs a Trainer.*rdrop_step\(model, x, y, config="):
        module.training_step(batch, 0)
    fabric = Fabric(accelerator="cpu", devices=1)
    model, _ = fabric.setup(module, module.configure_optimizers())
    with pytest.raises(ValueError, match=r"in Fabric .* config=model\.rdrop, step=i"):
        model.training_step(batch, 0)
    assert rdrop_step(model, *batch, config=model.rdrop, step=0).kl > 0
