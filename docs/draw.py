"""Draw the pictures of the pages, `docs/pictures/*.svg`, from the records under results/.

`python docs/draw.py` writes them; a test holds them against the records.
"""

import math
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from measured import alpha, figures, steps_of_a_gpu

PICTURES = Path(__file__).parent / "pictures"
INK, QUIET, LINE = "#1f2430", "#5c6370", "#c9ced8"
RDROP, CONTROL, PAPER = "#3949ab", "#9aa1ae", "#c2571a"
PALE, WARM, GREEN = "#e8eaf6", "#fdf0e7", "#e6f4ea"


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 14,
    fill: str = INK,
    anchor: str = "start",
    bold: bool = False,
) -> str:
    """Return a line of text."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" '
        f'text-anchor="{anchor}"{weight}>{escape(words)}</text>'
    )


def line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    *,
    colour: str = LINE,
    width: float = 1,
    arrow: bool = False,
) -> str:
    """Return a line, with a head if it is an arrow."""
    head = ' marker-end="url(#head)"' if arrow else ""
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" '
        f'stroke-width="{width:g}"{head}/>'
    )


def box(
    x: float, y: float, width: float, height: float, *lines: str, fill: str = PALE, size: int = 14
) -> str:
    """Return a box with lines of text in its middle, the first of them bold."""
    shape = (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" '
        f'fill="{fill}" stroke="{LINE}"/>'
    )
    top = y + height / 2 - (len(lines) - 1) * (size + 4) / 2 + size / 3
    words = [
        text(
            x + width / 2,
            round(top + i * (size + 4), 1),
            words,
            size=size,
            anchor="middle",
            bold=i == 0 and len(lines) > 1,
            fill=INK if i == 0 else QUIET,
        )
        for i, words in enumerate(lines)
    ]
    return shape + "".join(words)


def dot(x: float, y: float, colour: str, radius: float = 5) -> str:
    """Return a dot."""
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{colour}"/>'


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """Return an SVG on a white ground, so that it is read on dark pages too."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="system-ui, sans-serif">\n'
        f"<title>{escape(title)}</title>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        f'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="{QUIET}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def method() -> str:
    """Draw batch, stack, model, two NLLs and the KL."""
    parts = [
        box(16, 82, 84, 56, "batch x", "labels y"),
        box(138, 50, 116, 120, "repeat_batch", "x", "x", fill="#ffffff"),
        box(300, 50, 130, 120, "your model", "one forward,", "a mask for", "each row", fill=PALE),
        box(480, 44, 118, 54, "logits 1", "mask 1", fill="#ffffff"),
        box(480, 122, 118, 54, "logits 2", "mask 2", fill="#ffffff"),
        box(652, 20, 128, 46, "NLL 1", "with labels y", fill=WARM),
        box(640, 87, 148, 46, "KL", "mean of both ways", fill=GREEN),
        box(652, 154, 128, 46, "NLL 2", "with labels y", fill=WARM),
    ]
    arrows = [
        (100, 110, 136, 110),
        (254, 110, 298, 110),
        (430, 84, 478, 71),
        (430, 136, 478, 149),
        (598, 60, 650, 43),
        (598, 78, 638, 103),
        (598, 142, 638, 117),
        (598, 160, 650, 177),
    ]
    parts += [line(*ends, colour=QUIET, width=1.5, arrow=True) for ends in arrows]
    formula = "loss = (NLL 1 + NLL 2) / 2 + alpha/2 · KL"
    parts.append(text(398, 232, formula, size=16, anchor="middle", bold=True))
    parts.append(
        text(
            398,
            254,
            'the paper\'s sum of both NLLs, on the scale of one (scale="mean")',
            size=13,
            fill=QUIET,
            anchor="middle",
        )
    )
    return picture(
        796,
        270,
        "The batch is stacked, the model runs once, and two halves of the "
        "logits give two NLLs and the KL between them",
        parts,
    )


