"""Commands about models and about other implementations."""

import math
import re
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import nn

from regdrop.alpha_conventions import CONVENTIONS
from regdrop.alpha_conventions import convert_alpha as convert
from regdrop.commands.app import app, console, usage_errors
from regdrop.commands.environment import environment_lines
from regdrop.commands.loading import load_model, made_up_batches
from regdrop.config import RDropConfig
from regdrop.diagnostics import dropout_report
from regdrop.passes import find_dropout
from regdrop.prefix_search import suggest_prefix
from regdrop.tasks.configure import parse_value

# Between two options; one that is followed by the end of a list is inside of it.
_COMMA = re.compile(r",(?![^\[]*\])")


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A saved model's folder, a hub id, a name of timm, or module:callable."
        ),
    ] = None,
    options: Annotated[
        str, typer.Option("--rdrop", help="R-Drop's options: alpha=1,backward_passes=1,...")
    ] = "",
    environment: Annotated[
        bool,
        typer.Option(
            "--environment",
            help="Print versions, devices, and which kernel impl='auto' takes and why.",
        ),
    ] = False,
) -> None:
    """Show a model's sources of dropout, the cost of a step, and what to change."""
    if environment:
        for line in environment_lines():
            console.print(line, highlight=False, soft_wrap=True)
    if model is not None:
        _examine(model, options)
    elif not environment:
        raise typer.BadParameter("give a MODEL, or --environment")


def _examine(model: str, options: str) -> None:
    """Print what `doctor` finds in a model; end with 1 where no dropout is active."""
    with usage_errors(TypeError, OSError):
        config = _parse_rdrop(options)
        try:
            loaded = load_model(model).train()
        except SystemExit as error:
            raise ValueError(f"MODEL {model!r} must return a model, and it ends Python") from error
        sources, report = find_dropout(loaded), dropout_report(loaded, config)
    table = Table(title=f"{type(loaded).__name__}: sources of dropout")
    table.add_column("source", overflow="fold")  # names are copied: never cut
    table.add_column("kind")
    table.add_column("rate")
    for source in sources:
        table.add_row(source.name or "(the model)", source.kind, f"{source.rate:g}")
    console.print(table)
    for line in report:
        console.print(f"- {line}")
    if not any(source.active for source in sources):
        raise typer.Exit(1)
    console.print(f"- {_prefix_line(loaded)}")


@app.command(name="convert-alpha")
def convert_alpha(
    value: Annotated[float, typer.Argument(help="The coefficient in the other implementation.")],
    convention: Annotated[
        str, typer.Option("--from", help=f"Whose it is: {', '.join(CONVENTIONS)}.")
    ],
    batch_size: Annotated[
        int | None, typer.Option(help="Samples of its micro-batch, before they are doubled.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Target tokens of its micro-batch, for token tasks.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Number of classes or labels, or size of the vocabulary.")
    ] = None,
) -> None:
    """Convert another implementation's KL coefficient to the paper's alpha, which is ours."""
    with usage_errors():
        if not 0 <= value < math.inf:
            raise ValueError(f"VALUE must be finite and at least 0, got {value}")
        alpha = convert(
            value, convention, batch_size=batch_size, tokens=tokens, num_classes=num_classes
        )
    found = CONVENTIONS[convention]
    for line in (found.loss, found.layout, found.note):
        if line is not None:
            console.print(line, style="dim", highlight=False, markup=False)
    console.print(f"alpha = {alpha:g}")


def _prefix_line(model: nn.Module) -> str:
    """Return which part of a model stacked passes could compute once."""
    batches = made_up_batches(model)
    if not batches:
        return (
            "What it takes is not known here: give some batches to "
            "regdrop.prefix_search.suggest_prefix to learn what could be computed once."
        )
    try:
        suggestion = suggest_prefix(model, batches)
    except Exception as error:  # whatever a model says to a batch that was made up
        return f"A made-up batch could not show what could be computed once: {error}"
    if suggestion is None:
        return "Nothing worth it before the first dropout could be computed once."
    return (
        f"share_prefix(model, until='{suggestion.until}') computes "
        f"{int(100 * suggestion.share)} % of the forward once."
    )


def _parse_rdrop(text: str) -> RDropConfig:
    """Return the options of "name=value,..." with JSON values."""
    options: dict[str, Any] = {}
    for part in filter(None, _COMMA.split(text)):
        name, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"--rdrop must be name=value,..., got {part!r}")
        options[name.strip()] = parse_value(value)
    return RDropConfig.from_dict(options)
