"""Which kernel "auto" takes on a GPU that is not there: chosen by what it can do."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from regdrop.kernels import jitted_rows, projection, selection


@pytest.mark.parametrize(
    ("capability", "dtype", "can_run"),
    [
        ((7, 0), torch.float32, False),
        ((7, 5), torch.float32, True),
        ((7, 5), torch.float16, True),
        ((7, 5), torch.bfloat16, False),
        ((8, 0), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, True),
    ],
)
def test_triton_runs_from_turing_on_and_in_bfloat16_from_ampere_on(
    monkeypatch, capability, dtype, can_run
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(selection, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "cc")
    choose = selection._can_run_triton.__wrapped__  # what is kept is another test's
    assert choose(torch.device("cuda", 0), dtype) == can_run


@pytest.mark.parametrize(
    ("given", "found", "can_run"),
    [(None, None, False), ("my-cc", None, True), (None, "gcc", True)],
)
def test_triton_needs_a_c_compiler_that_is_given_or_found(monkeypatch, given, found, can_run):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(selection, "find_spec", lambda name: name)
    monkeypatch.setattr(selection.shutil, "which", lambda name: name if name == found else None)
    monkeypatch.delenv("CC", raising=False)
    if given is not None:
        monkeypatch.setenv("CC", given)
    device = torch.device("cuda", 0)
    assert selection._can_run_triton.__wrapped__(device, torch.float32) == can_run


@pytest.mark.parametrize("mode", [FakeTensorMode, None])
def test_what_torch_can_add_is_not_tried_where_it_traces(monkeypatch, mode):
    """Shapes alone would say that it can, whatever it can."""
    tried = []
    monkeypatch.setattr(projection, "_can_add_in_float32", lambda *given: tried.append(given))
    cpu = torch.device("cpu")
    if mode is None:
        make_fx(lambda x: x + projection.adds_in_float32(cpu, torch.bfloat16))(torch.zeros(2))
    else:
        with mode():
            assert not projection.adds_in_float32(cpu, torch.bfloat16)
    assert not tried
    projection.adds_in_float32(cpu, torch.bfloat16)
    assert tried == [(cpu, torch.bfloat16)]


def test_what_torch_can_add_is_tried_in_float32_by_any_default():
    cpu = torch.device("cpu")
    expected = projection._can_add_in_float32.__wrapped__(cpu, torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert projection._can_add_in_float32.__wrapped__(cpu, torch.bfloat16) == expected
    finally:
        torch.set_default_dtype(before)


def test_elementwise_functions_are_not_tried_where_torch_traces(monkeypatch):
    tried = []
    monkeypatch.setattr(jitted_rows, "_has_compiled", lambda device: tried.append(device) or True)
    gpu = torch.device("cuda", 0)
    with FakeTensorMode():
        assert not jitted_rows.can_compile_elementwise(gpu)
    assert not tried
    assert jitted_rows.can_compile_elementwise(gpu)
