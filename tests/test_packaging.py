"""Wheel and sdist, each in an environment that holds torch and nothing else of ours."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SITE = Path(torch.__file__).parent.parent
# What torch needs itself, by name: nothing else of this environment is visible.
TORCH = ["torch", "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"]
TORCH += ["fsspec", "filelock", "typing_extensions.py", "setuptools", "_distutils_hack"]
TORCH += [path.name for pattern in ("torch-*.dist-info", "nvidia*") for path in SITE.glob(pattern)]
# And what builds an sdist without a network.
BUILDER = ["hatchling", "pathspec", "pluggy", "packaging", "trove_classifiers"]
pytestmark = pytest.mark.slow
LONG = pytest.mark.long  # make release-check and make test-all run it


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "build", "--no-isolation", "-o", folder, ROOT)
    assert built.returncode == 0, built.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def show(target, names):
    for name in names:
        if (SITE / name).exists() and not (target / name).exists():
            (target / name).symlink_to(SITE / name)


@pytest.fixture(scope="module", params=["wheel", pytest.param("sdist", marks=LONG)])
def environment(request, distributions, tmp_path_factory):
    """Return a folder with an environment in which a distribution is installed."""
    folder = tmp_path_factory.mktemp(request.param)
    assert run(sys.executable, "-m", "venv", folder / "clean").returncode == 0
    python = folder / "clean" / "bin" / "python"
    (target,) = (folder / "clean" / "lib").glob("python*/site-packages")
    options = ["--no-deps", "--no-index"]
    if request.param == "sdist":
        options.append("--no-build-isolation")
        show(target, BUILDER)
    installed = run(python, "-m", "pip", "install", *options, distributions[request.param])
    assert installed.returncode == 0, installed.stderr
    for name in BUILDER:
        if (target / name).is_symlink():
            (target / name).unlink()
    show(target, TORCH)
    return folder


def blocks():
    """Return the Python blocks of the README, as its reader runs them."""
    text = (ROOT / "README.md").read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


SETTING = """
import torch
from torch import nn
from torch.nn import functional as F
x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
"""
TRAINER = """
from models import image_rows, tiny_vit
from transformers import TrainingArguments
model, dataset = tiny_vit(), image_rows()
args = TrainingArguments("out", use_cpu=True, max_steps=1, report_to=[])
"""


def test_wheel_holds_the_package_its_licence_and_type_marker(distributions):
    names = zipfile.ZipFile(distributions["wheel"]).namelist()
    assert "regdrop/py.typed" in names
    assert "regdrop/kernels/chunked.py" in names
    sources = ("rows.cpp", "row_parts.h", "narrow_rows.h")
    assert {f"regdrop/kernels/{source}" for source in sources} <= set(names)
    texts = {f"regdrop/tasks/texts/alice/{split}.txt" for split in ("train", "validation", "test")}
    assert {*texts, "regdrop/tasks/texts/README.md"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests") for name in names)


def test_sdist_holds_the_package_and_its_tests(distributions):
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"src/regdrop/kernels/rows.cpp", "tests/reference.py", "CHANGELOG.md"} <= names
    assert not any(name.startswith("results") for name in names)


def test_it_works_with_torch_alone_and_runs_the_readme(environment, tmp_path):
    alone = [block for block in blocks() if "transformers" not in block]
    assert len(alone) >= 2
    code = "".join([SETTING, *alone, "import regdrop, sys\n"])
    code += "assert not {'transformers', 'numpy', 'typer'} & set(sys.modules)\n"
    code += "print(regdrop.__file__, loss.isfinite().item())"
    result = run(environment / "clean/bin/python", "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert str(environment / "clean") in result.stdout
    assert result.stdout.strip().endswith("True")


def test_the_command_says_what_it_needs(environment, tmp_path):
    command = run(environment / "clean/bin/regdrop", "tasks", cwd=tmp_path)
    assert command.returncode == 1
    assert "pip install 'regdrop[tasks]'" in command.stderr


@LONG
def test_the_readme_trains_with_transformers(environment, tmp_path):
    code = f"import sys\nsys.path += [{str(SITE)!r}, {str(ROOT / 'tests')!r}]\n"
    code += "".join([SETTING, TRAINER, *(b for b in blocks() if "transformers" in b)])
    code += "trainer.train()\nimport regdrop\nprint(regdrop.__file__)"
    result = run(environment / "clean/bin/python", "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert str(environment / "clean") in result.stdout
