"""The one table of `gpu.py`: which checks hold, and how the figures stand to the aims.

Behind it, in the file alone, are the figures themselves, by place and variant.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gpu_findings import FAIL, OK, SKIPPED
from recording import Row

# Figures by place, such as a shape.
Measured = dict[str, float]
# A smaller pair of logits is ruled by the host.
LARGE_ELEMENTS = 2**20


@dataclass(frozen=True)
class Aim:
    """A bound of one figure at every place where it is measured.

    Attributes:
        text: What is aimed at.
        section: Where it is measured.
        find: From the rows of the section to the figures.
        bound: The bound.
        at_least: Whether figures are to be at least that, not at most.
        unit: What follows a number.
    """

    text: str
    section: str
    find: Callable[[Sequence[Row]], Measured]
    bound: float
    at_least: bool = False
    unit: str = ""

    def holds(self, value: float) -> bool:
        """Return whether a figure meets the aim."""
        return value >= self.bound if self.at_least else value <= self.bound


def of_variant(
    variant: str,
    value: Callable[[Row], float | None],
    where: Callable[[Row], bool] = lambda row: True,
) -> Callable[[Sequence[Row]], Measured]:
    """Return what finds a figure of a variant at the places of interest."""

    def find(rows: Sequence[Row]) -> Measured:
        chosen = [r for r in rows if r["variant"] == variant and "failed" not in r and where(r)]
        values = ((place(row), value(row)) for row in chosen)
        return {at: number for at, number in values if number is not None}

    return find


def median(key: str, factor: float = 1.0) -> Callable[[Row], float | None]:
    """Return what reads the median of a figure, which a row may lack."""
    return lambda row: row[key]["median"] * factor if key in row else None


def compiled_to_chunked(rows: Sequence[Row]) -> Measured:
    """Return the time of the compiled closed form, in times of the one that is not."""
    compiled, chunked = (
        of_variant(name, median("milliseconds"))(rows) for name in ("compiled", "chunked")
    )
    return {at: time / chunked[at] for at, time in compiled.items() if at in chunked}


def beyond_gradients(row: Row) -> float:
    """Return the peak of a way to compute the last layer above its gradients, in MiB."""
    return row["peak_mebibytes"] * (1 - 1 / row["peak_times_gradients"])


def place(row: Row) -> str:
    """Return the shape that a row is about."""
    if "width" in row:
        return f"{row['parameters'] / 1e6:.0f}M, {row['dtype'].split()[0]}"
    size = f"{row['features']} x {row['words']:,}" if "features" in row else f"{row['classes']:,}"
    return f"2 x {row['items']} x {size} {row['dtype']}"


def is_large(row: Row) -> bool:
    return row["items"] * row["classes"] >= LARGE_ELEMENTS


def fills_a_card(row: Row) -> bool:
    return row["items"] >= 4096 and row["classes"] >= 32_000


def has_many_words(row: Row) -> bool:
    return row["words"] >= 128_000


AIMS = [
    Aim(
        "Triton in place, share of the copy bandwidth",
        "loss",
        of_variant("triton, in place", median("share_of_copy_bandwidth", 100), fills_a_card),
        80,
        at_least=True,
        unit=" %",
    ),
    Aim(
        "the same without the host (graph replays)",
        "loss",
        of_variant(
            "triton, in place", median("share_of_copy_bandwidth_without_host", 100), fills_a_card
        ),
        80,
        at_least=True,
        unit=" %",
    ),
    Aim(
        "Triton in place, in times of Liger's cross entropy",
        "loss",
        of_variant("triton, in place", median("times_liger")),
        1,
    ),
    Aim(
        "Triton, speed-up over the official form",
        "loss",
        of_variant("triton", median("speedup_over_official")),
        1,
        at_least=True,
    ),
    *(
        Aim(
            f"without Triton, {dtype}, speed-up over the official form",
            "loss",
            of_variant(
                "chunked",
                median("speedup_over_official"),
                lambda row, dtype=dtype: is_large(row) and row["dtype"] == dtype,
            ),
            2,
            at_least=True,
        )
        for dtype in ("float32", "bfloat16")
    ),
    Aim(
        "without Triton, peak in logits pairs",
        "loss",
        of_variant("chunked", lambda row: row["peak_logits_pairs"], is_large),
        3,
    ),
    Aim("compiled, in times of not compiled", "compiled_loss", compiled_to_chunked, 1),
    Aim(
        "fused last layer, in times of its products",
        "fused_linear",
        of_variant("fused", median("times_three_products"), has_many_words),
        1.35,
    ),
    Aim(
        "fused last layer, peak above its gradients",
        "fused_linear",
        of_variant("fused", beyond_gradients, has_many_words),
        300,
        unit=" MiB",
    ),
    *(
        Aim(f"{variant}, in single-pass steps", "step", of_variant(variant, median("step")), bound)
        for variant, bound in (
            ("exact, stacked", 2.0),
            ("exact, fused with the last layer", 2.0),
            ("one backward", 1.4),
            ("one backward, fused with the last layer", 1.4),
        )
    ),
]

# Section, title and what is read of a row.
FIGURES: list[tuple[str, str, Callable[[Row], float | None]]] = [
    ("loss", "loss and gradient, milliseconds", median("milliseconds")),
    ("loss", "without the host, milliseconds", median("milliseconds_without_host")),
    ("loss", "loss and gradient, peak in logits pairs", lambda row: row.get("peak_logits_pairs")),
    ("fused_linear", "last layer and loss, milliseconds", median("milliseconds")),
    ("fused_linear", "last layer and loss, peak in MiB", lambda row: row.get("peak_mebibytes")),
    ("step", "steps, in single-pass steps", median("step")),
    ("step", "steps, milliseconds", median("milliseconds")),
    ("step", "steps, peak in MiB", lambda row: row.get("peak_mebibytes")),
    ("compiled_loss", "loss and gradient, compiled, milliseconds", median("milliseconds")),
]


def render(record: Row) -> str:
    """Return the table as Markdown, in columns that a terminal shows too."""
    sections = record["sections"]
    card = record["hardware"]["accelerator"] or "no GPU"
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [("what", "found", "aim", "")]
    for name, found in sections.items():
        if found["checks"]:
            lines += check_lines(name, found["checks"])
    for aim in AIMS:
        if aim.section in sections:
            lines.append(aim_line(aim, sections[aim.section]["rows"]))
    return f"{record['date']}, {card}; {versions}\n\n{_markdown(lines)}"


def render_figures(record: Row) -> str:
    """Return the medians of all figures as tables: places down, variants across."""
    tables = []
    for section, title, value in FIGURES:
        rows = record["sections"].get(section, {"rows": []})["rows"]
        found = {(place(row), row["variant"]): value(row) for row in rows}
        found = {at: number for at, number in found.items() if number is not None}
        if found:
            places, variants = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
            lines = [
                (at, *(_digits(found[at, v]) if (at, v) in found else "" for v in variants))
                for at in places
            ]
            tables.append(f"{title}:\n\n{_markdown([('at', *variants), *lines])}")
    return "\n".join(tables)


def check_lines(section: str, checks: Sequence[Row]) -> Iterator[tuple[str, str, str, str]]:
    """Return how many checks of a section hold, and a line for each that does not, or was cut."""
    made = [check for check in checks if check["status"] != SKIPPED]
    good = sum(check["status"] == OK for check in made)
    skipped = len(checks) - len(made)
    found = f"{good} of {len(made)}" + (f", {skipped} skipped" if skipped else "")
    yield f"checks of {section}", found, "all", OK if good == len(made) else FAIL
    for check in checks:
        if check["status"] == FAIL or check["check"] == f"{section} ends":
            detail = check["detail"].replace("|", "/")
            yield f"  {check['check']}", detail[:100], "", check["status"]


def aim_line(aim: Aim, rows: Sequence[Row]) -> tuple[str, str, str, str]:
    """Return the worst figure, where it was measured, and at how many places the aim is met."""
    bound = f"at {'least' if aim.at_least else 'most'} {aim.bound:g}{aim.unit}"
    measured = aim.find(rows)
    if not measured:
        return aim.text, "not measured", bound, ""
    worst = (min if aim.at_least else max)(measured, key=lambda at: measured[at])
    good = sum(map(aim.holds, measured.values()))
    found = f"{_digits(measured[worst])}{aim.unit} at {worst}; {good} of {len(measured)}"
    return aim.text, found, bound, "met" if good == len(measured) else "missed"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a table whose first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]]) + "\n"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
