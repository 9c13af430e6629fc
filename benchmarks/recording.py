"""The files of a measurement: how it is asked for, shown and written.

What draws and describes is imported where it is used: `gpu.py` needs torch and transformers alone.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def parser(description: str, repeats: int | None = None) -> argparse.ArgumentParser:
    """Return the options that every benchmark has; the number of rounds where it has such."""
    script = Path(sys.argv[0]).stem
    options = argparse.ArgumentParser(description=description.split("\n")[0])
    options.add_argument("--quick", action="store_true", help="small, to see that it runs")
    if repeats is not None:
        options.add_argument("--repeats", type=int, default=repeats, help="rounds that are timed")
    options.add_argument("--output", type=Path, default=ROOT / "results" / f"{script}.json")
    return options


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options as given, with the command line that makes this measurement again."""
    arguments = options.parse_args()
    parts = [f"python benchmarks/{Path(sys.argv[0]).name}"]
    for name, value in vars(arguments).items():
        if name != "output" and value != options.get_default(name):
            parts.append(f"--{name}" if value is True else f"--{name} {value}")
    arguments.command = " ".join(parts)
    if arguments.quick and "repeats" in arguments:
        arguments.repeats = 1
    return arguments


def show(rows: Sequence[Row], columns: Mapping[str, str], title: str, console: "Console") -> None:
    """Print a table: the title of each column by the key of its values."""
    from rich.table import Table

    shown = {key: name for key, name in columns.items() if any(key in row for row in rows)}
    table = Table(*shown.values(), title=title)
    for row in rows:
        table.add_row(*(_shown(row.get(key, "")) for key in shown))
    console.print(table)


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "{median:.2f} ({p10:.2f} to {p90:.2f})".format(**value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def measure_cases(
    cases: Sequence[tuple[Any, ...]],
    measure: Callable[..., list[Row]],
    title: Callable[..., str],
    columns: dict[str, str],
    arguments: argparse.Namespace,
    console: "Console",
) -> list[Row]:
    """Measure one case after the other, show each as a table, write the record; return its rows."""
    from rich.progress import track

    rows: list[Row] = []
    for case in track(cases, "measuring", console=console):
        found = measure(*case)
        show(found, columns, title(*case), console)
        rows += found
    write(rows, arguments, console)
    return rows


def write(
    rows: Sequence[Row],
    arguments: argparse.Namespace,
    console: "Console",
    **facts: object,
) -> None:
    """Write the record: JSON, and its rows as CSV beside it."""
    from regdrop.experiments.recording.environment import describe_hardware, library_versions

    record = {
        **{name: value for name, value in vars(arguments).items() if name != "output"},
        "date": date.today().isoformat(),
        **facts,
        "versions": library_versions(),
        "hardware": describe_hardware(),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    flat = [dict(_flatten(row)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with arguments.output.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    console.print(f"written to {arguments.output} and, as a table, .csv")


def _flatten(row: Row) -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            pairs += [(f"{name} {part}", number) for part, number in value.items()]
        else:
            pairs.append((name, value))
    return pairs
