"""Print the lower bounds of the package and of some of its extras as exact requirements.

python .github/lower_bounds.py EXTRA...

An extra that takes another one in, as `regdrop[transformers]`, has its bounds too.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lower_bounds(project: str, *extras: str) -> list[str]:
    """Return each requirement `name>=version` of a pyproject.toml as `name==version`."""
    content = tomllib.loads(project)["project"]
    own = re.escape(content["name"])

    def requirements(extra: str) -> Iterator[str]:
        for requirement in content["optional-dependencies"][extra]:
            if taken_in := re.fullmatch(rf"{own}\[([\w,-]+)\]", requirement):
                for other in taken_in[1].split(","):
                    yield from requirements(other)
            else:
                yield requirement

    named = [*content["dependencies"], *(each for extra in extras for each in requirements(extra))]
    found = (re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement) for requirement in named)
    return list(dict.fromkeys(f"{match[1]}=={match[2]}" for match in found if match))


if __name__ == "__main__":
    print("\n".join(lower_bounds(PROJECT.read_text("utf-8"), *sys.argv[1:])))
