"""What a section of `gpu.py` finds: checks that hold or do not, and rows of figures."""

import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from recording import Row

OK, FAIL, SKIPPED = "ok", "FAIL", "skipped"


class UnavailableError(Exception):
    """A check that cannot be made here."""


class Findings:
    """The findings of a section, written after each of them: a section may be stopped.

    Attributes:
        device: "cuda" or "cpu".
        quick: Whether everything is to be tiny, to see that it runs.
    """

    def __init__(self, path: Path, device: str, quick: bool, seconds: float) -> None:
        self.device, self.quick = device, quick
        self._path = path
        self._start = time.monotonic()
        self._seconds = seconds
        self._checks: list[Row] = []
        self._rows: list[Row] = []
        self._save()

    def check(self, name: str, call: Callable[[], str]) -> None:
        """Run a check that returns what it saw; it fails where that raises."""
        if self.seconds_left <= 0:
            return self._note(name, SKIPPED, "no time was left", 0.0)
        start = time.monotonic()
        try:
            status, detail = OK, call()
        except (UnavailableError, torch.OutOfMemoryError) as reason:
            status, detail = SKIPPED, _first_line(reason)
        except Exception as error:
            traceback.print_exc()
            status, detail = FAIL, f"{type(error).__name__}: {_first_line(error)}"
        self._note(name, status, detail, time.monotonic() - start)

    def skip(self, name: str, why: str) -> None:
        """Note a check that is not made."""
        self._note(name, SKIPPED, why, 0.0)

    def add(self, rows: Sequence[Row]) -> None:
        """Keep figures."""
        self._rows += rows
        self._save()

    @property
    def seconds_left(self) -> float:
        """Seconds for which the section may go on."""
        return self._seconds - (time.monotonic() - self._start)

    def _note(self, name: str, status: str, detail: str, seconds: float) -> None:
        entry = {"check": name, "status": status, "detail": detail, "seconds": round(seconds, 2)}
        self._checks.append(entry)
        print("{status} {check} [{detail}] {seconds} s".format(**entry), flush=True)
        self._save()

    def _save(self) -> None:
        found = {
            "seconds": round(time.monotonic() - self._start, 1),
            "checks": self._checks,
            "rows": self._rows,
        }
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(found), encoding="utf-8")
        os.replace(partial, self._path)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
