import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_an_attack_of_a_minute_loses_nothing_and_takes_nothing_wrong():
    command = [sys.executable, str(Path(__file__).with_name("attack.py")), "--seconds", "45"]
    result = subprocess.run(command, capture_output=True, text=True)
    last = result.stdout.strip().split("\n")[-1]
    found = {name: int(n) for n, name in re.findall(r"(\d+) (\w+)", last)}
    assert found["tracebacks"] == found["silent"] == 0, result.stdout + result.stderr
    assert min(found["recovered"], found["refused"]) >= 1
    assert found["tried"] == found["recovered"] + found["refused"]