def decision() -> str:
    """Draw the three questions before one tries R-Drop."""
    questions = [
        (
            ("Does validation loss rise", "while training loss falls?"),
            ("Not now.", "More steps, or a larger model,", "gain more: it slows learning."),
        ),
        (
            ("Is dropout on in the model?", "regdrop doctor MODEL"),
            (
                "Switch it on first.",
                "Without dropout the KL is 0",
                "and you pay twice for nothing.",
            ),
        ),
        (
            ("Can a step take up to", "twice its time?"),
            ("Pay a third of that:", "every_n_steps=3, or the", "other cheaper forms."),
        ),
    ]
    parts = []
    for i, (question, answer) in enumerate(questions):
        y = 18 + i * 116
        parts.append(box(24, y, 268, 70, *question))
        parts.append(line(292, y + 35, 408, y + 35, colour=QUIET, width=1.5, arrow=True))
        parts.append(text(350, y + 27, "no", anchor="middle", fill=QUIET))
        parts.append(box(410, y - 4, 250, 78, *answer, fill=WARM, size=13))
        parts.append(line(158, y + 70, 158, y + 114, colour=QUIET, width=1.5, arrow=True))
        parts.append(text(168, y + 97, "yes", fill=QUIET))
    y = 18 + 3 * 116
    parts.append(
        box(24, y, 268, 66, "Try it, on a validation split", "alpha by factors of 3", fill=GREEN)
    )
    parts.append(text(410, y + 28, "Compare with two passes at alpha 0:", size=13, fill=QUIET))
    parts.append(text(410, y + 46, "what these gain is not R-Drop's doing.", size=13, fill=QUIET))
    return picture(
        684,
        450,
        "Does training overfit, is dropout on, can a step take twice its "
        "time: three times yes, and R-Drop is worth a trial",
        parts,
    )


def gain() -> str:
    """Draw what R-Drop and two controls change in the test NLL of the measured tasks."""
    tasks = [
        ("translation, 2,000 pairs", "multi30k-part-tuned"),
        ("language model, 20,000 words", "ptb-part"),
        ("language model, a book", "alice"),
        ("summaries, 1,000 abstracts", "scitldr-part-tuned"),
        ("images, 2,000", "fashion-mnist-part"),
        ("sentences (CoLA), fine-tuned", "minilm-cola-tuned"),
        ("six layers a side, 1,200 steps", "iwslt-size"),
    ]
    arms = [
        ("R-Drop", "rdrop", RDROP, 0),
        ("two passes, no KL", "alpha-0", CONTROL, 12),
    ]
    left, scale, zero, top = 236, 500, 500, 62

    def place(value: float) -> float:
        return round(zero + value * scale, 1)

    parts = [
        text(20, 30, "Change of the test NLL against training without R-Drop", size=16, bold=True)
    ]
    bottom = top + 46 * len(tasks)
    for tick in (-0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3):
        x = place(tick)
        parts.append(line(x, top - 8, x, bottom - 8, colour=QUIET if tick == 0 else "#eceef2"))
        label = f"{tick:+.1f}".replace("-", "−") if tick else "0"
        parts.append(text(x, bottom + 10, label, size=12, fill=QUIET, anchor="middle"))
    parts.append(text(place(-0.2), bottom + 30, "better", size=12, fill=QUIET, anchor="middle"))
    parts.append(text(place(0.12), bottom + 30, "worse", size=12, fill=QUIET, anchor="middle"))
    for i, (name, study) in enumerate(tasks):
        y = top + 46 * i
        parts.append(text(left - 6, y + 14, name, size=13, anchor="end"))
        found = figures(study)
        for _, arm, colour, offset in arms:
            figure = found[arm]["NLL"]
            assert figure.difference is not None
            assert figure.difference_interval is not None
            low = place(figure.difference - figure.difference_interval)
            high = place(figure.difference + figure.difference_interval)
            row = y + 4 + offset
            parts.append(line(low, row, high, row, colour=colour, width=2))
            parts.append(dot(place(figure.difference), row, colour))
    for i, (name, _, colour, _) in enumerate(arms):
        parts.append(dot(30 + 100 * i, bottom + 26, colour))
        parts.append(text(40 + 100 * i, bottom + 30, name, size=12))
    return picture(
        680,
        bottom + 46,
        "Change of test NLL by R-Drop and by two passes without the "
        "KL, with 95 % intervals over seeds",
        parts,
    )


