"""The wheel in an environment that holds torch and nothing else of ours."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, ROOT]
    built = run(*command)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_package_its_licence_and_type_marker(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "regdrop/py.typed" in names
    assert "regdrop/kernels/chunked.py" in names
    assert "regdrop/kernels/rows.cpp" in names
    texts = {f"regdrop/tasks/texts/alice/{split}.txt" for split in ("train", "validation", "test")}
    assert {*texts, "regdrop/tasks/texts/README.md"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests") for name in names)


@pytest.mark.slow
def test_wheel_works_with_torch_alone(wheel, tmp_path):
    assert run(sys.executable, "-m", "venv", tmp_path / "clean").returncode == 0
    python = tmp_path / "clean" / "bin" / "python"
    installed = run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    assert installed.returncode == 0, installed.stderr
    # torch and what it needs itself, by name: nothing else of this environment is visible.
    site = Path(torch.__file__).parent.parent
    (target,) = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    needed = ["torch", "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2"]
    needed += ["markupsafe", "fsspec", "filelock", "typing_extensions.py", "setuptools"]
    needed += ["_distutils_hack", *(path.name for path in site.glob("torch-*.dist-info"))]
    needed += [path.name for path in site.glob("nvidia*")]
    for name in needed:
        if (site / name).exists() and not (target / name).exists():
            (target / name).symlink_to(site / name)
    code = (
        "import torch, regdrop\n"
        "logits = torch.randn(4, 3, requires_grad=True)\n"
        "out = regdrop.rdrop_cross_entropy(logits, torch.tensor([0, 2]), alpha=1.0)\n"
        "out.loss.backward()\n"
        "print(regdrop.__file__, logits.grad.isfinite().all().item())"
    )
    result = run(python, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert str(target) in result.stdout
    assert result.stdout.strip().endswith("True")
    command = run(tmp_path / "clean" / "bin" / "regdrop", "tasks", cwd=tmp_path)
    assert command.returncode == 1
    assert "pip install 'regdrop[tasks]'" in command.stderr
