"""The training loss of a deep Transformer from two initialisations: the library's, and fairseq's.

    python benchmarks/bench_initialisation.py --data data/multi30k
    python benchmarks/bench_initialisation.py --quick    # on made-up sentences, to see that it runs

A preset that trains from scratch is made deep and narrow and trained as a baseline, without
evaluations. "normal" draws every weight from one normal distribution, of the deviation that the
presets had before; "fairseq" is `regdrop.tasks.common.initialisation`.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

import recording
from regdrop.experiments import build_arms
from regdrop.experiments.reporting.plots import COLOURS, new_figure, save_figure
from regdrop.experiments.running.building import build_trainer
from regdrop.experiments.running.progress import quiet_libraries
from regdrop.tasks import Task
from regdrop.tasks.configure import change_task, find_task

INITIALISATIONS = ("normal", "fairseq")


def deep(task: Task, layers: int, width: int) -> Task:
    """Return a task with a model of some depth and width; other settings are the preset's."""
    sizes = {"layers": layers, "d_model": width, "ffn_dim": 4 * width, "attention_heads": 4}
    config = {
        name: next((size for end, size in sizes.items() if name.endswith(end)), value)
        for name, value in task.model_config.items()  # type: ignore[attr-defined]
    }
    return replace(task, model_config=config)  # type: ignore[type-var]


def with_normal_weights(task: Any) -> Task:
    """Return a task whose weights are normal ones, as wide as they were before."""
    is_bart = task.model_config.get("model_type") == "bart"
    std = 0.02 if is_bart else task.model_config["d_model"] ** -0.5
    return replace(task, model_config={**task.model_config, "init_std": std})


def losses(task: Task, seed: int, folder: Path) -> list[tuple[int, float]]:
    """Train and return the steps that were logged and the NLL a token since the one before."""
    arm = build_arms(task)["baseline"]
    set_seed(seed)
    prepared = task.prepare(folder / "vocabulary")
    set_seed(seed)
    model = prepared.build_model()
    splits = prepared.splits
    trainer: Any = build_trainer(
        task,
        arm,
        seed,
        folder,
        prepared,
        model,
        train=splits["train"],
        validation=splits["validation"],
    )
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    trainer.train()
    return [(entry["step"], entry["nll"]) for entry in trainer.state.log_history if "nll" in entry]


def made_up_sentences(folder: Path) -> Path:
    """Write pairs of sentences, the second the first read backwards."""
    folder.mkdir()
    lines = []
    for i in range(300):
        words = [f"w{i * k % 17}" for k in range(1, 7)]
        lines.append(f"{' '.join(words)},{' '.join(reversed(words))}")
    (folder / "train.csv").write_text("de,en\n" + "\n".join(lines), encoding="utf-8")
    return folder


def draw(rows: Sequence[Mapping[str, Any]], title: str, warmup: int, path: Path) -> None:
    """Draw the loss by step, a line a run: all of it, and after the warm-up."""
    figure, axes = new_figure(2)
    for axis, first, part in zip(axes, (0, warmup), ("", ", after the warm-up"), strict=False):
        for colour, variant in zip(COLOURS[2:], INITIALISATIONS, strict=False):
            own = [row for row in rows if row["variant"] == variant and row["step"] >= first]
            for number, seed in enumerate(dict.fromkeys(row["seed"] for row in own)):
                points = [(row["step"], row["nll"]) for row in own if row["seed"] == seed]
                label = variant if number == 0 else None
                axis.plot(*zip(*points, strict=True), color=colour, label=label)
        axis.set(xlabel="optimiser step", ylabel="training NLL a token", title=title + part)
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    options = recording.parser(__doc__)
    options.add_argument("--task", default="multi30k-de-en")
    options.add_argument("--data", default=None)
    options.add_argument("--examples", type=int, default=None, help="training examples, if not all")
    options.add_argument("--layers", type=int, default=6, help="layers, of each side")
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--steps", type=int, default=1_200)
    options.add_argument("--warmup", type=int, default=300)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--batch-size", type=int, default=1024, help="as the preset counts it")
    options.add_argument("--seeds", type=int, default=1)
    arguments = recording.parse(options)
    steps = 4 if arguments.quick else arguments.steps
    console = Console()
    quiet_libraries()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = str(made_up_sentences(folder / "data")) if arguments.quick else arguments.data
        task = change_task(find_task(arguments.task), data=data, steps=steps)
        task = deep(task, arguments.layers, 16 if arguments.quick else arguments.width)
        if arguments.examples is not None:
            task = replace(task, train_examples=arguments.examples)
        training = replace(
            task.training,
            learning_rate=arguments.learning_rate,
            batch_size=arguments.batch_size,
            warmup_ratio=min(1.0, arguments.warmup / steps),
            logging_steps=max(1, steps // 60),
        )
        task = replace(task, training=training)
        tasks = dict(zip(INITIALISATIONS, (with_normal_weights(task), task), strict=True))
        for seed in range(arguments.seeds):
            for variant, own in tasks.items():
                for step, nll in losses(own, seed, folder):
                    rows.append({"variant": variant, "seed": seed, "step": step, "nll": nll})
    ends = [row for row in rows if row["step"] == steps]
    columns = {"variant": "initialisation", "seed": "seed", "step": "step", "nll": "training NLL"}
    title = f"{task.name}, {arguments.layers} layers of {arguments.width}"
    recording.show(ends, columns, title, console)
    if arguments.output == options.get_default("output"):
        folder = recording.ROOT / "results" / "initialisation"
        arguments.output = folder / f"{arguments.task}-{arguments.layers}-layers.json"
    settings = {"training": vars(task.training), "model_config": dict(task.model_config)}
    recording.write(rows, arguments, console, **settings)
    draw(rows, title, min(arguments.warmup, steps // 2), arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
