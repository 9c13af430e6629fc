import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("bench_*.py"))


def numbers(value):
    if isinstance(value, dict):
        return [x for child in value.values() for x in numbers(child)]
    if isinstance(value, list):
        return [x for child in value for x in numbers(child)]
    return [value] if isinstance(value, float) else []


@pytest.mark.slow
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks_run_and_write_their_record(path, tmp_path):
    output = tmp_path / "record.json"
    command = [sys.executable, str(path), "--quick", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["command"] == f"python benchmarks/{path.name} --quick"
    assert {"versions", "hardware", "date"} <= set(record)
    assert min(numbers(record)) > 0
    table = output.with_suffix(".csv").read_text().splitlines()
    assert len(table) == 1 + len(record["rows"])
