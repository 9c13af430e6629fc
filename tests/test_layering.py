"""Who imports whom: a file imports only from lower floors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import regdrop

PACKAGE = Path(regdrop.__file__).parent

FLOORS = [
    {"arguments", "out_of_memory", "tracing", "whole_files"},
    {"kernels", "passes", "alpha_conventions", "alpha_options"},
    {"loss", "config", "disagreement"},
    {"schedule", "alpha"},
    {"cost", "divergence_watch"},
    {"diagnostics", "extra_pass", "step_passes", "step_terms"},
    {"heads", "meter", "prefix_search", "step"},
    {"reading"},
    {"conventions", "suggestion"},  # old names
    {"integrations"},
    {"tasks"},
    {"experiments"},
    {"commands"},
    {"cli", "__init__"},
    {"__main__"},
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
# The public names are gathered from the lower floors alone.
PUBLIC = {"alpha", "config", "loss", "passes", "step"}
CORE_FLOORS = 9
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # The version is the package's own, and needs nothing.
            if [alias.name for alias in node.names] != ["__version__"]:
                yield node.module


def module_level_imports(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lower_floors(path):
    own = part(path)
    for name in imports(path):
        if name == "regdrop" or not name.startswith("regdrop."):
            assert name != "regdrop", f"{path} imports the package's own front"
            continue
        other = name.split(".")[1]
        if own == "__init__":
            assert other in PUBLIC
        else:
            assert other == own or LEVEL[other] < LEVEL[own], f"{path} imports {name}"


# TRL's trainers are the Hugging Face Trainer's subclasses, and so are ours.
BUILT_ON = {"trl": {"transformers"}}


def test_integrations_do_not_import_each_other():
    for path in (PACKAGE / "integrations").rglob("*.py"):
        framework = path.relative_to(PACKAGE / "integrations").parts[0].removesuffix(".py")
        for name in imports(path):
            if name.startswith("regdrop.integrations."):
                assert name.split(".")[2] in {framework, *BUILT_ON.get(framework, ())}


def test_the_core_knows_torch_alone():
    core = {"torch", "regdrop", *sys.stdlib_module_names}
    for path in FILES:
        if part(path) == "__init__" or LEVEL[part(path)] < CORE_FLOORS:
            # One file each for a library that is imported when it is asked for.
            allowed = core | ({"triton"} if path.name.startswith("triton_") else set())
            foreign = {name.split(".")[0] for name in imports(path)} - allowed
            assert not foreign, f"{path} imports {foreign}"


def test_command_line_entry_needs_nothing_to_be_imported():
    assert set(module_level_imports(PACKAGE / "cli.py")) == {"sys"}


def test_import_loads_no_optional_library():
    heavy = (
        "transformers accelerate datasets sklearn scipy matplotlib rich typer kornia peft triton "
        "lightning timm trl sentence_transformers"
    )
    code = f"import sys, regdrop; print([n for n in {heavy.split()!r} if n in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_public_names_are_sorted_and_exist():
    assert regdrop.__all__ == sorted(regdrop.__all__)
    for name in regdrop.__all__:
        assert hasattr(regdrop, name)
