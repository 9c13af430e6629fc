"""What data without labels add to R-Drop where labels are few: parts of SST-2, and of digits.

    python benchmarks/bench_unlabelled.py --data data/sst2_sentences    # about 45 core-minutes
    python benchmarks/bench_unlabelled.py --study digits                # a few
    python benchmarks/bench_unlabelled.py --quick                       # to see that it runs

Every seed draws the labelled examples of a run, and others whose labels are hidden. All ways see
the same labelled batches. Without R-Drop an example without a label has no loss at all, so that
there is no such way. Alpha and the number of steps are chosen for each way and number of labels on
another seed, by the held-out figure that the task selects by; the test split is read once, at the
end of a run. Every finished run is a file, and is not run again.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.nn import functional as F
from transformers import default_data_collator

import recording
from regdrop import RDropConfig, rdrop_step
from regdrop.experiments.recording.environment import describe_hardware, library_versions
from regdrop.experiments.recording.record import write_json
from regdrop.experiments.reporting.plots import COLOURS, new_figure, save_figure
from regdrop.experiments.running.progress import quiet_libraries
from regdrop.experiments.statistics import Estimate, estimate, paired_difference
from regdrop.tasks import PreparedTask
from regdrop.tasks.configure import change_task, find_task

UNLABELLED = -1
BASELINE, RDROP, BOTH = "labels", "labels, R-Drop", "labels and unlabelled, R-Drop"
WAYS = (BASELINE, RDROP, BOTH)
TUNING_SEED = 100
WARM_UP = 12  # steps; the rate is constant from there, so that a shorter run is the longer's start
OPTIMISATION = ("learning_rate", "weight_decay", "max_grad_norm", "mixed_precision")
LOGGED = 25  # steps over which training figures are averaged


@dataclass(frozen=True)
class Study:
    """What is trained, and how much of it.

    Attributes:
        preset: Name of the task; its rate, weight decay and clipping are used.
        changes: Changed settings of the task.
        labels: Numbers of labelled examples.
        pool: Examples without a label, as many as there are at most.
        labelled_batch: Labelled examples of a batch.
        unlabelled_batch: Others of a batch, in the way that has them.
        alphas: Among which alpha is chosen.
        steps: Numbers of steps among which theirs is chosen.
        seeds: Reported runs.
    """

    preset: str
    changes: Mapping[str, Any]
    labels: tuple[int, ...]
    pool: int
    labelled_batch: int
    unlabelled_batch: int
    alphas: tuple[float, ...]
    steps: tuple[int, ...]
    seeds: int = 5


STUDIES = {
    "sst2": Study(
        preset="minilm-sst2-part",
        # 32 tokens cut one sentence in five, and keep batches of mixed lengths small.
        changes={"train_examples": None, "max_length": 32},
        labels=(100, 500),
        pool=5_000,
        labelled_batch=8,
        unlabelled_batch=16,
        alphas=(1.0, 4.0),
        steps=(50, 100, 150),
    ),
    "digits": Study(
        preset="digits",
        changes={},
        labels=(30, 100),
        pool=200,
        labelled_batch=16,
        unlabelled_batch=48,
        alphas=(0.3, 1.0, 3.0),
        steps=(100, 200, 300),
    ),
}


@dataclass(frozen=True)
class Setting:
    """One run: what its record is named after, and begins with."""

    labels: int
    way: str
    alpha: float
    steps: int
    seed: int

    @property
    def path(self) -> str:
        """The file of its record in the folder of results."""
        stage = "tuning" if self.seed == TUNING_SEED else "runs"
        slug = {BASELINE: "baseline", RDROP: "rdrop", BOTH: "rdrop-unlabelled"}[self.way]
        return f"{stage}/{self.labels}-{slug}-alpha{self.alpha:g}-seed{self.seed}.json"


def draw_batches(size: int, count: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Draw batches of `count` out of `size` without end, all once before one comes again."""
    waiting: list[int] = []
    while True:
        while len(waiting) < count:
            waiting += torch.randperm(size, generator=generator).tolist()
        yield waiting[:count]
        waiting = waiting[count:]


def collate(prepared: PreparedTask, rows: list[Any]) -> dict[str, Any]:
    """Return a batch; of images the library's default one."""
    return dict((prepared.data_collator or default_data_collator)(rows))


def training_batches(prepared: PreparedTask, setting: Setting, study: Study) -> Iterator[Any]:
    """Draw the batches of a run; the labelled part is the same for all ways of a seed."""
    order = torch.Generator().manual_seed(setting.seed)
    rows = prepared.splits["train"]
    chosen = torch.randperm(len(rows), generator=order).tolist()
    labelled = [rows[i] for i in chosen[: setting.labels]]
    # One pool for all numbers of labels of a seed, without any that one of them labels.
    others = chosen[max(study.labels) :][: study.pool]
    # A label is a tensor or a number.
    unlabelled = [{**rows[i], "labels": rows[i]["labels"] * 0 + UNLABELLED} for i in others]
    count = study.unlabelled_batch if setting.way == BOTH else 0
    parts = zip(
        draw_batches(len(labelled), study.labelled_batch, order),
        draw_batches(len(unlabelled), count, torch.Generator().manual_seed(setting.seed)),
        strict=True,
    )
    for first, second in parts:
        batch = [labelled[i] for i in first] + [unlabelled[i] for i in second]
        yield collate(prepared, batch)


