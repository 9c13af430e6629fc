"""Why a kernel cannot run here: what `regdrop doctor --environment` says."""

import pytest
import torch

from regdrop.kernels import cpp_rows, selection


@pytest.mark.parametrize(
    ("capability", "dtype", "obstacle"),
    [
        ((7, 0), torch.float32, "compute capability 7.5, and this GPU has 7.0"),
        ((7, 5), torch.bfloat16, "compute capability 8.0, and this GPU has 7.5"),
        ((7, 5), torch.float32, None),
    ],
)
def test_the_reason_names_what_the_gpu_lacks(monkeypatch, capability, dtype, obstacle):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(selection, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "cc")
    found = selection.obstacle_to_triton(torch.device("cuda", 0), dtype)
    assert (found is None) if obstacle is None else found.endswith(obstacle)


def test_the_reason_names_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(selection, "find_spec", lambda name: None)
    found = selection.obstacle_to_triton(torch.device("cuda", 0), torch.float32)
    assert found == "the package triton is not installed"


def test_a_cpu_has_no_triton():
    found = selection.obstacle_to_triton(torch.device("cpu"), torch.float32)
    assert found == "Triton runs on a GPU alone"


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert cpp_rows.missing_tools()[0] == "C++ compiler (no-such-compiler -O2, or $CXX)"
    monkeypatch.setenv("CXX", "")
    assert cpp_rows.missing_tools()[0] == "C++ compiler ($CXX, which is empty)"
