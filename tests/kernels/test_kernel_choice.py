"""Which kernel "auto" takes on a GPU that is not there: chosen by what it can do."""

import pytest
import torch

from regdrop.kernels import selection


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
