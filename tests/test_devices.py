"""No tensor is left behind on the CPU: losses and steps on another device, emulated here.

The fused last layer asks for the device's autocast, which the emulated one has not.
"""

import pytest
import torch
from torch import nn

from accelerator import AwayTensor, accelerator
from regdrop import (
    RDropConfig,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_mse_loss,
    rdrop_step,
    repeat_batch,
    symmetric_kl,
)
from regdrop.diagnostics import measure_disagreement

N, V = 6, 5


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 4, -100, 2, 1, -1])
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])


def cross_entropy(impl, **options):
    def compute(to):
        own = {key: to(x) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
        return rdrop_cross_entropy(
            to(normal(2 * N, V)).requires_grad_(),
            to(LABELS),
            alpha=2.0,
            impl=impl,
            unlabelled_index=-1,
            **own,
        )

    return compute


def soft_targets(to):
    return rdrop_cross_entropy(to(normal(2 * N, V)), to(normal(N, V).softmax(-1)), alpha=2.0)


def binary(to):
    return rdrop_binary_cross_entropy_with_logits(
        to(normal(2 * N, V)),
        to((normal(N, V) > 0).float()),
        alpha=2.0,
        pos_weight=to(WEIGHT),
        mask=to(normal(N, V) < 0.5),
    )


def squares(to):
    return rdrop_mse_loss(to(normal(2 * N, V)), to(normal(N, V)), alpha=2.0)


LOSSES = {
    "eager": cross_entropy("eager", weight=WEIGHT, label_smoothing=0.1),
    "chunked": cross_entropy("chunked", weight=WEIGHT, label_smoothing=0.1),
    "auto": cross_entropy("auto", num_items=torch.tensor(7.0)),
    "soft targets": soft_targets,
    "binary": binary,
    "squares": squares,
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    expected = LOSSES[name](lambda x: x.clone())
    with accelerator() as device:
        output = LOSSES[name](lambda x: x.to(device))
        assert all(isinstance(x, AwayTensor) for x in output)
        if output.loss.requires_grad:
            output.loss.backward()
        for own, other in zip(output, expected, strict=True):
            torch.testing.assert_close(own.detach().cpu(), other.detach())


def test_a_label_that_stayed_behind_is_an_error():
    with (
        accelerator() as device,
        pytest.raises((RuntimeError, ValueError), match="device"),
    ):
        rdrop_cross_entropy(normal(2 * N, V).to(device), LABELS, alpha=2.0, unlabelled_index=-1)


def test_symmetric_kl():
    with accelerator() as device:
        kl = symmetric_kl(normal(2 * N, V).to(device))
        torch.testing.assert_close(kl.cpu(), symmetric_kl(normal(2 * N, V)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fraction": 0.5},
        {"backward_passes": 1},
        {"passes": "sequential"},
        {"class_weight": tuple(WEIGHT.tolist())},
        {"alpha": 0.0, "num_passes": 1, "monitor_steps": 1},
    ],
)
def test_steps(options):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, V))
    with accelerator() as device:
        model = model.to(device)
        output = rdrop_step(
            model,
            normal(N, 4).to(device),
            LABELS.clamp(min=0).to(device),
            config=RDropConfig(**options),
            step=0,
        )
        output.loss.backward()
        assert output.kl.item() > 0
        assert all(isinstance(p.grad, AwayTensor) for p in model.parameters())


def test_repeated_batches_stay_where_they_are():
    with accelerator() as device:
        batch = repeat_batch({"x": normal(N, 4).to(device), "ids": list(range(N))})
        assert isinstance(batch["x"], AwayTensor)
        assert batch["x"].shape == (2 * N, 4)


def test_disagreement():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, V))
    with accelerator() as device:
        batch = (normal(N, 4).to(device), LABELS.clamp(min=0).to(device))
        measured = measure_disagreement(model.to(device), [batch], num_masks=4)
    assert measured.epkl > 0
