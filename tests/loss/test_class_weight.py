"""Class weights that options hold, as tensors on a device."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from regdrop import RDropConfig, rdrop_cross_entropy, rdrop_step
from regdrop.loss.class_weight import class_weight_on

WEIGHT = (0.1, 0.7, 1.3)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def default(request):
    """Another default dtype, as in code that builds a model in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_no_default_dtype_rounds_them(default, device):
    assert class_weight_on(device, WEIGHT).tolist() == list(WEIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_a_loss_is_that_of_exact_weights(default, dtype, impl):
    logits, target = torch.randn(6, 3, dtype=dtype), torch.tensor([2, 0, 1])
    config = RDropConfig(class_weight=WEIGHT, alpha=1.3, impl=impl)
    found = rdrop_step(lambda x: logits, torch.zeros(3, 1), target, config=config, step=0)
    options = {"alpha": 1.3, "weight": torch.tensor(WEIGHT, dtype=torch.float64)}
    expected = rdrop_cross_entropy(logits.double(), target, **options)
    assert found.loss.dtype == dtype
    torch.testing.assert_close(
        found.loss.double(), expected.loss, rtol=8 * torch.finfo(dtype).eps, atol=0
    )


def test_fraternal_dropout_takes_them():
    logits, target = torch.randn(6, 3), torch.tensor([2, 0, 1])
    config = RDropConfig(class_weight=WEIGHT, method="fraternal")
    found = rdrop_step(lambda x: logits, torch.zeros(3, 1), target, config=config, step=0)
    assert found.loss.dtype == torch.float32


def test_what_is_traced_is_not_kept():
    device = torch.device("cpu")
    with FakeTensorMode():
        class_weight_on(device, (0.25, 0.5))
    assert class_weight_on(device, (0.25, 0.5)).tolist() == [0.25, 0.5]
    assert class_weight_on(device, (0.25, 0.5)) is class_weight_on(device, (0.25, 0.5))
