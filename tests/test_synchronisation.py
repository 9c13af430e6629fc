"""A training step never waits for a device to tell a number.

Tensors of the meta device hold no numbers at all, and a loss takes every other branch there than
that of a CPU: what needs a number fails, or is found by the operations that would read one.
"""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import regdrop
from regdrop import linear_rdrop_cross_entropy, rdrop_cross_entropy
from regdrop.divergence_watch import watch_divergence
from regdrop.kernels import chunked, fused_linear
from regdrop.loss import adaptive_softmax_terms, checks, ctc_terms, linear_items
from regdrop.loss import ctc as ctc_file
from regdrop.loss.class_weight import class_weight_on

# They read a number, or give a tensor whose shape depends on one.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
}


class Waits(TorchDispatchMode):
    """Notes the operations that a GPU would be waited for, and numbers that are copied to one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __enter__(self):
        self.patches = pytest.MonkeyPatch()
        for name in ("tensor", "as_tensor"):  # they give a tensor before any operation is seen
            self.patches.setattr(torch, name, partial(self.make, getattr(torch, name), name))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.undo()
        return super().__exit__(*error)

    def make(self, function, name, data, *args, **kwargs):
        made = function(data, *args, **kwargs)
        if not isinstance(data, torch.Tensor) and not made.is_cpu:
            self.found.append(f"torch.{name}")
        return made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        is_boolean_index = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        result = function(*args, **(kwargs or {}))
        is_copied = name == "aten::_to_copy" and args[0].is_cpu and not result.is_cpu
        if name in WAITING or is_boolean_index or is_copied:
            self.found.append(name)
        return result


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def classes(*shape):
    return torch.zeros(shape, dtype=torch.long, device="meta")


def cross_entropy(**options):
    loss = partial(rdrop_cross_entropy, alpha=1.0, **options)
    return lambda: loss(meta(8, 3, 11), classes(4, 3)).loss


def linear(dtype=torch.float32, **options):
    loss = partial(linear_rdrop_cross_entropy, alpha=1.0, **options)
    return lambda: loss(meta(8, 3, 6, dtype=dtype), meta(11, 6, dtype=dtype), classes(4, 3)).loss


UNLABELLED = {"unlabelled_index": -1}


def numbers_of_items(**options):
    return cross_entropy(num_items=9, num_weight=5.5, **options)


OPTIONS = [
    {},
    {"reduction": "none", "label_smoothing": 0.1},
    {"reduction": "sum", "backward_passes": 1},
    {"unlabelled_index": -1, "ignore_index": 3},
    {"num_items": torch.empty((), device="meta"), "scale": "mean"},
]
LOSSES = {
    **{f"cross entropy, {impl}": cross_entropy(impl=impl) for impl in ("auto", "chunked", "eager")},
    **{f"cross entropy, {options}": cross_entropy(**options) for options in OPTIONS},
    "cross entropy, in place": lambda: (
        rdrop_cross_entropy(meta(8, 11) * 1, classes(4), alpha=1.0, inplace=True).loss
    ),
    "cross entropy, probabilities": lambda: (
        rdrop_cross_entropy(meta(8, 11), torch.empty(4, 11, device="meta"), alpha=1.0).loss
    ),
    "cross entropy, float16": lambda: (
        rdrop_cross_entropy(meta(8, 11, dtype=torch.float16), classes(4), alpha=1.0).loss
    ),
    **{f"linear, {options}": linear(**options) for options in OPTIONS},
    "linear, chunks of items": linear(chunk_size=2),
    "linear, float16": linear(torch.float16),
    "linear, bfloat16, softcap": linear(torch.bfloat16, softcap=3.0),
    "binary": lambda: (
        regdrop.rdrop_binary_cross_entropy_with_logits(
            meta(8, 5), torch.empty(4, 5, device="meta"), alpha=1.0
        ).loss
    ),
    "binary, masked": lambda: (
        regdrop.rdrop_binary_cross_entropy_with_logits(
            meta(8, 5),
            torch.empty(4, 5, device="meta"),
            alpha=1.0,
            mask=torch.empty(4, 5, dtype=torch.bool, device="meta"),
        ).loss
    ),
    "squared error": lambda: (
        regdrop.rdrop_mse_loss(meta(8, 5), torch.empty(4, 5, device="meta"), alpha=1.0).loss
    ),
    **{f"numbers of items, {reduce}": numbers_of_items(**reduce) for reduce in ({}, UNLABELLED)},
    "squared error, numbers of items": lambda: (
        regdrop.rdrop_mse_loss(
            meta(8, 5), torch.empty(4, 5, device="meta"), alpha=1.0, num_items=9
        ).loss
    ),
    "symmetric KL": lambda: regdrop.symmetric_kl(
        meta(8, 5), mask=torch.empty(4, dtype=torch.bool, device="meta")
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_no_loss_waits_for_its_device(loss):
    with Waits() as waits:
        found = loss()
        found.sum().backward()
    assert found.device.type == "meta"
    assert waits.found == []


def ctc():
    lengths = torch.tensor([9, 7]), torch.tensor([3, 2])
    options = dict(zip(("logit_lengths", "target_lengths"), lengths, strict=True))
    logits = torch.randn(4, 9, 6, requires_grad=True)
    return ctc_terms(logits, torch.tensor([[1, 2, 3], [4, 5, 0]]), num_passes=2, **options)


def adaptive():
    softmax = nn.AdaptiveLogSoftmaxWithLoss(5, 9, [2, 4])
    hidden = torch.randn(6, 5, requires_grad=True)
    return adaptive_softmax_terms(hidden, torch.tensor([8, 0, 3]), softmax, num_passes=2)


@pytest.mark.parametrize(
    ("terms", "waiting"), [(ctc, {"aten::index"}), (adaptive, {"aten::nonzero"})]
)
def test_losses_that_wait_are_those_that_the_docs_name(terms, waiting, monkeypatch):
    """On a CPU, which has their operations, but without the checks that only a CPU has."""
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    (said,) = (line for line in page.split("\n- ") if line.startswith("No loss waits for the GPU"))
    assert f"`{terms.__name__}_" in said
    for module in (checks, chunked, ctc_file):
        monkeypatch.setattr(module, "can_read", lambda device: False)
    with Waits() as waits:
        found = terms()
        (found.nll + found.kl).sum().backward()
    assert set(waits.found) == waiting


def test_weights_of_classes_are_copied_to_their_device_once():
    class_weight_on(torch.device("meta"), (1.0, 2.5))
    with Waits() as waits:
        weight = class_weight_on(torch.device("meta"), (1.0, 2.5))
    assert weight.device.type == "meta"
    assert waits.found == []
    with Waits() as waits:
        class_weight_on(torch.device("meta"), (1.0, 3.5))
    assert waits.found == ["torch.tensor"]


def test_weights_of_classes_serve_every_mode():
    """What an evaluation has made serves training, and what is traced stays where it is."""
    weight, cpu = [1.0, 1 / 3], torch.device("cpu")
    with torch.inference_mode():
        first = class_weight_on(cpu, weight)
    assert not first.is_inference()
    with FakeTensorMode():
        assert isinstance(class_weight_on(cpu, (7.0, 8.0)), FakeTensor)
    assert type(class_weight_on(cpu, (7.0, 8.0))) is torch.Tensor
    assert class_weight_on(cpu, weight) is first


@pytest.mark.parametrize("class_weight", [None, tuple(range(11))])
@pytest.mark.parametrize("passes", ["stacked", "sequential"])
def test_no_step_waits_for_its_device(passes, class_weight):
    """Nor do those whose divergence is looked at, the first two and every hundredth."""
    model = nn.Sequential(nn.Linear(6, 11), nn.Dropout(0.5)).to("meta")
    config = regdrop.RDropConfig(alpha=1.0, passes=passes, class_weight=class_weight)
    batch = torch.empty(4, 6, device="meta")
    regdrop.rdrop_step(model, batch, classes(4), config=config, step=0)
    with Waits() as waits:
        for step in range(3):
            loss = regdrop.rdrop_step(model, batch, classes(4), config=config, step=step).loss
            loss.backward()
    assert loss.device.type == "meta"
    assert waits.found == []


class Arriving:
    """What CUDA gives for numbers that are on their way: an event that happens some time."""

    has_happened = False

    def record_event(self):
        return self

    def query(self):
        return self.has_happened


class OnCuda:
    """A number that says it is on a GPU."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, value):
        self.value = torch.tensor(value)


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_divergence_on_a_gpu_is_read_once_it_has_arrived(kl, monkeypatch):
    arrival = Arriving()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: arrival)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "stack", lambda parts: torch.cat([x.value[None] for x in parts]))
    output = regdrop.RDropOutput(OnCuda(2.0), OnCuda(2.0), OnCuda(kl))
    model = nn.Linear(2, 2)  # no dropout
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch_divergence(model, output)
        watch_divergence(model, output)
    arrival.has_happened = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch_divergence(model, output)
        watch_divergence(model, output)
    assert len(caught) == (kl == 0)


