"""The command that chooses settings of arms on the validation split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from regdrop.commands.app import announce, app, console, interruptible, usage_errors
from regdrop.commands.comparisons import StudyArmNames, arms_of
from regdrop.commands.live_display import FinishedRuns
from regdrop.commands.notes import noted
from regdrop.commands.options import (
    FirstSeed,
    Grid,
    RunsOptions,
    Seeds,
    TaskName,
    TaskOptions,
    with_option_groups,
)
from regdrop.commands.tables import print_tuned
from regdrop.experiments.recording.manifest import COMPARISON, TUNING, check_study
from regdrop.experiments.recording.processes import require_one_process
from regdrop.experiments.studies.choices import check_tuned, load_tuned, save_tuned
from regdrop.experiments.studies.earlier import check_earlier
from regdrop.experiments.studies.tuning import NoFiniteFigureError, varied_settings
from regdrop.experiments.studies.tuning import tune as run_tuning
from regdrop.experiments.studies.variations import parse_variation

_TRIALS = 20


@dataclass(frozen=True)
class TuningRuns(RunsOptions):
    """Runs over other seeds than a comparison's."""

    seeds: Seeds = 1
    first_seed: FirstSeed = 100


@app.command()
@with_option_groups
def tune(
    task: TaskName,
    vary: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=...",
            help="What is chosen: rdrop.alpha=1,2,5 tries values, "
            "training.learning_rate=1e-4:1e-2:log searches a range. Repeat it for several.",
        ),
    ],
    options: TaskOptions,
    runs: TuningRuns,
    study: Annotated[str, typer.Option(help="Whose arms: compare, or a study of `sweep`.")] = (
        COMPARISON
    ),
    grid: Grid = None,
    arms: StudyArmNames = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Settings that a search tries for each arm; {_TRIALS} if absent."
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Address of an Optuna storage, to search from several machines."),
    ] = None,
) -> None:
    """Choose settings of every arm on the validation split, by other seeds than a comparison's.

    Values are tried all; ranges are searched by Optuna. `compare` and `sweep` take the result by
    --tuned. Finished runs are kept: repeating the command tries only what is missing.
    """
    with usage_errors():
        require_one_process("tune")
        chosen = options.choose(task)
        tuned_arms = arms_of(study, chosen, grid, arms)
        variations = [parse_variation(text) for text in vary]
        folder = runs.output or Path("runs") / f"{chosen.name}-tuning"
        is_search = any(not variation.values for variation in variations)
        for option, value in (("--trials", trials), ("--storage", storage)):
            if value is not None and not is_search:
                raise ValueError(
                    f"{option} {value} is of a search in ranges, NAME=LOW:HIGH; values of --vary "
                    "are tried all"
                )
        varied_settings(chosen, tuned_arms, variations, arms_of(study, chosen, grid, None))
        seeds = runs.seed_range()
        check_study(folder, TUNING)
        check_earlier(folder, study, chosen, [])
        check_tuned(folder, study, tuned_arms, variations, seeds)
        machine = runs.machine(runs.seeds if is_search else None)
        announce(chosen.name, f"{chosen.description}; results in {folder}")
        with interruptible(), noted(folder, TUNING), console.status("training"):
            try:
                found = run_tuning(
                    chosen,
                    tuned_arms,
                    variations,
                    seeds=seeds,
                    folder=folder,
                    trials=trials or _TRIALS,
                    storage=storage,
                    display=FinishedRuns(console),
                    **machine,
                )
            except NoFiniteFigureError as error:  # what was chosen for the others is not lost
                if any(own.tried for own in error.chosen.values()):
                    save_tuned(folder, study, chosen, error.chosen)
                raise
            # Another command may have begun at the same moment.
            check_earlier(folder, study, chosen, [])
            target = save_tuned(folder, study, chosen, found)
            kept = load_tuned(target, study)
    print_tuned(chosen, {name: kept[name] for name in found}, console)
    console.print(f"Choice: {target}")
