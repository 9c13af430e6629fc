"""The report of a folder of results, from its records alone: a page of HTML and one of Markdown."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from regdrop.experiments.recording.manifest import COMPARISON, read_manifest
from regdrop.experiments.recording.record import RunRecord, load_records
from regdrop.experiments.reporting.plots import draw_plots
from regdrop.experiments.reporting.study_plots import draw_study
from regdrop.experiments.reporting.tables import (
    caption,
    example_caption,
    example_cells,
    find_metrics,
    table_cells,
)
from regdrop.experiments.studies.definitions import STUDIES
from regdrop.whole_files import write_text


@dataclass(frozen=True)
class Table:
    """A table as text, and what it shows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclass(frozen=True)
class Plot:
    """An image beside the report, and what it shows."""

    path: Path
    title: str

    @property
    def data(self) -> str:
        """The image as an address that holds it."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Report:
    """Everything that a report shows.

    Attributes:
        title: Its title.
        question: What the study asks.
        tables: Its tables.
        plots: Its images.
        facts: Settings, seeds, versions and hardware, one line each.
        commands: The commands that made the results.
    """

    title: str
    question: str
    tables: Sequence[Table]
    plots: Sequence[Plot]
    facts: Sequence[str]
    commands: Sequence[str]


def write_report(folder: Path) -> Path:
    """Write `report.md`, `report.html` and the plots of a folder of results; return the HTML page.

    The HTML page holds its plots: it is one file to send or print.

    Raises:
        FileNotFoundError: If there are no records.
        ValueError: If they are of several tasks.
    """
    report = build_report(folder)
    write_text(folder / "report.md", as_markdown(report))
    target = folder / "report.html"
    write_text(target, as_html(report))
    return target


def build_report(folder: Path) -> Report:
    """Draw the plots of a folder of results and return what its report shows."""
    records = load_records(folder)
    manifest = read_manifest(folder)
    metrics = find_metrics(records)
    tables = [Table(*table_cells(records), caption(records))]
    header, rows = example_cells(records)
    if rows:
        tables.append(Table(header, rows, example_caption(records)))
    drawn = draw_study(manifest.study, records, metrics, folder)
    drawn += draw_plots(records, metrics, folder)
    is_comparison = manifest.study == COMPARISON
    name = "comparison" if is_comparison else manifest.study
    return Report(
        title=f"{records[0].task}: {name}, {len(tables[0].rows)} arms",
        question=STUDIES[manifest.study].question if manifest.study in STUDIES else "",
        tables=tables,
        plots=[Plot(path, title) for path, title in drawn],
        facts=_facts(records),
        commands=manifest.commands,
    )


def as_markdown(report: Report) -> str:
    """Return a report as Markdown, with its plots as files beside it."""
    lines = [f"# {escape_markdown(report.title)}", ""]
    if report.question:
        lines += [escape_markdown(report.question), ""]
    for table in report.tables:
        lines += [_markdown_row(table.header), "|" + " --- |" * len(table.header)]
        lines += [_markdown_row(row) for row in table.rows]
        lines += ["", escape_markdown(table.caption), ""]
    lines += [f"- {escape_markdown(fact)}" for fact in report.facts] + [""]
    if report.commands:
        # Longer than what a command holds.
        longest = max(map(len, re.findall("`+", "\n".join(report.commands))), default=0)
        fence = "`" * max(3, longest + 1)
        lines += [f"{fence}bash", *report.commands, fence, ""]
    for plot in report.plots:
        lines += [f"![{escape_markdown(plot.title)}]({quote(plot.path.name)})", ""]
    return "\n".join(lines)


def escape_markdown(text: str) -> str:
    """Return a text that Markdown shows as it is, in one line."""
    line = html.escape(" ".join(text.split()), quote=False)
    # An underscore within a word means nothing.
    return re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape_markdown, cells)) + " |"


def as_html(report: Report) -> str:
    """Return a report as one page that needs no other file."""
    from jinja2 import Environment, StrictUndefined

    template = (
        files("regdrop.experiments.reporting").joinpath("report.html.jinja").read_text("utf-8")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(report=report)


def _facts(records: Sequence[RunRecord]) -> list[str]:
    first = records[0]
    seeds = sorted({record.seed for record in records})
    versions = ", ".join(f"{name} {number}" for name, number in first.versions.items())
    hardware = ", ".join(f"{name}: {value}" for name, value in first.hardware.items())
    memory = [r.peak_memory_mib for r in records if r.peak_memory_mib is not None]
    lines = [
        f"{first.config.get('description', first.task)}",
        f"seeds: {', '.join(map(str, seeds))}",
        f"versions: {versions}",
        f"hardware: {hardware}",
    ]
    if memory:
        lines.append(f"peak memory of a run: {min(memory):.0f} to {max(memory):.0f} MiB")
    return lines