def evaluate(
    model: nn.Module, prepared: PreparedTask, split: str, precision: str | None
) -> dict[str, float]:
    """Return accuracy and NLL of a split, in one pass without dropout."""
    model.eval()
    examples = prepared.splits[split]
    rows = [examples[i] for i in range(len(examples))]
    rows.sort(key=lambda row: len(row.get("input_ids", ())))  # of about one length: less padding
    correct, nll = 0, 0.0
    for start in range(0, len(rows), 64):
        batch = collate(prepared, rows[start : start + 64])
        target = batch.pop("labels")
        with torch.no_grad(), autocast(precision):
            logits = model(**batch).logits.float()
        correct += int((logits.argmax(-1) == target).sum())
        nll += float(F.cross_entropy(logits, target, reduction="sum"))
    return {"accuracy": correct / len(rows), "nll": nll / len(rows)}


def autocast(precision: str | None) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def train(
    prepared: PreparedTask, setting: Setting, study: Study, optimisation: Mapping[str, Any]
) -> dict[str, Any]:
    """Train as set and return the figures; the held-out ones too where they choose a setting."""
    torch.manual_seed(setting.seed)
    model = prepared.build_model()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optimisation["learning_rate"],
        weight_decay=optimisation["weight_decay"],
        fused=True,
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARM_UP))
    config = RDropConfig(
        alpha=setting.alpha,
        num_passes=1 if setting.way == BASELINE else 2,
        unlabelled_index=UNLABELLED,
    )
    precision = optimisation["mixed_precision"]
    history: list[dict[str, float]] = []
    held_out: list[dict[str, float]] = []
    seconds, mark = 0.0, time.perf_counter()
    for step, batch in enumerate(islice(training_batches(prepared, setting, study), setting.steps)):
        model.train()
        target = batch.pop("labels")
        with autocast(precision):
            loss, nll, kl = rdrop_step(
                lambda x: model(**x).logits, batch, target, config=config, step=step
            )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optimisation["max_grad_norm"])
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        history.append({"nll": float(nll), "kl": float(kl)})
        if setting.seed == TUNING_SEED and step + 1 in study.steps:
            seconds += time.perf_counter() - mark
            held_out.append(
                {"steps": step + 1, **evaluate(model, prepared, "validation", precision)}
            )
            mark = time.perf_counter()
    seconds += time.perf_counter() - mark
    found: dict[str, Any] = {"seconds": seconds, "training": list(averaged(history))}
    if held_out:
        return {**found, "held_out": held_out}
    return {**found, "test": evaluate(model, prepared, "test", precision)}


def averaged(history: Sequence[Mapping[str, float]]) -> Iterator[dict[str, float]]:
    """Return the means of training figures over so many steps each."""
    for start in range(0, len(history), LOGGED):
        part = history[start : start + LOGGED]
        means = {name: sum(entry[name] for entry in part) / len(part) for name in part[0]}
        yield {"step": start + len(part), **means}


def run(
    prepared: PreparedTask, study: Study, folder: Path, config: dict[str, Any], setting: Setting
) -> dict[str, Any]:
    """Return the record of a run; it is run if there is none.

    Raises:
        ValueError: If there is one of other settings.
    """
    path = folder / setting.path
    plain = json.loads(json.dumps({**asdict(setting), "config": config}))
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {name: record.get(name) for name in plain} != plain:
            raise ValueError(f"{path} is of a run with other settings: use another --output")
        return record
    record = {
        **plain,
        **train(prepared, setting, study, config),
        "versions": library_versions(),
        "hardware": describe_hardware(),
    }
    write_json(path, record)
    return record


def alphas_of(way: str, study: Study) -> tuple[float, ...]:
    return (0.0,) if way == BASELINE else study.alphas


def choose(records: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, int]:
    """Return the alpha and the number of steps with the best held-out figure, then NLL."""
    trials = [
        (-entry["accuracy"] if metric == "accuracy" else 0, entry["nll"], record, entry)
        for record in records
        for entry in record["held_out"]
    ]
    *_, record, entry = min(trials, key=lambda trial: trial[:2])
    return record["alpha"], entry["steps"]


Figures = dict[tuple[int, str], dict[int, dict[str, Any]]]


def compare(
    labels: int,
    record_of: Callable[[Setting], dict[str, Any]],
    study: Study,
    metric: str,
    console: Console,
) -> Figures:
    """Choose the settings of every way with so many labels; return its records by seed."""
    tuning = [
        Setting(labels, way, alpha, max(study.steps), TUNING_SEED)
        for way in WAYS
        for alpha in alphas_of(way, study)
    ]
    trials = defaultdict(list)
    for setting in track(tuning, f"{labels} labels: choosing", console=console):
        trials[setting.way].append(record_of(setting))
        console.print(f"done: {setting.path}")
    chosen = {way: choose(records, metric) for way, records in trials.items()}
    settings = [
        Setting(labels, way, *chosen[way], seed) for seed in range(study.seeds) for way in WAYS
    ]
    figures: Figures = {(labels, way): {} for way in WAYS}
    for setting in track(settings, f"{labels} labels: training", console=console):
        figures[labels, setting.way][setting.seed] = record_of(setting)
        console.print(f"done: {setting.path}")
    return figures


