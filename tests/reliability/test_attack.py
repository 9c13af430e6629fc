import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(45, marks=pytest.mark.long)],
)
def test_an_attack_loses_nothing_and_takes_nothing_wrong(seconds):
    """The short one is one round: a run with kills, and wrong settings, rows and images."""
    script = str(Path(__file__).with_name("attack.py"))
    command = [sys.executable, script, "--seconds", str(seconds), "--seed", str(seconds)]
    result = subprocess.run(command, capture_output=True, text=True)
    last = result.stdout.strip().split("\n")[-1]
    found = {name: int(n) for n, name in re.findall(r"(\d+) (\w+)", last)}
    assert found["tracebacks"] == found["silent"] == 0, result.stdout + result.stderr
    assert found["recovered"] >= 1
    assert found["refused"] >= 100
    assert found["tried"] == found["recovered"] + found["refused"]
