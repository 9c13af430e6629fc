"""Hold a release's version, changelog, citation and tag against each other.

python .github/check_release.py [TAG]
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def faults(root: Path, tag: str | None = None) -> list[str]:
    """Return what stands in the way of a release, in sentences.

    Args:
        root: The repository.
        tag: Tag of the release, v0.2.0; None before it is set.
    """
    version = _found(root / "src/regdrop/__init__.py", r'^__version__ = "([^"]+)"$')
    citation = _found(root / "CITATION.cff", r"^version: (\S+)$")
    changelog = (root / "CHANGELOG.md").read_text("utf-8")
    sections = re.split(r"^## ", changelog, flags=re.M)[1:]
    section = next((text for text in sections if text.startswith(f"{version} ")), None)
    found = []
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        found.append(f"__version__ must be like 0.2.0 or 0.2.0rc1, got {version}")
    if citation != version:
        found.append(f"CITATION.cff has version {citation}, __version__ is {version}")
    if section is None:
        found.append(f"CHANGELOG.md has no section '## {version} - DATE'")
    elif not re.match(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d\n", section):
        found.append(f"the changelog's section must begin '## {version} - YYYY-MM-DD'")
    elif "\n- " not in section:
        found.append(f"the changelog's section of {version} lists nothing")
    if tag is not None and tag != f"v{version}":
        found.append(f"the tag is {tag}, and __version__ wants v{version}")
    unreleased = next((text for text in sections if text.startswith("Unreleased")), "")
    if tag is not None and "\n- " in unreleased:
        found.append("the changelog still lists changes under Unreleased")
    return found


def _found(path: Path, pattern: str) -> str:
    match = re.search(pattern, path.read_text("utf-8"), re.M)
    if match is None:
        raise SystemExit(f"{path} must have a line like {pattern}")
    return match[1]


if __name__ == "__main__":
    problems = faults(ROOT, *sys.argv[1:2])
    for problem in problems:
        print(problem)
    sys.exit(bool(problems))
