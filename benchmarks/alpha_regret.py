"""How far each rule of alpha is from the best constant, over the tasks that were studied.

    python benchmarks/alpha_regret.py results/*-alpha-schedules
    python benchmarks/alpha_regret.py results/*-alpha-schedules --metric nll --plot gains.png

It reads the records of `regdrop sweep alpha-schedules`. A further folder of the same task, with the
same settings, may be of other runs of that study, or of `regdrop compare`: its baseline and its
constants count as those of the study, for the seeds that the study has. On each task the best
constant of the grid is the one with the best mean validation figure; regret is how much worse an
arm's mean test figure is, in units of the task's seed interval: the root mean square over the
constants of half their 95 % intervals. Below 0 an arm is better than every constant that could have
been chosen. A rule has one setting for all tasks, and so have the constant and the ramp: for each
task the one whose mean validation regret is lowest over the other tasks. Of one task alone, its
own.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from regdrop.experiments.arms import arm_order
from regdrop.experiments.recording.manifest import COMPARISON, read_manifest
from regdrop.experiments.recording.record import RunRecord, load_records
from regdrop.experiments.reporting.cost import run_cost
from regdrop.experiments.reporting.plots import COLOURS, new_figure, save_figure
from regdrop.experiments.reporting.tables import find_metrics, run_selection_metric
from regdrop.experiments.statistics import estimate, paired_difference

_MARKERS = ("o", "s", "^", "D")
BASELINE, CONSTANT, PAPERS = "baseline", "alpha", "alpha-1"
# An arm's name ends in the setting of its family: "stall-16" is of "stall".
_SETTING = re.compile(r"^(?P<family>.+)-(?P<setting>\d+(\.\d+)?)$")


@dataclass(frozen=True)
class TaskRegrets:
    """The arms of one task beside its best constant.

    Attributes:
        task: Name of the task.
        best: The constant with the best mean validation figure.
        unit: The seed interval: what a regret of 1 is, in the test figure.
        seeds: Fewest seeds of an arm.
        validation: Regret of each arm by its validation figure.
        test: The same by its test figure.
        against_one: How much worse each arm's test figure is than alpha 1, and half the 95 %
            interval of that, paired by seeds, in units.
        gain: Each arm's gain over the baseline in the test figure, in times of the best constant's;
            empty without a baseline, or where that constant gains nothing.
        cost: Single-pass steps of each arm, the mean over its runs.
    """

    task: str
    best: str
    unit: float
    seeds: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    against_one: Mapping[str, tuple[float, float]]
    gain: Mapping[str, float]
    cost: Mapping[str, float]


def load_tasks(folders: Iterable[Path]) -> list[list[RunRecord]]:
    """Return the records of every task, in the order of their first folders, which are of studies.

    Raises:
        ValueError: If a further folder of a task is of another study, or has other settings, or
            runs that are there.
    """
    tasks: dict[str, list[RunRecord]] = {}
    studies: dict[str, str] = {}
    for folder in folders:
        records, study = load_records(folder), read_manifest(folder).study
        known = tasks.setdefault(records[0].task, [])
        first = studies.setdefault(records[0].task, study)
        if known:
            if study not in (first, COMPARISON):
                raise ValueError(
                    f"{folder} must hold results of {first!r}, as the first folder of "
                    f"{known[0].task} does, or of {COMPARISON!r}, got {study!r}"
                )
            if study == COMPARISON:
                seeds = {record.seed for record in known}
                named = [one for one in map(_of_a_study, records) if one is not None]
                records = [record for record in named if record.seed in seeds]
            _check_further(folder, records, known)
        known += records
    return list(tasks.values())


def _check_further(folder: Path, records: list[RunRecord], known: list[RunRecord]) -> None:
    settings = [
        {name: value for name, value in one.config.items() if name not in ("rdrop", "data")}
        for one in (known[0], *records)
    ]
    if any(one != settings[0] for one in settings):
        raise ValueError(f"{folder} has other settings than the study of {known[0].task}")
    runs = {(one.arm, one.seed) for one in known}
    if again := sorted({one.arm for one in records if (one.arm, one.seed) in runs}):
        raise ValueError(f"{folder} has runs of {', '.join(again)}, which the study has itself")


def _of_a_study(record: RunRecord) -> RunRecord | None:
    """Return a record of a comparison as a study names it; None for a way that it has not."""
    if record.arm == "rdrop":
        return replace(record, arm=f"{CONSTANT}-{record.config['rdrop']['alpha']:g}")
    return record if record.arm == BASELINE or family_of(record.arm) == CONSTANT else None


def family_of(arm: str) -> str:
    """Return the family of an arm: its name without the setting."""
    match = _SETTING.match(arm)
    return match["family"] if match else arm


def task_regrets(records: Sequence[RunRecord], metric: str | None = None) -> TaskRegrets:
    """Return the regrets of the arms of one task.

    Args:
        records: Its records.
        metric: The figure; None for the one that selects checkpoints.

    Raises:
        ValueError: Without alpha 1 and another constant, with one seed of an arm, or without the
            figure.
    """
    name = metric or run_selection_metric(records[0])
    metrics = find_metrics(records)
    if name not in metrics:
        raise ValueError(f"metric must be one of {', '.join(metrics)}; got {name!r}")
    sign = -1 if metrics[name].greater_is_better else 1
    by_arm: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        by_arm[record.arm].append(record)
    constants = [arm for arm in by_arm if family_of(arm) == CONSTANT]
    if PAPERS not in constants or len(constants) < 2:
        raise ValueError(
            f"{records[0].task} must have {PAPERS} and another constant at least, got {constants}"
        )
    if few := sorted(arm for arm, runs in by_arm.items() if len(runs) < 2):
        raise ValueError(
            f"{records[0].task} must have two seeds of every arm at least, got one of "
            f"{', '.join(few)}"
        )
    # Of both splits the lower is the better.
    test = {arm: {r.seed: sign * r.test[name] for r in runs} for arm, runs in by_arm.items()}
    held_out = {
        arm: estimate([sign * r.validation[name] for r in runs]).mean
        for arm, runs in by_arm.items()
    }
    best = min(constants, key=lambda arm: held_out[arm])
    halves = [estimate(list(test[arm].values())).half_width for arm in constants]
    unit = (sum(half**2 for half in halves) / len(halves)) ** 0.5
    means = {arm: estimate(list(values.values())).mean for arm, values in test.items()}
    against_one = {}
    for arm in test:
        difference = paired_difference(test[arm], test[PAPERS])
        against_one[arm] = (difference.mean / unit, difference.half_width / unit)
    baseline = by_arm[BASELINE][0] if BASELINE in by_arm else None
    gain = {}
    if baseline is not None:
        whole = means[BASELINE] - means[best]
        if whole > 0:
            gain = {arm: (means[BASELINE] - value) / whole for arm, value in means.items()}
    return TaskRegrets(
        task=records[0].task,
        best=best,
        unit=unit,
        seeds=min(len(runs) for runs in by_arm.values()),
        validation={arm: (value - held_out[best]) / unit for arm, value in held_out.items()},
        test={arm: (value - means[best]) / unit for arm, value in means.items()},
        against_one=against_one,
        gain=gain,
        cost={arm: mean([run_cost(run, baseline) for run in runs]) for arm, runs in by_arm.items()},
    )


def left_out_choices(regrets: Sequence[TaskRegrets]) -> dict[str, dict[str, str]]:
    """Return the arm of every family that the other tasks choose for each task.

    Families that a task lacks are left out, and so are their arms that not all tasks have.

    Returns:
        Arms by family and task.
    """
    shared = set.intersection(*(set(one.test) for one in regrets))
    families: dict[str, list[str]] = defaultdict(list)
    for arm in sorted(shared, key=arm_order):
        families[family_of(arm)].append(arm)
    choices: dict[str, dict[str, str]] = {}
    for family, arms in families.items():
        choices[family] = {}
        for own in regrets:
            others = [one for one in regrets if one is not own] or [own]
            choices[family][own.task] = min(
                arms, key=lambda arm: mean([one.validation[arm] for one in others])
            )
    return choices


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Verdict:
    """A family over all tasks, its setting chosen by the others.

    Attributes:
        family: Its name.
        regrets: Test regret by task.
        worse_than_one: Tasks on which it is worse than alpha 1 beyond the paired interval.
        cost: Mean cost.
    """

    family: str
    regrets: Mapping[str, float]
    worse_than_one: tuple[str, ...]
    cost: float

    @property
    def mean(self) -> float:
        """Mean regret over the tasks."""
        return mean(list(self.regrets.values()))

    @property
    def wins(self) -> int:
        """Tasks on which it is better than the best constant."""
        return sum(regret < 0 for regret in self.regrets.values())

    def is_accepted(self, constant: "Verdict") -> bool:
        """Return whether it may be "auto": at most half of the constant's regret, safe everywhere.

        A constant that the other tasks choose can be better than the best by validation: then the
        rule has to be as good.

        Args:
            constant: The one constant for all tasks.
        """
        limit = min(constant.mean, constant.mean / 2)
        return self.mean <= limit and not self.worse_than_one


def verdicts(regrets: Sequence[TaskRegrets]) -> list[Verdict]:
    """Return every family over all tasks, the one with the lowest mean regret first."""
    found = []
    for family, arms in left_out_choices(regrets).items():
        pairs = [(one, arms[one.task]) for one in regrets]
        worse = []
        for one, arm in pairs:
            difference, half = one.against_one[arm]
            if difference > half:
                worse.append(one.task)
        found.append(
            Verdict(
                family,
                {one.task: one.test[arm] for one, arm in pairs},
                tuple(worse),
                mean([one.cost[arm] for one, arm in pairs]),
            )
        )
    return sorted(found, key=lambda verdict: verdict.mean)


def arms_table(regrets: Sequence[TaskRegrets]) -> list[list[str]]:
    """Return the regret of every arm on every task, and its mean, as rows of text."""
    arms = sorted({arm for one in regrets for arm in one.test}, key=arm_order)
    rows = [["arm", *(one.task for one in regrets), "mean"]]
    for arm in arms:
        own = [one.test.get(arm) for one in regrets]
        known = [value for value in own if value is not None]
        rows.append([arm, *map(shown, own), shown(mean(known))])
    rows.append(["best constant", *(one.best for one in regrets), ""])
    rows.append(["unit, in the test figure", *(f"{one.unit:.3g}" for one in regrets), ""])
    return rows


def gains_table(regrets: Sequence[TaskRegrets]) -> list[list[str]]:
    """Return the part of the best constant's gain that every arm has, and its cost, as text."""
    rows = [["arm", *(one.task for one in regrets), "cost"]]
    for arm in sorted({arm for one in regrets for arm in one.gain}, key=arm_order):
        own = [one.gain.get(arm) for one in regrets]
        cost = mean([one.cost[arm] for one in regrets if arm in one.cost])
        cells = ["" if value is None else f"{value:.0%}".replace("-", "−") for value in own]
        rows.append([arm, *cells, f"{cost:.2f}"])
    return rows


