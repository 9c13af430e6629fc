"""The table of `docs/testing.md` counts what the records of faults made on purpose hold."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORDS = ("mutants.json", "mutants_seed_1.json")
PARTS = {
    "kernels": ("kernels/",),
    "loss": ("loss/",),
    "step.py": ("step.py",),
    "heads.py": ("heads.py",),
    "experiments: statistics, bootstrap, run": ("experiments/",),
    "integrations: heads of transformers": ("integrations/transformers/heads",),
    "integrations: Trainer of transformers": ("integrations/transformers/trainer.py",),
    "all": ("",),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_page_counts_what_the_records_hold(part):
    cells = [part]
    for name in RECORDS:
        faults = json.loads((ROOT / "results" / name).read_text())
        caught = [x["caught_by"] for x in faults if x["module"].startswith(PARTS[part])]
        cells += [str(len(caught)), str(len(caught) - caught.count(None))] if caught else ["", ""]
    lines = (ROOT / "docs" / "testing.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells in rows
