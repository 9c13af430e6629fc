"""CONTRIBUTING's map and lists name what there is."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "regdrop"
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
MAP = re.search(r"^## The map\n.*?^```\n(.*?)^```", TEXT, re.S | re.M).group(1)
# The package's own, and two old names.
UNNAMED = {"__init__.py", "__main__.py", "conventions.py", "suggestion.py"}
# Neither files nor folders of the repository.
NO_PATHS = {".venv/apart"}


def test_the_map_names_every_floor_and_every_room():
    named = set(re.findall(r"([a-z_]+)/", MAP))
    folders = {p.parent.relative_to(PACKAGE).parts for p in PACKAGE.rglob("*.py")} - {()}
    assert named == {parts[-1] for parts in folders}
    files = set(re.findall(r"[a-z_]+\.py", MAP))
    assert all(any(PACKAGE.rglob(name)) for name in files)
    assert {path.name for path in PACKAGE.glob("*.py")} - files == UNNAMED


def test_every_path_that_is_named_exists():
    paths = [x for x in re.findall(r"`([\w./*-]+)`", TEXT) if "/" in x or x.endswith(".py")]
    assert len(set(paths)) > 40
    for path in set(paths) - NO_PATHS:
        # NAME stands for any.
        pattern = path.rstrip("/").replace("NAME", "*")
        assert any(list(base.glob(pattern)) for base in (ROOT, PACKAGE)), path


def test_it_is_one_screen():
    assert len(TEXT.splitlines()) < 80
