"""Who imports whom inside a floor: rooms, and no circle between files."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import regdrop

PACKAGE = Path(regdrop.__file__).parent
# The rooms of each floor, ground first. Rooms of one line do not import each other; a name is that
# of a folder or of a file beside the folders. "front" is the floor's own `__init__.py`.
ROOMS = {
    "tasks": [
        {"notices"},
        {"data_sets"},
        {"common"},
        {"translation", "images", "language_modelling", "summarisation", "understanding"},
        {"front", "adaptive_input"},
        {"configure", "generate_lines"},
    ],
    "experiments": [
        {"arms", "bootstrap", "statistics"},
        {"recording"},
        {"running"},
        {"studies"},
        {"reporting"},
        {"evaluating", "front"},
    ],
    "commands": [
        {"app", "environment", "live_display", "loading", "streams", "tables"},
        {"notes", "options"},
        {"comparisons", "measure", "models", "runs", "tasks"},
        {"tuning"},
        {"front"},
    ],
    "integrations.transformers": [
        {"evaluation", "heads", "internals", "outputs", "tolerances"},
        {"disagreement", "forward"},
        {"likelihood"},
        {"run"},
        {"trainer"},
        {"front"},
    ],
}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(path):
    """Return the modules of the package that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


def folders(root):
    return {path.parent.relative_to(root) for path in root.rglob("*.py")}


def test_tests_stand_in_the_folders_of_what_they_test():
    tests = Path(__file__).parent
    # Libraries that load apart, or have their own tests beside one integration's.
    further = {"accelerate", "peft", "apart_deepspeed", "apart_timm"}
    further = {Path("integrations", name) for name in further} | {Path("reliability")}
    integrations = {Path("integrations", path.stem) for path in PACKAGE.glob("integrations/*.py")}
    assert folders(tests) - further <= folders(PACKAGE) | integrations
    # The command line is tested as a whole, and the book of the demo holds no code.
    assert folders(PACKAGE) - folders(tests) <= {
        Path("commands"),
        Path("tasks", "texts"),
        Path("tasks", "texts", "alice"),
    }


def folder_of(floor):
    return PACKAGE.joinpath(*floor.split("."))


def room_of(floor, module):
    parts = module.removeprefix(f"regdrop.{floor}").lstrip(".").split(".")
    return parts[0] or "front"


@pytest.mark.parametrize("floor", ROOMS)
def test_every_room_has_its_place(floor):
    names = {
        path.stem if path.suffix == ".py" else path.name
        for path in folder_of(floor).iterdir()
        if path.suffix == ".py" or any(path.glob("*.py"))
    }
    known = [name for line in ROOMS[floor] for name in line]
    assert sorted(known) == sorted({"front" if n == "__init__" else n for n in names})


@pytest.mark.parametrize("floor", ROOMS)
def test_a_room_imports_only_from_lower_rooms(floor):
    level = {name: i for i, line in enumerate(ROOMS[floor]) for name in line}
    own = {name for name in MODULES if f"{name}.".startswith(f"regdrop.{floor}.")}
    assert len(own) >= len(level)
    for module in sorted(own):
        here = room_of(floor, module)
        for other in imported_modules(MODULES[module]) & own:
            there = room_of(floor, other)
            assert here == there or level[there] < level[here], f"{module} imports {other}"


def test_no_files_import_each_other_in_a_circle():
    graph = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
    assert set(order) == set(MODULES)
