"""Print the lower bounds of the package and of some of its extras as exact requirements.

python .github/lower_bounds.py EXTRA...
"""

import re
import sys
from pathlib import Path

import tomllib

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lower_bounds(project: str, *extras: str) -> list[str]:
    """Return each requirement `name>=version` of a pyproject.toml as `name==version`."""
    content = tomllib.loads(project)["project"]
    requirements = list(content["dependencies"])
    for extra in extras:
        requirements += content["optional-dependencies"][extra]
    found = (re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement) for requirement in requirements)
    return [f"{match[1]}=={match[2]}" for match in found if match]


if __name__ == "__main__":
    print("\n".join(lower_bounds(PROJECT.read_text("utf-8"), *sys.argv[1:])))
