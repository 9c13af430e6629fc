"""The record of one run: everything that tables and plots need.

A record is one JSON file. In the folder of a study, what is long in the records is then moved into
one compressed file beside them (details.py).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from regdrop.experiments.recording.details import DETAILS_NAME, Details, read_details, write_details
from regdrop.experiments.recording.earlier_options import with_later_options
from regdrop.experiments.recording.files import read_object, write_json
from regdrop.experiments.recording.ownership import HeldError, hold
from regdrop.whole_files import write_whole


@dataclass(frozen=True)
class RunRecord:
    """One finished run.

    Attributes:
        task: Name of the preset.
        arm: Name of the arm.
        seed: Seed of weights, order of the data and dropout masks.
        config: The resolved settings of task, training and R-Drop.
        steps: Optimiser steps taken.
        seconds: Time of training alone, evaluation and checkpoints left out.
        peak_memory_mib: Highest memory of the run: on a GPU what torch allocated, else the
            resident memory of the process; None where the system does not tell.
        best_step: Step of the selected checkpoint.
        validation: Metrics of the selected checkpoint on the validation split.
        test: Metrics of the selected checkpoint on the test split.
        history: One entry a log or evaluation, with its `step` and training `seconds`.
        versions: Versions of Python and the libraries.
        hardware: Processor, cores, threads of the run and accelerator.
        examples: Statistics of each example of every test split, from which
            `Task.compute_metrics` computes the metrics of any part of them.
        signatures: What a metric's own library says of how it was computed, by metric.
        metrics: How each metric of the task is read, the fields of a `Metric` by its name; none in
            earlier records.
    """

    task: str
    arm: str
    seed: int
    config: dict[str, Any]
    steps: int
    seconds: float
    peak_memory_mib: float | None
    best_step: int
    validation: dict[str, float]
    test: dict[str, float]
    history: list[dict[str, float]]
    versions: dict[str, str]
    hardware: dict[str, Any]
    examples: dict[str, list[list[float]]] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the record; the file appears whole or not at all."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Read a record.

        Raises:
            ValueError: If the file is no record.
        """
        return _load([path])[0]


def record_path(folder: Path, arm: str, seed: int) -> Path:
    """Return the file of a run's record in the folder of a comparison."""
    return folder / "records" / f"{arm}-seed{seed}.json"


def load_records(folder: Path) -> list[RunRecord]:
    """Read all records of a comparison, by arm and seed.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If a file is no record, or is not named by its arm and seed: a copy of another
            would count as one more seed.
    """
    contents = _read_named(folder)
    if not contents:
        raise FileNotFoundError(f"no records in {folder / 'records'}")
    return list(_with_details(contents).values())


def read_configs(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the arm and the settings of every record of a comparison.

    Raises:
        ValueError: If a file cannot be read, or is not named by its arm and seed.
    """
    contents = _read_named(folder).values()
    return [(x["arm"], x["config"]) for x in contents if isinstance(x.get("config"), dict)]


def merge_records(folder: Path) -> None:
    """Move what is long in the records of a study into its one compressed file.

    It can be interrupted, and called by several processes at a time, at any moment: a record is
    shortened only once the file that holds the rest is in its place. Where another process is
    merging, what is new is left for the next time.

    Raises:
        ValueError: As `load_records` does, or if what is long in a record is nowhere.
    """
    if not any(map(_is_whole, _read_named(folder).values())):
        return
    with suppress(HeldError), hold(folder / "details.lock", f"the merging in {folder}", seconds=0):
        contents = _read_named(folder)
        details = {
            path.stem: Details(record.history, record.examples)
            for path, record in _with_details(contents).items()
        }
        write_whole(folder / DETAILS_NAME, lambda partial: _write_details(partial, details))
        for path, content in contents.items():
            if _is_whole(content):
                short = {k: v for k, v in content.items() if k not in Details._fields}
                write_json(path, short)


def _write_details(path: Path, details: Mapping[str, Details]) -> None:
    with path.open("wb") as file:
        write_details(file, details)


def _read_named(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return what the files of records hold themselves, once each has the name of its run.

    Raises:
        ValueError: If a file holds no object, or another run than that of its name.
    """
    paths = sorted((folder / "records").glob("*.json"))
    contents = {path: _read(path) for path in paths}
    for path, content in contents.items():
        if not {"arm", "seed"} <= content.keys():  # no record, of which more is said later
            continue
        name = record_path(folder, content["arm"], content["seed"]).name
        if path.name != name:
            raise ValueError(
                f"{path} holds the record of {content['arm']} seed {content['seed']}, which must "
                f"be named {name}; move a copy out of the folder"
            )
    return contents


def _load(paths: Sequence[Path]) -> list[RunRecord]:
    return list(_with_details({path: _read(path) for path in paths}).values())


def _read(path: Path) -> dict[str, Any]:
    content = read_object(path, "the record of a run")
    if isinstance(content.get("config"), dict):
        content["config"] = with_later_options(content["config"])
    return content


def _is_whole(content: Mapping[str, Any]) -> bool:
    return "history" in content


def _with_details(contents: Mapping[Path, dict[str, Any]]) -> dict[Path, RunRecord]:
    """Return records with what is long in them, of one study.

    The contents have been read before: merging writes what is long before it shortens a record.
    """
    short = [path for path, content in contents.items() if not _is_whole(content)]
    details = read_details(short[0].parent.parent / DETAILS_NAME) if short else {}
    records = {}
    for path, content in contents.items():
        if path in short and path.stem in details:
            content = {**content, **details[path.stem]._asdict()}
        try:
            records[path] = RunRecord(**content)
            _RECORD.validate_python(content)
        except (TypeError, ValidationError) as error:
            hint = f"; {DETAILS_NAME} must hold what is long in it" if path in short else ""
            raise ValueError(
                f"{path} is not the record of a run: {_one_line(error)}{hint}"
            ) from error
    return records


def _one_line(error: TypeError | ValidationError) -> str:
    if isinstance(error, TypeError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


_RECORD = TypeAdapter(RunRecord)
