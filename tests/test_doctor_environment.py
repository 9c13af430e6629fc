"""`regdrop doctor --environment`: what a report of a fault should hold."""

import sys

import pytest
import torch
from typer.testing import CliRunner

from regdrop import __version__
from regdrop.commands import app, environment

SCRIPT = "from torch import nn\n\n\ndef build():\n    return nn.Dropout(0.25)\n"


def test_versions_device_and_the_kernel_with_its_reason():
    result = CliRunner().invoke(app, ["doctor", "--environment"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    versions = lines[0].removeprefix("versions: ").split(", ")
    assert f"regdrop {__version__}" in versions
    assert f"torch {torch.__version__}" in versions
    assert f"python {sys.version.split()[0]}" in versions
    assert any(version.startswith("transformers ") for version in versions)
    (kernel,) = [line for line in lines if line.startswith('impl="auto" for logits on cpu')]
    assert kernel.endswith('"chunked": Triton runs on a GPU alone')
    assert lines[-1].startswith('impl="cpp", on request')


def test_dtypes_of_one_gpu_with_different_kernels(monkeypatch):
    def obstacle(device, dtype):
        return "no bfloat16" if dtype == torch.bfloat16 else None

    monkeypatch.setattr(environment, "obstacle_to_triton", obstacle)
    assert environment._kernel_lines(torch.device("cuda", 1)) == [
        'impl="auto" for logits on cuda:1 (float32, float16): "triton"',
        'impl="auto" for logits on cuda:1 (bfloat16): "chunked": no bfloat16',
    ]


def test_a_model_may_stand_beside_it_and_one_of_both_must(tmp_path, monkeypatch):
    (tmp_path / "environment_script.py").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    both = CliRunner().invoke(app, ["doctor", "environment_script:build", "--environment"])
    assert both.exit_code == 0, both.output
    assert both.output.startswith("versions: ")
    assert "sources of dropout" in both.output
    neither = CliRunner().invoke(app, ["doctor"])
    assert neither.exit_code == 2
    assert "--environment" in neither.output


@pytest.mark.parametrize("missing", [[], ["C++ compiler (c++, or $CXX)", "ninja"]])
def test_what_the_compiled_kernel_lacks(monkeypatch, missing):
    monkeypatch.setattr(environment, "missing_tools", lambda: missing)
    line = environment._cpp_line()
    if missing:
        assert line.endswith("finds no C++ compiler (c++, or $CXX) and no ninja")
    else:
        assert line.endswith("can be built on first use")
