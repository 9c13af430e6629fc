"""What a folder of results is of: the study, and the commands that made it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from regdrop.experiments.recording.files import read_object, write_json
from regdrop.experiments.recording.ownership import PATIENCE_SECONDS, hold

MANIFEST_NAME = "study.json"
COMPARISON = "compare"
TUNING = "tune"


@dataclass(frozen=True)
class Manifest:
    """What a folder of results is of.

    Attributes:
        study: Name of the study; "compare" for the five arms, "tune" for a choice of settings.
        commands: The commands that made it, in their order.
    """

    study: str = COMPARISON
    commands: tuple[str, ...] = ()


def read_manifest(folder: Path) -> Manifest:
    """Return what a folder is of; a folder without a manifest is a comparison.

    Raises:
        ValueError: If its manifest cannot be read.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return Manifest()
    try:
        content = read_object(path, "the manifest of a study")
        return Manifest(content["study"], tuple(content["commands"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error


def check_study(folder: Path, study: str) -> None:
    """Check that a folder is free for a study, or holds results of it.

    Raises:
        ValueError: If it holds another's.
    """
    manifest = read_manifest(folder)
    holds_results = (folder / MANIFEST_NAME).exists() or (folder / "records").exists()
    if holds_results and manifest.study != study:
        raise ValueError(
            f"{folder} holds results of {manifest.study!r}, not of {study!r}; choose another folder"
        )


def note_command(folder: Path, study: str, command: str) -> bool:
    """Write that a command makes, or goes on with, a study in a folder.

    Returns:
        Whether nobody had noted it before.

    Raises:
        ValueError: If the folder holds results of another study.
    """
    with _manifest_held(folder):
        if (folder / MANIFEST_NAME).exists():
            check_study(folder, study)
        before = read_manifest(folder).commands
        commands = (*(other for other in before if other != command), command)
        write_json(folder / MANIFEST_NAME, asdict(Manifest(study, commands)))
    return command not in before


def forget_command(folder: Path, command: str, own: Sequence[Path] = ()) -> None:
    """Take back that a command was noted, as it has made nothing; leave what others noted.

    Args:
        folder: Folder of results.
        command: The command.
        own: Files that it may have made all the same, removed where nobody else noted anything.
    """
    with _manifest_held(folder):
        manifest = read_manifest(folder)
        others = tuple(other for other in manifest.commands if other != command)
        if others:
            write_json(folder / MANIFEST_NAME, asdict(Manifest(manifest.study, others)))
            return
        for path in (folder / MANIFEST_NAME, *own):
            path.unlink(missing_ok=True)


@contextmanager
def _manifest_held(folder: Path) -> Iterator[None]:
    with hold(folder / "study.lock", f"{folder / MANIFEST_NAME}", seconds=PATIENCE_SECONDS):
        yield
