"""The tests that run a kernel on a GPU where there is one: the section "tests" of `gpu.py`."""

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

from gpu_findings import Findings, UnavailableError
from recording import ROOT

FILES = sorted(ROOT.glob("tests/kernels/test_triton*.py"))


def run(findings: Findings) -> None:
    for path in FILES:
        name = str(path.relative_to(ROOT))
        missing = [p for p in ("pytest", "hypothesis", "triton") if find_spec(p) is None]
        if findings.device == "cpu":
            findings.skip(name, "make test runs it on a CPU")
        elif missing:
            findings.skip(name, f"{' and '.join(missing)} is not installed")
        else:
            findings.check(name, partial(_test, name, findings.seconds_left))


def _test(name: str, seconds: float) -> str:
    """Run a file of tests; return what pytest says in the end."""
    workers = ["-n", "6"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *workers, name]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment}
    try:
        done = subprocess.run(command, check=False, timeout=seconds, **options)
    except subprocess.TimeoutExpired as stopped:
        raise UnavailableError(f"did not end in {seconds:.0f} s") from stopped
    print(done.stdout[-5000:], done.stderr[-2000:], flush=True)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-200:]]
    assert done.returncode == 0, last[0]
    return last[0]
