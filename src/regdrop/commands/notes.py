"""The command that made a folder of results, noted in it while its runs go on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regdrop.commands.app import command_line
from regdrop.experiments.recording.manifest import forget_command, note_command
from regdrop.experiments.recording.ownership import remove_empty
from regdrop.experiments.running.leftovers import clean_up, holds_runs
from regdrop.experiments.studies.search import STORAGE_NAME


@contextmanager
def noted(folder: Path, study: str) -> Iterator[None]:
    """Note the command in a folder before its first run, so that it can be gone on with.

    Nothing is left of a command that is refused before a run has got anywhere, and what other
    commands have there is left to them.

    Args:
        folder: Folder of results.
        study: Name of the study.

    Raises:
        ValueError: If the folder holds results of another study.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    is_new = note_command(folder, study, command_line())
    try:
        yield
    except BaseException:
        clean_up(folder)
        if is_new and not holds_runs(folder):
            forget_command(folder, command_line(), own=[folder / STORAGE_NAME])
        remove_empty(made)
        raise
