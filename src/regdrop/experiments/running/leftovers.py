"""What runs leave in the folder of a comparison, removed once nobody needs it."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from regdrop.experiments.recording.files import read_object
from regdrop.experiments.recording.ownership import HeldError, hold, holder, remove_empty
from regdrop.experiments.running.integrity import list_checkpoints
from regdrop.experiments.running.run import CONFIG_NAME, UNFINISHED_FOLDER

LEARNED = "learned"


def holds_runs(folder: Path) -> bool:
    """Return whether the folder of a comparison holds records, or runs to go on from."""
    works = (path for path in (folder / UNFINISHED_FOLDER).glob("*") if path.is_dir())
    return any(folder.glob("records/*.json")) or any(list_checkpoints(work) for work in works)


def begun_configs(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the arm and the settings of every run that is at work, or can be gone on with.

    What ends this moment is left out, and so is what cannot be read: going on with it says why.
    """
    found = []
    for path in sorted((folder / UNFINISHED_FOLDER).glob(f"*/{CONFIG_NAME}")):
        work = path.parent
        if list_checkpoints(work) or holder(work.with_name(f"{work.name}.lock")):
            with suppress(ValueError):
                config = read_object(path, "the settings of a run")
                found.append((work.name.rpartition("-seed")[0], config))
    return found


def clean_up(folder: Path) -> None:
    """Remove what nobody can go on from: runs without a checkpoint, and what was learned for them.

    What another process is at work on is left to it.
    """
    unfinished = folder / UNFINISHED_FOLDER
    if not unfinished.is_dir():
        return
    for lock in unfinished.glob("*.lock"):
        holder(lock)  # removes that of a process that was killed
    for work in unfinished.iterdir():
        if work.is_dir() and work.name != LEARNED and not list_checkpoints(work):
            _remove(work)
    learned = unfinished / LEARNED
    if learned.is_dir() and list(unfinished.iterdir()) == [learned]:  # nobody's runs need it
        for part in learned.iterdir():
            if part.is_dir():
                _remove(part)
        remove_empty([learned])
    remove_empty([unfinished])


def _remove(work: Path) -> None:
    with suppress(HeldError), hold(work.with_name(f"{work.name}.lock"), f"{work}", seconds=0):
        if not list_checkpoints(work):
            shutil.rmtree(work)
