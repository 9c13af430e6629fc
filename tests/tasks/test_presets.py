"""What every preset and every family of tasks has."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from regdrop.experiments import load_records
from regdrop.tasks import DEFAULT_PRESETS, FAMILIES, PRESETS

RESULTS = Path(__file__).parents[2] / "results"
# Where the default preset of each family was trained.
RECORDED = {
    "images": "digits",
    "understanding": "minilm-sst2-part-cost",
    "translation": "multi30k-part",
    "summarisation": "scitldr-part",
    "language-modelling": "alice",
}


# Statistics of an example, from which the metrics are computed.
WIDTHS = {
    "images": 3,
    "understanding": 3,
    "translation": 22,
    "summarisation": 5,
    "language-modelling": 2,
}


def test_every_family_has_a_default_preset_of_its_own():
    assert DEFAULT_PRESETS.keys() == FAMILIES.keys()
    for family, name in DEFAULT_PRESETS.items():
        assert PRESETS[name].family == family
        assert type(PRESETS[name]) is FAMILIES[family]


@pytest.mark.parametrize("family", DEFAULT_PRESETS)
def test_the_default_preset_is_small_and_known_to_learn(family):
    """On a processor without an accelerator it took minutes, and its loss fell."""
    runs = [run for run in load_records(RESULTS / RECORDED[family]) if run.arm == "baseline"]
    assert {run.task for run in runs} == {DEFAULT_PRESETS[family]}
    for run in runs:
        assert run.hardware["accelerator"] is None
        assert run.seconds < 600
        losses = [entry["nll"] for entry in run.history if "nll" in entry]
        assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_old_name_of_the_metrics_warns(family):
    task = PRESETS[DEFAULT_PRESETS[family]]
    statistics = np.ones((4, WIDTHS[family]))
    with pytest.warns(DeprecationWarning, match="compute_metrics"):
        assert task.figures(statistics) == task.compute_metrics(statistics)


def test_presets_are_read_without_a_trainer():
    code = "import sys, regdrop.tasks; print('transformers.trainer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
