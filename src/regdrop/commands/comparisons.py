"""Commands of many runs: the five arms, the studies, and their reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from regdrop.commands.app import announce, app, console, interruptible, usage_errors
from regdrop.commands.live_display import LiveDisplay
from regdrop.commands.notes import noted
from regdrop.commands.options import (
    Alpha,
    Grid,
    RunsOptions,
    TaskName,
    TaskOptions,
    TunedFile,
    with_option_groups,
)
from regdrop.commands.tables import print_table
from regdrop.experiments import load_records, run_arms, write_report
from regdrop.experiments.arms import Arm, choose_arms, compared_arms
from regdrop.experiments.recording.manifest import COMPARISON, check_study
from regdrop.experiments.recording.processes import require_one_process
from regdrop.experiments.recording.record import merge_records
from regdrop.experiments.reporting.verdict import verdict
from regdrop.experiments.studies.choices import apply_tuned, differing_choice, load_tuned
from regdrop.experiments.studies.definitions import STUDIES, study_arms
from regdrop.experiments.studies.earlier import check_earlier
from regdrop.tasks import Task

# Studies whose arms have an alpha each, whatever the task's.
_ALPHA_STUDIES = ("alpha", "alpha-schedules")

FiveArmNames = Annotated[
    str | None, typer.Option("--arms", help="Arms to train, by commas; the five if absent.")
]
StudyArmNames = Annotated[
    str | None, typer.Option("--arms", help="Arms of the study to train, by commas; all if absent.")
]


@app.command()
@with_option_groups
def compare(
    task: TaskName,
    options: TaskOptions,
    runs: RunsOptions,
    alpha: Alpha = None,
    arms: FiveArmNames = None,
    tuned: TunedFile = None,
) -> None:
    """Train the baseline, its equal-compute and two-pass controls, and R-Drop; print the result.

    Finished runs are kept: repeating the command trains only what is missing.
    """
    with usage_errors():
        require_one_process("compare")
        chosen = options.choose(task, alpha)
        compared = arms_of(COMPARISON, chosen, None, arms)
        folder = runs.output or Path("runs") / chosen.name
        if tuned is not None:
            compared = _tuned(compared, COMPARISON, tuned, options.given(alpha))
            _say_choice(tuned, COMPARISON, chosen, compared, runs)
        _train_and_report(COMPARISON, chosen, compared, runs, folder, tuned)


@app.command()
@with_option_groups
def sweep(
    study: Annotated[str, typer.Argument(help=f"{', '.join(STUDIES)}.", metavar="STUDY")],
    task: Annotated[str, typer.Option(help="A task or a preset: see `regdrop tasks`.")],
    options: TaskOptions,
    runs: RunsOptions,
    alpha: Alpha = None,
    grid: Grid = None,
    arms: StudyArmNames = None,
    tuned: TunedFile = None,
) -> None:
    """Run one of the paper's studies, or that of cost, over seeds; draw what it asks.

    Finished runs are kept: repeating the command, also with a longer grid or more arms, trains only
    what is missing.
    """
    with usage_errors():
        require_one_process("sweep")
        chosen = options.choose(task, alpha)
        compared = arms_of(study, chosen, grid, arms)
        known = STUDIES.get(study)
        if study in _ALPHA_STUDIES and (option := options.given(alpha).get("rdrop.alpha")):
            raise ValueError(
                f"{option} has no effect in the study {study!r}, which chooses alpha itself: "
                "leave it out, or choose by --grid"
            )
        if tuned is not None:
            compared = _tuned(compared, study, tuned, options.given(alpha))
        announce(study, "is now `regdrop compare`" if known is None else known.question)
        folder = runs.output or Path("runs") / f"{chosen.name}-{study}"
        if tuned is not None:
            _say_choice(tuned, study, chosen, compared, runs)
        _train_and_report(study, chosen, compared, runs, folder, tuned)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison or a study.")],
) -> None:
    """Draw the tables and the plots of a comparison or a study again, from its records.

    What is long in the records of an older version is moved into one compressed file.
    """
    with usage_errors(FileNotFoundError):
        merge_records(folder)
        _report(folder)


def arms_of(study: str, task: Task, grid: str | None, names: str | None) -> list[Arm]:
    """Return the arms of a comparison or a study, or those of some names.

    Raises:
        ValueError: For a study, a grid or an arm that there is not.
    """
    chosen = None if names is None else [name.strip() for name in names.split(",")]
    if chosen is not None and not all(chosen):
        raise ValueError(f"--arms must be names of arms by commas, got {names!r}")
    if study == COMPARISON:
        if grid is not None:
            raise ValueError(f"--grid needs a study that has one, got --study {COMPARISON}")
        return compared_arms(task, chosen)
    known = {arm.name: arm for arm in study_arms(study, task, _numbers(grid))}
    return choose_arms(known, chosen)


def _train_and_report(
    study: str,
    task: Task,
    arms: Sequence[Arm],
    runs: RunsOptions,
    folder: Path,
    tuned: Path | None,
) -> None:
    seeds, machine = runs.seed_range(), runs.machine(len(arms) * runs.seeds)
    check_study(folder, study)
    choices = {} if tuned is None else load_tuned(tuned, study)
    chosen = {name for own in choices.values() for name in own.settings}
    names = [arm.name for arm in arms]
    check_earlier(folder, study, task, names, chosen)
    scope = f"{len(arms)} arms, {len(seeds)} seeds, results in {folder}"
    announce(task.name, f"{task.description}; {scope}")
    with interruptible():
        with noted(folder, study), LiveDisplay(arms, seeds, console) as display:
            run_arms(task, arms, seeds=seeds, folder=folder, display=display, **machine)
        # Another command may have begun at the same moment.
        check_earlier(folder, study, task, names, chosen)
        _report(folder)


def _tuned(arms: Sequence[Arm], study: str, path: Path, given: Mapping[str, str]) -> list[Arm]:
    """Return arms with what was chosen for them.

    Raises:
        ValueError: Where an option chooses one of the same settings.
    """
    chosen = load_tuned(path, study)
    for arm in arms:
        for name in chosen[arm.name].settings if arm.name in chosen else ():
            if name in given:
                raise ValueError(
                    f"{given[name]} and --tuned {path} both choose {name} (of {arm.name}); leave "
                    "out one of them"
                )
    return apply_tuned(arms, study, path)


def _say_choice(path: Path, study: str, task: Task, arms: Sequence[Arm], runs: RunsOptions) -> None:
    """Say what settings of arms were chosen for, where that is not what they are used for."""
    names = [arm.name for arm in arms]
    for line in differing_choice(path, study, task, names, runs.seed_range()):
        console.print(line, style="yellow", highlight=False)


def _report(folder: Path) -> None:
    target = write_report(folder)
    records = load_records(folder)
    print_table(records, console)
    console.print(f"Report and plots: {target}")
    if sentence := verdict(records):
        console.print(sentence, style="bold", highlight=False)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--grid must be numbers by commas, got {text!r}") from None
