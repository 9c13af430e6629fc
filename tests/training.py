"""Runs of the Trainer that the tests of its integration share, and models of no known class."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers.utils import ModelOutput

from models import Rows
from regdrop.integrations.transformers import RDropTrainer

FEATURES = 6
# How the Trainer learns by itself, where a test is of what it learns.
BY_ITSELF = {
    "optim": "adamw_torch_fused",
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "random",
}


def arguments(folder, kind=TrainingArguments, **options):
    """Return arguments under which an update is the gradient, and nothing is random but dropout.

    Adam would make steps of the noise in gradients that are 0 in truth (the keys' biases).
    """
    defaults = {
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return kind(output_dir=str(folder), **{**defaults, **options})


def build(folder, model, rows=None, rdrop=None, kind=RDropTrainer, further=None, **options):
    """Return a trainer; `options` are those of its arguments, `further` its own."""
    is_seq2seq = issubclass(kind, Seq2SeqTrainer)
    kind_of_arguments = Seq2SeqTrainingArguments if is_seq2seq else TrainingArguments
    extra = {"rdrop": rdrop} if rdrop is not None else {}
    return kind(
        model=model,
        args=arguments(folder, kind_of_arguments, **options),
        train_dataset=rows,
        eval_dataset=rows,
        **extra,
        **(further or {}),
    )


def train(*args, **kwargs):
    """Train a trainer of `build`, and return it."""
    trainer = build(*args, **kwargs)
    trainer.train()
    return trainer


def logged(trainer, name):
    """Return what was logged under a name, one number a log."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def parameters(trainer):
    """Return copies of the whole parameters of a trainer's model, on the CPU."""
    whole = (
        p.full_tensor() if hasattr(p, "full_tensor") else p for p in trainer.model.parameters()
    )
    return [p.detach().cpu().clone() for p in whole]


class Outcome(NamedTuple):
    """What a run logged, name by name, and the parameters that it left; processes can send it."""

    logs: dict[str, list[float]]
    parameters: list[Tensor]


def outcome(trainer, names=("loss",)):
    """Return what a trainer logged under some names, and its parameters."""
    return Outcome({name: logged(trainer, name) for name in names}, parameters(trainer))


def assert_same_outcome(a, b, *, rtol=1e-5, atol=1e-6, log_rtol=None, least_kl=None):
    """Assert that two runs logged and learned the same, and that their passes differed."""
    assert a.logs.keys() == b.logs.keys()
    for name in a.logs:
        ours, theirs = torch.tensor(a.logs[name]), torch.tensor(b.logs[name])
        assert len(ours) == len(theirs) > 0
        torch.testing.assert_close(ours, theirs, rtol=log_rtol or rtol, atol=atol)
    for x, y in zip(a.parameters, b.parameters, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)
    if least_kl is not None:
        assert min(a.logs["kl"]) > least_kl


def assert_same_run(a, b, names=("loss",), **tolerances):
    """Assert that two trainers logged the same under some names and left the same parameters."""
    assert_same_outcome(outcome(a, names), outcome(b, names), **tolerances)


# What a run with R-Drop logs of its loss.
PARTS = ("loss", "nll", "kl", "grad_norm")


def assert_same_rdrop_run(a, b, **tolerances):
    """Assert the same of every part of the loss with R-Drop, and that its passes differed."""
    assert_same_run(a, b, PARTS, **{"log_rtol": 1e-4, "least_kl": 0.0, **tolerances})


def record_scores(model, name="scores"):
    """Return a list that fills with the scores of every forward in training."""
    seen = []

    def note(module, args, kwargs, output):
        # Looks at a loss before the first step have no gradient.
        if module.training and torch.is_grad_enabled():
            scores = output[name] if isinstance(output, dict) else getattr(output, name)
            seen.append(scores.detach().clone())

    model.register_forward_hook(note, with_kwargs=True)
    return seen


def said(caplog):
    """Return what R-Drop said, one line a message."""
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("R-Drop: ")]


@dataclass
class PlainOutput:
    """A dataclass of one's own as the output of a model."""

    loss: Any
    scores: Tensor

    def __getitem__(self, index):
        return (self.loss, self.scores)[index]


@dataclass
class HuggingOutput(ModelOutput):
    """The library's way to return outputs."""

    loss: Tensor | None = None
    scores: Tensor | None = None


class Plain(nn.Module):
    """A network of no known class that returns its loss, as the Trainer wants it.

    Args:
        criterion: From scores and labels to the loss.
        width: Numbers that it returns for each row (or for each position).
        output: "dict", "tuple", "dataclass" or "model output".
        shape: From the scores, (rows, ..., width), to those that it returns.
        label: Name of the labels.
        needs_labels: Whether it cannot run without them.
        dropout: Its rate.
    """

    def __init__(
        self,
        criterion,
        width=3,
        output="dict",
        shape=None,
        label="labels",
        needs_labels=False,
        dropout=0.3,
    ):
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(8, width)
        self.criterion, self.output, self.shape = criterion, output, shape
        self.label, self.needs_labels = label, needs_labels

    def forward(self, x, **labels):
        scores = self.head(self.body(x))
        scores = scores if self.shape is None else self.shape(scores)
        target = labels[self.label] if self.needs_labels else labels.get(self.label)
        loss = None if target is None else self.criterion(scores, target)
        if self.output == "tuple":
            return (scores,) if loss is None else (loss, scores)
        if self.output == "dataclass":
            return PlainOutput(loss, scores)
        if self.output == "model output":
            return HuggingOutput(loss, scores)
        return {"scores": scores} if loss is None else {"loss": loss, "scores": scores}


class NamedRows(Rows):
    """Rows whose labels may have any name."""

    def __len__(self):
        return len(next(iter(self.columns.values())))


def number_rows(labels, size=16, positions=None, label="labels", seed=1):
    """Return rows of random numbers, of one position or of several, beside their labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, FEATURES) if positions is None else (size, positions, FEATURES)
    return NamedRows(x=torch.randn(shape, generator=generator), **{label: labels})
