"""What the pages quote of the records under results/: one place that reads them."""

import json
import re
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent.parent / "results"
_CELL = re.compile(r"(\S+) ± (\S+)(?: \((\S+) ± (\S+)\))?$")


class Figure(NamedTuple):
    """A test figure of an arm: mean over seeds, and the paired difference to the baseline."""

    mean: float
    mean_interval: float
    difference: float | None = None
    difference_interval: float | None = None


def figures(study: str) -> dict[str, dict[str, Figure]]:
    """Return the figures of the first table of a study's report, by arm and by column."""
    report = (RESULTS / study / "report.md").read_text("utf-8")
    table = next(part for part in report.split("\n\n") if part.startswith("| arm"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    header, _, *arms = rows
    return {
        row[0]: {
            name.removeprefix("test "): Figure(*map(_number, match.groups()))
            for name, cell in zip(header, row, strict=True)
            if (match := _CELL.match(cell))
        }
        for row in arms
    }


def alpha(study: str) -> float:
    """Return the alpha of R-Drop in a study, from the record of a seed."""
    record = min((RESULTS / study / "records").glob("rdrop-seed*.json"))
    return float(json.loads(record.read_text("utf-8"))["config"]["rdrop"]["alpha"])


def steps_of_a_gpu() -> list[dict[str, object]]:
    """Return what whole training steps took on an H100 in bfloat16."""
    record = json.loads((RESULTS / "gpu/2026-11-26-h100-2/record.json").read_text("utf-8"))
    rows: list[dict[str, object]] = record["sections"]["step"]["rows"]
    return [row for row in rows if row["dtype"] == "bfloat16 autocast"]


def _number(text: str | None) -> float | None:
    return None if text is None else float(text.replace("−", "-").lstrip("+"))
