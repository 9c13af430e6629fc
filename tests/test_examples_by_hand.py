"""The examples of frameworks, scripts and lines of a page, take the steps of a plain loop, to 1e-6.

A script is run down to its training; then it takes three steps of SGD, whose update is the
gradient, and a loop by hand takes them again: two forwards' worth of rows, two cross entropies and
the KL in both directions as public implementations write them.
"""

import importlib.util
import re
import runpy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from accelerate import Accelerator
from ignite.engine import Events
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import cos_sim
from sklearn.datasets import load_digits
from skorch.callbacks import EpochScoring
from skorch.hf import AccelerateMixin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from reference import official_loss
from regdrop import repeat_batch

EXAMPLES = Path(__file__).parent.parent / "examples"
FRAMEWORKS = EXAMPLES.parent / "docs/frameworks/skorch-and-ignite.md"
STEPS, RATE = 3, 0.05
TRAINS = "trainer.train()"


def seed_forwards(model):
    """Begin every forward in training with masks of its own number; return the handle."""
    count = iter(range(1000))
    model.train()

    def seed(module, args):
        if module.training:
            torch.manual_seed(next(count))

    return model.register_forward_pre_hook(seed)


def repeat_steps(model, batches, loss_of):
    """Take the same steps by hand; return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    handle, losses = seed_forwards(model), []
    for batch in batches:
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    handle.remove()
    return losses


def assert_same_steps(model, start, batches, losses, loss_of):
    """Hold what a framework did from `start` on against the plain loop."""
    learned = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(start)
    assert len(batches) == STEPS
    assert losses == pytest.approx(repeat_steps(model, batches, loss_of), rel=1e-5)
    for ours, theirs in zip(learned, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert any((p - start[n]).abs().max() > 1e-4 for n, p in model.named_parameters())


def trainer_of(name, folder):
    """Run an example down to its training, and return its trainer, which has three plain steps."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert source.count(TRAINS) == 1
    script = folder / f"{name}.py"
    script.write_text(source[: source.index(TRAINS)], encoding="utf-8")
    trainer = runpy.run_path(str(script))["trainer"]
    changes = {
        "max_steps": STEPS,
        "learning_rate": RATE,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
    }
    for option, value in changes.items():
        assert hasattr(trainer.args, option)
        setattr(trainer.args, option, value)
    return trainer


def check_trainer(trainer, loss_of):
    """Train, and hold every step against the plain loop."""
    batches, model = [], trainer.model
    step = trainer.training_step

    def note(model, inputs, *rest):
        batches.append({name: inputs[name] for name in inputs})
        return step(model, inputs, *rest)

    trainer.training_step = note
    start = {name: value.clone() for name, value in model.state_dict().items()}
    handle = seed_forwards(model)
    trainer.train()
    handle.remove()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert_same_steps(model, start, batches, losses, loss_of)


def classes_by_hand(logits, target):
    """Return the loss of the examples, alpha 1, on the scale of one pass."""
    return official_loss(logits, target, 1.0) / 2


@pytest.mark.slow
def test_the_trainers_example_is_the_plain_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def loss_of(model, batch):
        return classes_by_hand(
            model(pixel_values=batch["pixel_values"].repeat(2, 1, 1, 1)).logits, batch["labels"]
        )

    check_trainer(trainer_of("transformers_trainer", tmp_path), loss_of)


@pytest.mark.slow
def test_trls_example_is_the_plain_loop(tmp_path):
    def loss_of(model, batch):
        words = batch["input_ids"].repeat(2, 1)
        logits = model(input_ids=words, attention_mask=batch["attention_mask"].repeat(2, 1)).logits
        target = batch["labels"][:, 1:]
        counted = (target != -100).repeat(2, 1)
        return classes_by_hand(logits[:, :-1][counted], target[target != -100])

    check_trainer(trainer_of("trl_finetuning", tmp_path), loss_of)