def test_what_waits_is_found():
    numbers = torch.arange(3.0)
    with Waits() as waits:
        numbers[numbers > 1].sum().item()
        numbers.masked_select(numbers > 1)
        numbers[torch.tensor([0, 1])].sum()
    assert set(waits.found) == {"aten::index", "aten::_local_scalar_dense", "aten::masked_select"}


@pytest.mark.parametrize("by_classes", [True, False])
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_ignored_items_that_are_not_dropped_count_for_nothing(by_classes, options, monkeypatch):
    """As on other devices: the same loss and gradients as with the items dropped."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(4, 11, (4, 3), generator=generator)
    target[0, 1] = target[2] = options.get("ignore_index", -100)
    if "unlabelled_index" in options:
        target[1, 0] = -1

    def run():
        found = linear_rdrop_cross_entropy(hidden, weight, target, alpha=1.5, **options)
        upstream = torch.linspace(-1, 2, found.loss.numel(), dtype=torch.float64)
        return *found, *torch.autograd.grad(
            found.loss, (hidden, weight), upstream.view(found.loss.shape)
        )

    expected = run()
    # A device's capability, which no argument sets.
    monkeypatch.setattr(linear_items, "drops_rows", lambda device: False)
    monkeypatch.setattr(fused_linear, "_goes_by_classes", lambda *arguments: by_classes)
    for x, y in zip(run(), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("backward_passes", [None, 1])
def test_no_step_of_the_trainer_waits_for_its_device(fused, backward_passes, tmp_path):
    """But for the first batches, which are looked at: here they were on a CPU."""
    transformers = pytest.importorskip("transformers")
    from training import train

    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=90, n_positions=16)
    config._attn_implementation = "eager"
    words = torch.randint(3, 90, (4, 7))
    labels = torch.cat([words[:, :5], torch.full((4, 2), -100)], 1)
    rows = [{"input_ids": x, "labels": y} for x, y in zip(words, labels, strict=True)]
    rdrop = regdrop.RDropConfig(
        alpha=1.0, fused_linear=fused, backward_passes=backward_passes, monitor_steps=None
    )
    trainer = train(tmp_path, transformers.GPT2LMHeadModel(config), rows, rdrop)
    trainer._num_weight = torch.empty((), device="meta")
    model = trainer.model.to("meta").train()
    # Without a mask of its own the model itself looks for packed sequences.
    mask = torch.ones(4, 7, dtype=torch.long, device="meta")
    inputs = {"input_ids": words.to("meta"), "attention_mask": mask, "labels": labels.to("meta")}
    count = torch.empty((), dtype=torch.long, device="meta")
    with Waits() as waits:
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=count)
        loss.backward()
    assert loss.device.type == "meta"
    assert waits.found == []
