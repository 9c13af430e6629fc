"""Version, changelog, citation and tag of a release say the same."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / ".github"))

from check_release import ROOT, faults

CHANGELOG = "# Changelog\n\n## Unreleased\n\n## 1.2.0 - 2026-11-26\n\n### Added\n- A thing.\n"


@pytest.fixture
def release(tmp_path):
    (tmp_path / "src/regdrop").mkdir(parents=True)
    (tmp_path / "src/regdrop/__init__.py").write_text('__version__ = "1.2.0"\n', "utf-8")
    (tmp_path / "CITATION.cff").write_text("title: x\nversion: 1.2.0\n", "utf-8")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG, "utf-8")
    return tmp_path


def test_this_repository_says_one_version():
    assert faults(ROOT) == []


def test_a_right_release_has_no_faults(release):
    assert faults(release) == []
    assert faults(release, "v1.2.0") == []


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("CITATION.cff", "1.2.0", "1.1.0", "CITATION.cff has version 1.1.0"),
        ("CHANGELOG.md", "## 1.2.0 - ", "## 1.1.0 - ", "no section '## 1.2.0 - DATE'"),
        ("CHANGELOG.md", "2026-11-26", "soon", "must begin '## 1.2.0 - YYYY-MM-DD'"),
        ("CHANGELOG.md", "- A thing.\n", "", "lists nothing"),
        ("src/regdrop/__init__.py", "1.2.0", "1.2", "must be like 0.2.0"),
    ],
)
def test_each_fault_is_named(release, name, old, new, says):
    path = release / name
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
    assert any(says in fault for fault in faults(release)), faults(release)


def test_the_tag_and_what_is_unreleased(release):
    assert faults(release, "v1.3.0") == ["the tag is v1.3.0, and __version__ wants v1.2.0"]
    changelog = CHANGELOG.replace("## Unreleased\n", "## Unreleased\n\n- More.\n")
    (release / "CHANGELOG.md").write_text(changelog, "utf-8")
    assert faults(release) == []
    assert faults(release, "v1.2.0") == ["the changelog still lists changes under Unreleased"]


def test_lower_bounds_are_read_as_exact_requirements():
    pytest.importorskip("tomllib")  # from Python 3.11 on
    from lower_bounds import PROJECT, lower_bounds

    project = """
[project]
name = "own"
dependencies = ["torch>=2.5"]
[project.optional-dependencies]
one = ["a[b]", "c-d>=1.0"] # a remark
two = ["e>=2"]
three = ["own[one,two]", "e>=2", "f>=3"]
"""
    assert lower_bounds(project, "one") == ["torch==2.5", "c-d==1.0"]
    assert lower_bounds(project, "three") == ["torch==2.5", "c-d==1.0", "e==2", "f==3"]
    assert lower_bounds(project) == ["torch==2.5"]
    assert "torch==2.5" in lower_bounds(PROJECT.read_text("utf-8"), "transformers")


WORKFLOWS = sorted((ROOT / ".github").rglob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_read_and_name_what_exists(path):
    import yaml

    content = yaml.safe_load(path.read_text("utf-8"))
    if path.parent.name == "ISSUE_TEMPLATE" and path.name != "config.yml":
        fields = {part["id"] for part in content["body"] if "id" in part}
        assert "environment" in fields
        assert "regdrop doctor --environment" in path.read_text("utf-8")
    for job in content.get("jobs", {}).values():
        commands = " ".join(step.get("run", "") for step in job["steps"])
        makefile = (ROOT / "Makefile").read_text("utf-8")
        for target in re.findall(r"\bmake ([a-z-]+)", commands):
            assert f"\n{target}:" in makefile
        for file in re.findall(r"(?:\.github|tests)/[\w./]*\w", commands):
            assert (ROOT / file).exists(), file
