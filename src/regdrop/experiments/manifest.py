"""What a folder of results is of: the study, and the commands that made it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from regdrop.experiments.record import write_json

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
        content = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(content["study"], tuple(content["commands"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


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


def note_command(folder: Path, study: str, command: str) -> None:
    """Write that a command makes, or goes on with, a study in a folder."""
    before = read_manifest(folder).commands
    commands = (*(other for other in before if other != command), command)
    write_json(folder / MANIFEST_NAME, asdict(Manifest(study, commands)))
