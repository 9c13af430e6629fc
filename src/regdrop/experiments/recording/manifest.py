"""What a folder of results is of: the study, and the commands that made it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regdrop.experiments.recording.files import read_object, write_json
from regdrop.experiments.recording.ownership import PATIENCE_SECONDS, hold
from regdrop.experiments.recording.settings import differing_base

MANIFEST_NAME = "study.json"
COMPARISON = "compare"
TUNING = "tune"


@dataclass(frozen=True)
class Manifest:
    """What a folder of results is of.

    Attributes:
        study: Name of the study; "compare" for the five arms, "tune" for a choice of settings.
        commands: The commands that made it, in their order.
        base: The settings from which its arms are made; None in a folder of an older version.
    """

    study: str = COMPARISON
    commands: tuple[str, ...] = ()
    base: dict[str, Any] | None = None


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
        base = content.get("base")
        return Manifest(
            content["study"], tuple(content["commands"]), None if base is None else dict(base)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error


def check_study(folder: Path, study: str, base: Mapping[str, Any] | None = None) -> None:
    """Check that a folder is free for a study, or holds results of it.

    Args:
        folder: Folder of results.
        study: Name of the study.
        base: The settings from which its arms are made now; None to leave them out.

    Raises:
        ValueError: If it holds results of another study, or of arms made from other settings.
    """
    manifest = read_manifest(folder)
    holds_results = (folder / MANIFEST_NAME).exists() or (folder / "records").exists()
    if holds_results and manifest.study != study:
        raise ValueError(
            f"{folder} holds results of {manifest.study!r}, not of {study!r}; choose another folder"
        )
    if base is None or manifest.base is None or not _has_records(folder):
        return
    if names := differing_base(manifest.base, base):
        raise ValueError(
            f"{folder} holds results of other settings ({', '.join(names)}), which are not to be "
            "compared with those of now; give the same settings, or choose another output folder"
        )


def note_command(
    folder: Path, study: str, command: str, base: Mapping[str, Any] | None = None
) -> bool:
    """Write that a command makes, or goes on with, a study in a folder.

    Args:
        folder: Folder of results.
        study: Name of the study.
        command: The command.
        base: The settings from which its arms are made; None to leave them out.

    Returns:
        Whether nobody had noted it before.

    Raises:
        ValueError: If the folder holds results of another study, or of other settings.
    """
    with _manifest_held(folder):
        if (folder / MANIFEST_NAME).exists():
            check_study(folder, study, base)
        before = read_manifest(folder)
        commands = (*(other for other in before.commands if other != command), command)
        # Of records that are there already, the settings of now tell nothing.
        own = before.base if _has_records(folder) or base is None else dict(base)
        _write(folder, Manifest(study, commands, own))
    return command not in before.commands


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
            _write(folder, Manifest(manifest.study, others, manifest.base))
            return
        for path in (folder / MANIFEST_NAME, *own):
            path.unlink(missing_ok=True)


def _has_records(folder: Path) -> bool:
    return any(folder.glob("records/*.json"))


def _write(folder: Path, manifest: Manifest) -> None:
    content = asdict(manifest)
    if manifest.base is None:
        del content["base"]
    write_json(folder / MANIFEST_NAME, content)


@contextmanager
def _manifest_held(folder: Path) -> Iterator[None]:
    with hold(folder / "study.lock", f"{folder / MANIFEST_NAME}", seconds=PATIENCE_SECONDS):
        yield