@pytest.mark.slow
def test_the_example_of_sentences_is_the_plain_loop(tmp_path):
    trainer = trainer_of("sentence_embeddings", tmp_path)

    def loss_of(model, batch):
        columns, _ = trainer.collect_features(batch)
        embeddings = embed_columns(model, [repeat_batch(dict(column)) for column in columns])
        passes = zip(*(column.chunk(2) for column in embeddings), strict=True)
        scores = torch.cat([20 * cos_sim(first, second) for first, second in passes])
        return classes_by_hand(scores, torch.arange(len(scores) // 2))

    check_trainer(trainer, loss_of)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.slow
def test_lightnings_example_is_the_plain_loop():
    spec = importlib.util.spec_from_file_location(
        "lightning_module", EXAMPLES / "lightning_module.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    module = example.Digits()
    batches, losses = [], []
    module.on_train_batch_start = lambda batch, index: batches.append(batch)
    module.on_train_batch_end = lambda outputs, batch, index: losses.append(float(outputs["loss"]))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=RATE)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    loader = DataLoader(TensorDataset(x.float() / 16, y), batch_size=32)
    handle = seed_forwards(module.network)
    quiet = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    pl.Trainer(max_steps=STEPS, accelerator="cpu", **quiet).fit(module, loader)
    handle.remove()

    def loss_of(model, batch):
        return classes_by_hand(model(batch[0].repeat(2, 1)), batch[1])

    start = {name.removeprefix("network."): value for name, value in start.items()}
    assert_same_steps(module.network, start, batches, losses, loss_of)


def lines_with(name):
    """Return the lines of the page that import a library."""
    found = re.findall(r"```python\n(.*?)```", FRAMEWORKS.read_text(encoding="utf-8"), re.S)
    (block,) = [block for block in found if re.search(f"^from {name}", block, re.M)]
    return block


def digits_network():
    """Return a small network, its digits in batches, and what its plain loop minimises."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))
    x, y = (torch.from_numpy(part)[: STEPS * 32] for part in load_digits(return_X_y=True))
    batches = list(zip((x.float() / 16).split(32), y.split(32), strict=True))

    def loss_of(model, batch):
        return classes_by_hand(model(batch[0].repeat(2, 1)), batch[1])

    return model, batches, loss_of


def test_skorchs_lines_run():
    _, batches, _ = digits_network()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    setting = {"model": nn.Sequential(nn.Linear(64, 10), nn.Dropout(0.1)), "x": x, "y": y}
    exec(lines_with("skorch"), setting)
    assert setting["net"].score(x, y) > 0


class CountingAccelerator(Accelerator):
    """Counts the backwards that go through it; in half precision it scales them."""

    num_backwards = 0

    def backward(self, loss, **options):
        self.num_backwards += 1
        super().backward(loss, **options)


@pytest.mark.parametrize("is_accelerated", [False, True])
def test_skorchs_lines_are_the_plain_loop(is_accelerated):
    model, batches, loss_of = digits_network()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    source, options = lines_with("skorch").split("net = ")[0], {}
    if is_accelerated:
        before, after = "(NeuralNetClassifier)", "(AccelerateMixin, NeuralNetClassifier)"
        assert source.count(before) == 1
        accelerator = CountingAccelerator(cpu=True)
        source, options = source.replace(before, after), {"accelerator": accelerator}
    setting = {"AccelerateMixin": AccelerateMixin}
    exec(source, setting)
    net = setting["RDropClassifier"](
        model,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        lr=RATE,
        batch_size=32,
        max_epochs=1,
        train_split=None,
        verbose=0,
        callbacks=[EpochScoring("accuracy", on_train=True, lower_is_better=False)],
        **options,
    )
    handle = seed_forwards(model)
    net.fit(x, y)
    handle.remove()
    assert not is_accelerated or accelerator.num_backwards == STEPS
    losses = net.history[0, "batches", :, "train_loss"]
    assert_same_steps(model, start, batches, losses, loss_of)


def test_ignites_lines_are_the_plain_loop():
    model, batches, loss_of = digits_network()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    source = lines_with("ignite")
    for theirs, ours in (
        ("torch.optim.AdamW(model.parameters())", "torch.optim.SGD(model.parameters(), lr=RATE)"),
        ("trainer.run([(x, y)], max_epochs=2)", ""),
    ):
        assert source.count(theirs) == 1
        source = source.replace(theirs, ours)
    setting = {"model": model, "RATE": RATE}
    exec(source, setting)
    losses = []
    setting["trainer"].add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output)
    )
    handle = seed_forwards(model)
    setting["trainer"].run(batches, max_epochs=1)
    handle.remove()
    assert_same_steps(model, start, batches, losses, loss_of)