def alphas() -> str:
    """Draw alpha by task: the paper's beside what a validation split chose here."""
    rows = [
        ("translation", [5], [alpha("multi30k-part-tuned")]),
        ("summarisation", [0.7], [alpha("scitldr-part-tuned")]),
        ("language modelling", [1], [alpha("alice"), alpha("ptb-part")]),
        (
            "understanding (GLUE)",
            [0.1, 1],
            [alpha("minilm-sst2-part"), alpha("minilm-cola-tuned"), alpha("minilm-mrpc-part")],
        ),
        ("images", [0.6], [alpha("digits"), alpha("fashion-mnist-part")]),
    ]
    left, right, top = 190, 640, 60

    def place(value: float) -> float:
        share = math.log10(value / 0.1) / math.log10(200)
        return round(left + share * (right - left), 1)

    parts = [
        text(
            20, 30, "alpha: the paper's, and what a validation split chose here", size=16, bold=True
        )
    ]
    bottom = top + 40 * len(rows)
    for tick in (0.1, 0.3, 1, 3, 10):
        parts.append(line(place(tick), top - 12, place(tick), bottom - 14, colour="#eceef2"))
        parts.append(
            text(place(tick), bottom + 4, f"{tick:g}", size=12, fill=QUIET, anchor="middle")
        )
    for i, (name, paper, here) in enumerate(rows):
        y = top + 40 * i
        parts.append(text(left - 22, y + 9, name, size=13, anchor="end"))
        for values, colour, row in ((paper, PAPER, y), (here, RDROP, y + 11)):
            ends = place(min(values)), place(max(values))
            parts.append(line(ends[0], row, ends[1], row, colour=colour, width=2))
            parts.extend(dot(place(value), row, colour) for value in values)
    parts.append(dot(30, bottom + 24, PAPER))
    parts.append(text(40, bottom + 28, "the paper, large models", size=12))
    parts.append(dot(210, bottom + 24, RDROP))
    parts.append(text(220, bottom + 28, "chosen here, small models that overfit", size=12))
    return picture(
        660, bottom + 44, "Alpha by task, the paper's beside what was chosen here", parts
    )


def memory() -> str:
    """Draw the peak memory of a training step, one pass and two, on an H100."""
    ways = [
        ("one pass", "one pass", CONTROL),
        ("two passes, the official form", "official form, stacked", PAPER),
        ("two passes, regdrop", "exact, stacked", RDROP),
        ("the same, last layer in the loss", "exact, fused with the last layer", RDROP),
        ("one backward pass", "one backward", "#7986cb"),
        ("the same, last layer in the loss", "one backward, fused with the last layer", "#7986cb"),
    ]
    rows = [row for row in steps_of_a_gpu() if row["words"] == 32000]
    sizes = sorted({int(str(row["parameters"])) for row in rows})
    parts = [text(20, 30, "Peak memory of a training step, GiB", size=16, bold=True)]
    y = 58
    for size in sizes:
        parts.append(text(20, y, f"{size / 1e6:.0f} million parameters", size=13, fill=QUIET))
        y += 12
        for name, variant, colour in ways:
            (row,) = [r for r in rows if r["parameters"] == size and r["variant"] == variant]
            gibibytes = float(str(row["peak_mebibytes"])) / 1024
            parts.append(text(232, y + 13, name, size=13, anchor="end"))
            width = round(gibibytes * 5.6, 1)
            parts.append(
                f'<rect x="240" y="{y}" width="{width:g}" height="17" rx="3" fill="{colour}"/>'
            )
            parts.append(text(246 + width, y + 13, f"{gibibytes:.1f}", size=12, fill=QUIET))
            y += 23
        y += 24
    return picture(
        640, y - 8, "Peak memory of one pass, of two passes stacked and of cheaper forms", parts
    )


DRAWINGS = {
    "alphas.svg": alphas,
    "decision.svg": decision,
    "gain.svg": gain,
    "memory.svg": memory,
    "method.svg": method,
}

if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (PICTURES / name).write_text(draw(), encoding="utf-8")