def choices_table(regrets: Sequence[TaskRegrets]) -> list[list[str]]:
    """Return every family, its setting chosen by the other tasks, as rows of text."""
    choices, found = left_out_choices(regrets), verdicts(regrets)
    constant = next(verdict for verdict in found if verdict.family == CONSTANT)
    tasks = [one.task for one in regrets]
    rows = [["rule", *tasks, "mean", "better on", "worse than alpha 1 on", "cost", "accepted"]]
    for verdict in found:
        cells = []
        for task in tasks:
            arm = choices[verdict.family][task]
            setting = arm.removeprefix(verdict.family).removeprefix("-")
            cells.append(shown(verdict.regrets[task]) + (f" ({setting})" if setting else ""))
        is_constant = verdict is constant
        rows.append(
            [
                verdict.family,
                *cells,
                shown(verdict.mean),
                f"{verdict.wins} of {len(tasks)}",
                ", ".join(verdict.worse_than_one) or "none",
                f"{verdict.cost:.2f}",
                "" if is_constant else "yes" if verdict.is_accepted(constant) else "no",
            ]
        )
    return rows


def draw_gains(regrets: Sequence[TaskRegrets], path: Path) -> None:
    """Draw the part of the best constant's gain against its cost, a panel a task that has one."""
    drawn = [one for one in regrets if one.gain]
    if not drawn:
        raise ValueError("plot needs a task with a baseline that its best constant improves on")
    figure, panels = new_figure(len(drawn))
    families = [*dict.fromkeys(family_of(arm) for one in drawn for arm in sorted(one.gain))]
    families.sort(key=arm_order)
    for panel, one in zip(panels, drawn, strict=True):
        for i, family in enumerate(families):
            arms = [arm for arm in one.gain if family_of(arm) == family]
            panel.plot(
                [one.cost[arm] for arm in arms],
                [100 * one.gain[arm] for arm in arms],
                marker=_MARKERS[i // len(COLOURS)],
                color=COLOURS[i % len(COLOURS)],
                linestyle="",
                label=family,
            )
        panel.axhline(100, color="#999999", linewidth=1)
        panel.set(
            xlabel="cost", ylabel="part of the gain, %", title=f"{one.task}: {one.best} = 100"
        )
        panel.grid(alpha=0.3)
    save_figure(figure, path)


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}".replace("-", "−")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *rest = rows
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rest)]) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("folders", type=Path, nargs="+", help="of `sweep alpha-schedules`")
    options.add_argument("--metric", default=None, help="a figure that all tasks have, as nll")
    options.add_argument("--output", type=Path, default=None, help="a Markdown file")
    options.add_argument("--plot", type=Path, default=None, help="a PNG file: gain against cost")
    arguments = options.parse_args()
    regrets = [task_regrets(records, arguments.metric) for records in load_tasks(arguments.folders)]
    titles = (
        "test regret of every arm",
        "settings chosen by the other tasks",
        "gain over the baseline, in times of the best constant's",
    )
    tables = [arms_table(regrets), choices_table(regrets), gains_table(regrets)]
    console = Console()
    for (header, *rows), title in zip(tables, titles, strict=True):
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if arguments.output is not None:
        arguments.output.write_text("\n".join(map(markdown, tables)), encoding="utf-8")
    if arguments.plot is not None:
        draw_gains(regrets, arguments.plot)


if __name__ == "__main__":
    main()
