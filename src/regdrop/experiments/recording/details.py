"""What is long in the records of a study, histories and test examples, in one compressed file."""

import json
import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

DETAILS_NAME = "details.npz"
_RUNS = "runs.json"
_WHOLE = (np.uint8, np.int16, np.int32)
# Significant digits of the statistics of single examples: more than any figure shows.
SIGNIFICANT_DIGITS = 6


class Details(NamedTuple):
    """What is long in the record of a run.

    Attributes:
        history: One entry a log or evaluation.
        examples: Statistics of each example of every test split.
    """

    history: list[dict[str, float]]
    examples: dict[str, list[list[float]]]


def write_details(file: BinaryIO, runs: Mapping[str, Details]) -> None:
    """Write the details of runs, so that they are read again exactly.

    The file is a zip archive that `numpy.load` reads: `runs.json` holds the histories and the
    shapes of the examples. Each statistic of a split is one array over all runs, `SPLIT/COLUMN`, or
    two where it has decimals, `.digits` and `.decimals`: digits / 10**decimals.

    Args:
        file: An open file.
        runs: Details by the name of the run.
    """
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    content: dict[str, Any] = {}
    for run, details in runs.items():
        shapes = {}
        for split, rows in details.examples.items():
            width = len(rows[0]) if rows else 0
            table = np.array(rows, np.float64).reshape(len(rows), width)
            shapes[split] = list(table.shape)
            for position, column in enumerate(table.T):
                columns[f"{split}/{position}"].append(column)
        content[run] = {"history": details.history, "examples": shapes}
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_entry(_RUNS), json.dumps(content))
        for name, parts in columns.items():
            for suffix, array in _encode(np.concatenate(parts)).items():
                with archive.open(_entry(f"{name}{suffix}.npy"), "w") as entry:
                    np.lib.format.write_array(entry, array)


def read_details(path: Path) -> dict[str, Details]:
    """Return the details of the runs in a file, none if there is no file.

    Raises:
        ValueError: If the file cannot be read.
    """
    if not path.exists():
        return {}
    try:
        with np.load(path) as archive:
            content = json.loads(archive[_RUNS])
            columns = {
                name.removesuffix(".digits"): _decode(archive, name)
                for name in archive.files
                if name != _RUNS and not name.endswith(".decimals")
            }
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    read: Counter[str] = Counter()
    runs = {}
    for run, own in content.items():
        examples = {}
        for split, (length, width) in own["examples"].items():
            table = np.empty((length, width))
            for position in range(width):
                name = f"{split}/{position}"
                table[:, position] = columns[name][read[name] : read[name] + length]
                read[name] += length
            examples[split] = table.tolist()
        runs[run] = Details(own["history"], examples)
    return runs


def _encode(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays that hold numbers in the fewest bytes, exactly, by their suffix."""
    for kind in _WHOLE:
        with np.errstate(invalid="ignore"):
            whole = values.astype(kind)
        if _is_same(whole.astype(np.float64), values):
            return {"": whole}
    if np.isfinite(values).all():
        size = np.abs(np.where(values == 0, 1.0, values))
        decimals = (SIGNIFICANT_DIGITS - 1 - np.floor(np.log10(size))).clip(0, 22).astype(np.int8)
        rounded = np.rint(values * 10.0**decimals)
        if np.abs(rounded).max() < 2**31:
            digits = rounded.astype(np.int32)
            if _is_same(digits / 10.0**decimals, values):
                return {".digits": digits, ".decimals": decimals}
    return {"": values}


def _decode(archive: Any, name: str) -> np.ndarray:
    values: np.ndarray = archive[name].astype(np.float64)
    if name.endswith(".digits"):
        values = values / 10.0 ** archive[name.replace(".digits", ".decimals")]
    return values


def _is_same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Return whether numbers are the same in every bit, the sign of a zero too."""
    return ours.tobytes() == np.ascontiguousarray(theirs).tobytes()


def _entry(name: str) -> zipfile.ZipInfo:
    """Return an entry of no date, so that the same content makes the same file."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_LZMA
    return entry