def markdown(figures: Figures) -> str:
    """Return the table: means, and the paired differences to labels alone."""
    lines = [
        "| labels | trained on | alpha | steps | test accuracy (%) | test NLL |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (labels, way), runs in figures.items():
        any_run = next(iter(runs.values()))
        alpha = "" if way == BASELINE else f"{any_run['alpha']:g}"
        cells = []
        for metric, factor, digits in (("accuracy", 100, 2), ("nll", 1, 3)):
            values = {seed: factor * own["test"][metric] for seed, own in runs.items()}
            cell = shown(estimate(list(values.values())), digits)
            for reference in {BASELINE: (), RDROP: (BASELINE,), BOTH: (BASELINE, RDROP)}[way]:
                others = figures[labels, reference]
                base = {seed: factor * own["test"][metric] for seed, own in others.items()}
                cell += f" ({shown(paired_difference(values, base), digits, sign=True)})"
            cells.append(cell)
        lines.append(
            f"| {labels} | {way} | {alpha} | {any_run['steps']} | {cells[0]} | {cells[1]} |"
        )
    return "\n".join(lines) + "\n"


def shown(value: Estimate, digits: int, *, sign: bool = False) -> str:
    mean = f"{value.mean:{'+' if sign else ''}.{digits}f}".replace("-", "−")
    return f"{mean} ± {value.half_width:.{digits}f}"


def draw(figures: Figures, path: Path) -> None:
    """Draw every run, the runs of a seed joined, and the mean of every way."""
    figure, panels = new_figure(2)
    labels = sorted({labels for labels, _ in figures})
    for panel, (metric, title, factor) in zip(
        panels, (("accuracy", "test accuracy (%)", 100), ("nll", "test NLL", 1)), strict=True
    ):
        for number, count in enumerate(labels):
            places = [number + (i - 1) / 4 for i in range(len(WAYS))]
            runs = [figures[count, way] for way in WAYS]
            for seed in sorted(set.intersection(*(set(own) for own in runs))):
                values = [factor * own[seed]["test"][metric] for own in runs]
                panel.plot(places, values, color=COLOURS[1], linewidth=0.8, zorder=1)
            for place, way, colour, own in zip(places, WAYS, COLOURS[2:], runs, strict=False):
                values = [factor * one["test"][metric] for one in own.values()]
                label = way if number == 0 else None
                panel.scatter([place] * len(values), values, color=colour, s=14, label=label)
                mean = sum(values) / len(values)
                panel.plot([place - 0.08, place + 0.08], [mean, mean], color=colour, linewidth=3)
        panel.set_xticks(range(len(labels)), [f"{count} labels" for count in labels])
        panel.set_title(title)
        panel.grid(alpha=0.3, axis="y")
    save_figure(figure, path)


def main() -> None:
    options = recording.parser(__doc__)
    options.add_argument("--study", default="sst2", choices=STUDIES)
    options.add_argument("--data", default=None, help="folder or hub id of SST-2")
    arguments = recording.parse(options)
    study = STUDIES["digits" if arguments.quick else arguments.study]
    if arguments.quick:
        study = replace(study, labels=(30,), alphas=(1.0,), steps=(10, 20), seeds=2)
    if arguments.output == options.get_default("output"):
        folder = recording.ROOT / "results" / f"unlabelled-{arguments.study}"
        arguments.output = folder / "runs.json"
    folder = arguments.output.parent
    console = Console()
    quiet_libraries()
    task: Any = change_task(find_task(study.preset), data=arguments.data)
    task = replace(task, **study.changes)
    config = {
        "task": task.name,
        "model": task.model,
        "max_length": study.changes.get("max_length"),
        **{name: getattr(task.training, name) for name in OPTIMISATION},
        "warm_up": WARM_UP,
        # More seeds or alphas change no run that is finished.
        **{
            name: getattr(study, name)
            for name in ("labels", "pool", "labelled_batch", "unlabelled_batch", "steps")
        },
    }
    record_of = partial(run, task.prepare(), study, folder, config)
    figures: Figures = {}
    for labels in study.labels:
        figures |= compare(labels, record_of, study, task.selection_metric, console)
    rows: list[recording.Row] = [
        {
            **{name: record[name] for name in ("labels", "way", "steps", "seed", "seconds")},
            "alpha": record["alpha"] or None,
            **record["test"],
        }
        for runs in figures.values()
        for record in runs.values()
    ]
    columns = {name: name for name in rows[0]}
    recording.show(rows, columns, task.name, console)
    table = markdown(figures)
    (folder / "table.md").write_text(table, encoding="utf-8")
    console.print(table)
    draw(figures, folder / "unlabelled.png")
    recording.write(rows, arguments, console, alphas=study.alphas, **config)


if __name__ == "__main__":
    main()
