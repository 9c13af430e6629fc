"""Everything that only a GPU can tell, in less than five minutes, and one table against the aims.

    make gpu                                          # or
    PYTHONPATH=src python benchmarks/gpu.py           # in a plain checkout
    PYTHONPATH=src python benchmarks/gpu.py --sections accuracy,loss --output FOLDER
    PYTHONPATH=src python benchmarks/gpu.py --device cpu --quick    # to see that it runs

It needs torch, and for some sections triton and transformers; Liger's and Apple's kernels are
measured where they are installed. Every section is a process of its own, so that one that fails or
hangs leaves the others their GPU: those that check run at once, those that measure one after the
other. What was found is written after each: `record.json`, the table, and what the sections said.
The exit code is 1 if a check failed, 2 without a GPU; an aim that is missed is no failure.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import regdrop
from gpu_findings import FAIL, SKIPPED, Findings
from gpu_table import render, render_figures
from recording import ROOT, Row

SECONDS = 265
# The sections that check, and how much of the time they may take together.
CHECKS = {
    "accuracy": "gpu_accuracy.run",
    "runtime": "gpu_runtime.run",
    "compiled": "gpu_compiled.run",
    "trainer": "gpu_trainer.run",
    "tests": "gpu_tests.run",
}
CHECKS_SHARE = 0.28
# The sections that measure, and their parts of the time that is left. What torch.compile makes of
# the loss comes last: it compiles for most of a minute.
MEASURES = {
    "loss": "gpu_speed.loss",
    "fused_linear": "gpu_speed.fused_linear",
    "step": "gpu_speed.step",
    "training": "gpu_training.run",
    "compiled_loss": "gpu_speed.compiled_loss",
}
SHARES = {"loss": 55, "fused_linear": 40, "step": 45, "training": 25, "compiled_loss": 35}
# A section that was told to end finishes the shape that it is at.
GRACE = 12
PACKAGES = ("torch", "triton", "transformers", "accelerate", "liger-kernel", "cut-cross-entropy")


@dataclass
class Section:
    """A section in a process that waits for its turn, and then has so many seconds."""

    name: str
    folder: Path
    options: list[str]
    process: subprocess.Popen[str] = field(init=False)
    deadline: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        command = [sys.executable, str(Path(__file__)), "--work", self.name, "--output"]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*command, str(self.folder), *self.options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        """The file of what the section says."""
        return self.folder / f"{self.name}.log"

    def begin(self, seconds: float) -> None:
        """Let it begin."""
        self.deadline = time.monotonic() + seconds + GRACE
        with suppress(BrokenPipeError):
            print(seconds, file=self.process.stdin, flush=True)

    def finish(self) -> Row:
        """Wait for its end, at most until its time is over, and return what it found."""
        end = None
        try:
            self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            end = (SKIPPED, "its time was over")
        self.stop()
        path = self.folder / f"{self.name}.json"
        found: Row = {"checks": [], "rows": [], "seconds": 0.0}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        if self.process.returncode:
            status, why = end or (FAIL, f"exit code {self.process.returncode}")
            last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            detail = ": ".join([why, *last])
            check = f"{self.name} ends"
            found["checks"].append({"check": check, "status": status, "detail": detail})
        return found

    def stop(self) -> None:
        """End it and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def measure(
    names: Iterable[str], folder: Path, options: list[str], seconds: float, record: Row
) -> Iterable[str]:
    """Run sections, and put what they find into the record; yield the name of each that ended."""
    sections = {name: Section(name, folder, options) for name in names}
    end = time.monotonic() + seconds
    try:
        checks = [name for name in sections if name in CHECKS]
        share = 1.0 if len(checks) == len(sections) else CHECKS_SHARE
        for name in checks:
            sections[name].begin(seconds * share - GRACE)
        for name in checks:
            record["sections"][name] = sections[name].finish()
            yield name
        rest = [name for name in sections if name in MEASURES]
        while rest:
            name = rest.pop(0)
            part = SHARES[name] / (SHARES[name] + sum(SHARES[other] for other in rest))
            sections[name].begin((end - time.monotonic() - GRACE) * part)
            record["sections"][name] = sections[name].finish()
            yield name
    finally:
        for section in sections.values():
            section.stop()


def work(name: str, folder: Path, device: str, quick: bool) -> None:
    """Run a section in this process, once its turn has come."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports it
    module, function = {**CHECKS, **MEASURES}[name].split(".")
    run = getattr(import_module(module), function)
    line = sys.stdin.readline()
    if line:
        run(Findings(folder / f"{name}.json", device, quick, float(line)))


def describe() -> Row:
    """Return the hardware and the versions, of this code too where git knows it."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = "unknown"
    with suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    hardware: dict[str, Any] = {"accelerator": None}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        hardware = {
            "accelerator": card.name,
            "memory_gibibytes": round(card.total_memory / 2**30, 1),
            "multiprocessors": card.multi_processor_count,
            "compute_capability": f"{card.major}.{card.minor}",
        }
    code = f"commit {commit}, version {regdrop.__version__}"
    return {"code": code, "versions": versions, "hardware": hardware}


def parse() -> argparse.Namespace:
    known = [*CHECKS, *MEASURES]
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--sections", default=",".join(known), help="default: all of these")
    options.add_argument("--output", type=Path, help="folder; results/gpu/ and the card's name")
    options.add_argument("--seconds", type=float, default=SECONDS, help="for all sections")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    options.add_argument("--work", choices=known, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    arguments.sections = arguments.sections.split(",")
    unknown = [name for name in arguments.sections if name not in known]
    if unknown:
        options.error(f"--sections must be some of {','.join(known)}, got {','.join(unknown)}")
    if arguments.device == "cpu" and not arguments.quick:
        options.error("--device cpu needs --quick: the shapes are those of a GPU")
    return arguments


def main() -> int:
    arguments = parse()
    if arguments.work:
        work(arguments.work, arguments.output, arguments.device, arguments.quick)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("this needs a GPU that torch sees; --device cpu --quick runs a tiny form of it")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and end the sections
    start = time.monotonic()
    record: Row = {"date": date.today().isoformat(), **describe(), "sections": {}}
    card = record["hardware"]["accelerator"] or "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    output = arguments.output or ROOT / "results" / "gpu" / name
    output.mkdir(parents=True, exist_ok=True)
    options = ["--device", arguments.device, *(["--quick"] if arguments.quick else [])]
    with tempfile.TemporaryDirectory() as folder:
        seconds = arguments.seconds - (time.monotonic() - start)
        for section in measure(arguments.sections, Path(folder), options, seconds, record):
            found = record["sections"][section]
            print(f"{section}: {len(found['checks'])} checks, {found['seconds']} s", flush=True)
            record["seconds"] = round(time.monotonic() - start, 1)
            text = json.dumps(record, indent=1) + "\n"
            (output / "record.json").write_text(text, encoding="utf-8")
            tables = "\n".join([render(record), render_figures(record)])
            (output / "tables.md").write_text(tables, encoding="utf-8")
            logs = [path.read_text(errors="replace") for path in sorted(Path(folder).glob("*.log"))]
            (output / "log.txt").write_text("\n".join(logs), encoding="utf-8")
    print(render(record))
    print(f"{record['seconds']} s; written to {output}")
    checks = [check for found in record["sections"].values() for check in found["checks"]]
    return int(any(check["status"] == FAIL for check in checks))


if __name__ == "__main__":
    sys.exit(main())
