"""Two commands at once on one comparison, with kills: its records must be the undisturbed ones."""

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from commands import Attack, comparable_fields, small

from regdrop.experiments import load_records

COMMAND = ["compare", "digits", "--arms", "alpha-0,rdrop", "--seeds", "1", "--workers", "2"]
COMMAND += small(steps=6)
_ROUNDS_WITH_KILLS = 3
_ROUNDS = 8


class Comparison(NamedTuple):
    """An undisturbed comparison: its records, its files and the seconds that it took."""

    records: list[dict]
    files: set[str]
    seconds: float

    @classmethod
    def undisturbed(cls, attack: Attack) -> "Comparison":
        """Compare without a disturbance."""
        folder, start = attack.folder / "comparison", time.monotonic()
        process, log = attack.start([*COMMAND, "--output", str(folder)])
        _, status = os.waitpid(process, 0)
        assert status == 0, log.read_text()
        return cls(records_of(folder), files_of(folder), time.monotonic() - start)


def records_of(folder: Path) -> list[dict]:
    """Return the records of a comparison, in order, without their times."""
    return [comparable_fields(vars(record)) for record in load_records(folder)]


def files_of(folder: Path) -> set[str]:
    """Return the names of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def differences(right: Any, found: Any, place: str = "") -> list[str]:
    """Return where nested values differ, and how."""
    if isinstance(right, dict) and isinstance(found, dict) and right.keys() == found.keys():
        pairs = [(f"{place}.{name}", right[name], found[name]) for name in right]
    elif isinstance(right, list) and isinstance(found, list) and len(right) == len(found):
        pairs = [(f"{place}[{i}]", x, y) for i, (x, y) in enumerate(zip(right, found, strict=True))]
    else:
        return [] if right == found else [f"{place}: {found!r:.300}, not {right!r:.300}"]
    return [text for name, x, y in pairs for text in differences(x, y, name)]


def disturb_a_comparison(attack: Attack, right: Comparison, number: int) -> None:
    """Start two commands at once, kill some with or without their workers, until one is through."""
    folder = attack.folder / f"comparison-{number}"
    said, is_done = [], False
    for turn in range(_ROUNDS):
        processes = [attack.start([*COMMAND, "--output", str(folder)]) for _ in range(2)]
        killed = ()
        if turn < _ROUNDS_WITH_KILLS:
            killed = attack.random.sample(processes, attack.random.choice((0, 1, 1, 2)))
        for process, _ in killed:
            time.sleep(attack.random.uniform(0.0, right.seconds / len(killed)))
            kill = attack.random.choice((os.kill, os.killpg))
            with suppress(ProcessLookupError):  # it has no group of its own yet
                kill(process, signal.SIGKILL)
        codes = [os.waitpid(process, 0)[1] for process, _ in processes]
        said += [log.read_text(errors="replace") for _, log in processes if log.exists()]
        is_done = 0 in codes
        if is_done:
            break
    what = f"{folder} after {len(said)} commands: {said[-1][-2000:]}"
    if any("Traceback (most recent" in text for text in said):
        attack.note("tracebacks", what)
    elif not is_done:
        attack.note("silent", f"never done: {what}")
    elif wrong := [
        *differences(right.records, records_of(folder)),
        *files_of(folder) ^ right.files,
    ]:
        attack.note("silent", f"{wrong[:5]} in {what}")
    else:
        attack.note("recovered", "")
    shutil.rmtree(folder, ignore_errors=True)
