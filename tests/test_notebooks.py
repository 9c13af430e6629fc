"""The notebooks run from top to bottom, and hold their pictures."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def outputs_of(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures_of(notebook):
    return [o for o in outputs_of(notebook) if "image/png" in o.get("data", {})]


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["plain_pytorch", "transformers_trainer"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_holds_its_picture_and_no_error(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(pictures_of(notebook)) == 1
    assert not [o for o in outputs_of(notebook) if o.output_type == "error"]
    assert all(c.outputs or c.execution_count for c in notebook.cells if c.cell_type == "code")
    assert path.stat().st_size < 100_000


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_learns(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert len(pictures_of(notebook)) == 1
    printed = "".join(o.get("text", "") for o in outputs_of(notebook)).strip().splitlines()
    found = [float(line.rsplit("accuracy ", 1)[1]) for line in printed if "accuracy " in line]
    assert len(found) == 2
    assert min(found) > 0.85
