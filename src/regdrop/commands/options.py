"""The options of the commands that train; those which several share are groups."""

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from regdrop.commands.app import workers_and_threads
from regdrop.experiments.recording.ownership import check_folder_name
from regdrop.experiments.running.cluster import parse_address
from regdrop.tasks import PRESETS, Task
from regdrop.tasks.configure import change_task, find_task

TaskName = Annotated[
    str, typer.Argument(help="A task or one of its presets: see `regdrop tasks`.", metavar="TASK")
]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run of `regdrop train`.")]
Preset = Annotated[str | None, typer.Option(help="A preset of the task; if absent, a small one.")]
Data = Annotated[
    str | None, typer.Option("--data", "--dataset", help="A folder of data, or a hub id.")
]
ModelOption = Annotated[str | None, typer.Option(help="A checkpoint: folder or hub id.")]


def _alpha(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"alpha must be a number or auto, got {text!r}") from None


Alpha = Annotated[
    Any,
    typer.Option(
        parser=_alpha, metavar="NUMBER", help="Weight of the KL, or auto, instead of the preset's."
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of the preset's.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting of the preset: dropout=0.2, training.learning_rate=1e-4, "
        "rdrop.fraction=0.5. Repeat it for several.",
    ),
]
EvaluationSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of what is read or how text is generated: num_beams=4, max_length=64, "
        "train_examples=100. Repeat it for several.",
    ),
]
# NumPy's generators take no larger one.
LAST_SEED = 2**32 - 1
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds.")]
FirstSeed = Annotated[int, typer.Option(min=0, max=LAST_SEED, help="The first of them.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Runs at a time; one a core, or one on a GPU.")
]
ExecutorAddress = Annotated[
    str | None,
    typer.Option(
        "--executor",
        metavar="dask://HOST:PORT",
        help="A Dask cluster whose workers take the runs: see docs/cluster.md.",
    ),
]
Grid = Annotated[str | None, typer.Option(help="Values of what the study varies: 0,1,3.")]
TunedFile = Annotated[
    Path | None,
    typer.Option(help="Settings of the arms that `regdrop tune` chose: its tuned.json."),
]


def output_folder(text: str) -> Path:
    """Return the folder that an --output names, which can be made or is there.

    Nothing is made: processes of one run, or several commands, may name it at once.
    """
    if not text.strip():
        raise typer.BadParameter(f"must be the name of a folder, got {text!r}")
    folder = Path(text)
    try:
        if folder.exists() and not folder.is_dir():
            raise typer.BadParameter(f"must be a folder, got the file {text!r}")
        check_folder_name(folder)
        existing = filter(os.path.lexists, (folder, *folder.parents))
        place = next(existing, folder)
        if not place.is_dir():
            raise NotADirectoryError(f"{place} is no folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f"{place} cannot be written to")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{text!r} cannot be made a folder: {error}") from error
    return folder


def output_option(text: str) -> Any:
    """Return the option of a folder of results."""
    return typer.Option("--output", "-o", parser=output_folder, metavar="DIRECTORY", help=text)


Output = Annotated[Path | None, output_option("Folder of the results; in runs/ if absent.")]


@dataclass(frozen=True)
class TaskOptions:
    """Which preset of a task, and what is changed of it."""

    preset: Preset = None
    data: Data = None
    model: ModelOption = None
    steps: Steps = None
    settings: Settings = None

    def choose(self, task: str, alpha: Any = None) -> Task:
        """Return the task that the options choose.

        Raises:
            ValueError: For a task, preset or setting that there is not, or the name of another
                preset.
        """
        preset = find_task(task, self.preset)
        chosen = change_task(
            preset,
            data=self.data,
            model=self.model,
            alpha=alpha,
            steps=self.steps,
            settings=self.settings or (),
        )
        if chosen.name != preset.name and chosen.name in PRESETS:
            raise ValueError(
                f"--set name={chosen.name} would call {preset.name} by the name of another preset; "
                "choose a name of your own"
            )
        return chosen

    def given(self, alpha: Any = None) -> dict[str, str]:
        """Return the options that choose settings of arms, as typed, by the settings' names."""
        options = {}
        if alpha is not None:
            options["rdrop.alpha"] = f"--alpha {alpha}"
        if self.steps is not None:
            options["training.max_steps"] = f"--steps {self.steps}"
        for setting in self.settings or ():
            options[setting.partition("=")[0].strip()] = f"--set {setting}"
        return options


@dataclass(frozen=True)
class RunsOptions:
    """Over which seeds, and where many runs are computed and kept."""

    seeds: Seeds = 5
    first_seed: FirstSeed = 0
    workers: Workers = None
    executor: ExecutorAddress = None
    output: Output = None

    def seed_range(self) -> range:
        """Return the seeds.

        Raises:
            ValueError: If the last one is too large.
        """
        if self.first_seed + self.seeds - 1 > LAST_SEED:
            raise ValueError(
                f"the last seed must be at most {LAST_SEED}, got --first-seed {self.first_seed} "
                f"and --seeds {self.seeds}"
            )
        return range(self.first_seed, self.first_seed + self.seeds)

    def machine(self, runs: int | None) -> dict[str, Any]:
        """Return the options that say where runs are computed, and how many at a time.

        Args:
            runs: Number of runs; None if it is not known.

        Raises:
            ValueError: For an address that is none, or workers of a cluster.
        """
        if self.executor is not None:
            parse_address(self.executor)
            if self.workers is not None:
                raise ValueError("--workers is of this machine alone: a cluster has its own")
            return {"executor": self.executor}
        count, threads = workers_and_threads(self.workers, runs)
        return {"workers": count, "threads": threads}


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command for Typer, to which each field of a group is an option of its own.

    Args:
        command: Its parameters of a dataclass's type are groups of options.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for parameter in inspect.signature(command).parameters.values():
        own = [parameter]
        if is_dataclass(kind := parameter.annotation) and isinstance(kind, type):
            groups[parameter.name] = kind
            own = list(inspect.signature(kind).parameters.values())
        parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        for name, group in groups.items():
            names = [field.name for field in fields(group)]
            values[name] = group(**{field: values.pop(field) for field in names})
        command(**values)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return flat
