import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from regdrop.passes import preserve_buffers

NAN = float("nan")


class Holder(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        self.register_buffer("buffer", buffer)


def fake(size=3):
    with FakeTensorMode():
        return torch.zeros(size)


def nested(layout):
    parts = [torch.ones(2), torch.ones(3)]
    return torch.nested.nested_tensor(parts, layout=layout)


def quantized(value=1.0):
    return torch.quantize_per_tensor(torch.full((3,), value), 0.1, 0, torch.qint8)


KINDS = {
    "none": lambda: None,
    "nan": lambda: torch.tensor([1.0, NAN]),
    "complex nan": lambda: torch.tensor([1 + 1j, complex(NAN, 0)]),
    "float8 nan": lambda: torch.tensor([1.0, NAN]).to(torch.float8_e4m3fn),
    "whole numbers": lambda: torch.arange(3),
    "meta": lambda: torch.zeros(3, device="meta"),
    "fake": fake,
    "quantized": quantized,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "expanded": lambda: torch.tensor([NAN]).expand(3),
}
warns = pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors|quant)")


@warns
@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_that_did_not_change_is_not_written_to(kind):
    module = Holder(KINDS[kind]())
    buffer = module.buffer
    version = None if buffer is None else buffer._version
    with preserve_buffers(module):
        pass
    assert module.buffer is buffer
    assert buffer is None or buffer._version == version


@warns
@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("nan", torch.tensor([2.0, 3.0])),
        ("complex nan", torch.tensor([2j, 3j])),
        ("whole numbers", torch.tensor([3, 4, 5])),
        ("quantized", 2.0),
        ("sparse", torch.ones(3, 3).to_sparse()),
    ],
)
def test_a_buffer_that_changed_has_its_values_again(kind, other):
    module = Holder(KINDS[kind]())
    with preserve_buffers(module):
        module.buffer.copy_(quantized(other) if kind == "quantized" else other)
    found, expected = module.buffer, KINDS[kind]()
    if kind == "quantized":
        found, expected = found.dequantize(), expected.dequantize()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_nan_that_came_is_gone_and_one_that_went_is_back():
    module = Holder(torch.tensor([1.0, NAN]))
    with preserve_buffers(module):
        module.buffer.copy_(torch.tensor([NAN, 1.0]))
    assert module.buffer.isnan().tolist() == [False, True]


def test_two_micro_batches_before_one_backward():
    module, scale = Holder(torch.tensor([1.0, NAN])), torch.ones(2, requires_grad=True)
    loss = (module.buffer * scale)[0]
    with preserve_buffers(module):
        module.buffer * scale
    loss.backward()
    assert scale.grad[0] == 1


@pytest.mark.parametrize("kind", ["nan", "meta"])
def test_another_object_or_shape_is_put_back(kind):
    module = Holder(KINDS[kind]())
    buffer, shape = module.buffer, module.buffer.shape
    with preserve_buffers(module):
        module.buffer.resize_(7)
        module.buffer = torch.zeros(5)
    assert module.buffer is buffer
    assert buffer.shape == shape
    if kind == "nan":
        assert buffer[0] == 1
        assert buffer[1].isnan()


def test_a_buffer_that_came_from_none_or_became_none():
    module = Holder(None)
    module.register_buffer("other", torch.ones(2))
    with preserve_buffers(module):
        module.buffer, module.other = torch.ones(2), None
    assert module.buffer is None
    assert module.other.tolist() == [1, 1]
