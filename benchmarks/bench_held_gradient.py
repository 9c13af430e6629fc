"""The KL's gradient held for k steps, instead of one step with k times alpha.

    python benchmarks/bench_held_gradient.py            # Fashion-MNIST part, about 25 core-minutes
    python benchmarks/bench_held_gradient.py --quick    # on digits, to see that it runs

R-Drop on every k-th step multiplies alpha by k there, which an optimiser like Adam sees as spikes.
Here the KL's gradient of every k-th step is kept, and added to it and to the k - 1 steps that
follow, each with its own likelihood. It costs the same; the held gradient is of older weights and
of another batch. All ways of a seed have the same first weights and batches. The checkpoint with
the lowest validation NLL is tested. Every finished run is a file, and is not run again.
"""

import copy
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import recording
from bench_unlabelled import collate, draw_batches, evaluate
from regdrop import RDropConfig, rdrop_step
from regdrop.diagnostics import expected_cost
from regdrop.experiments.recording.record import write_json
from regdrop.experiments.running.progress import quiet_libraries
from regdrop.experiments.statistics import estimate
from regdrop.loss import ItemTerms, cross_entropy_terms
from regdrop.tasks import PreparedTask, TrainingSettings
from regdrop.tasks.configure import change_task, find_task

BASELINE, FULL = "baseline", "every step"


@dataclass(frozen=True)
class Way:
    """One way of training: R-Drop on every k-th step, its KL's gradient held or not."""

    name: str
    k: int = 1
    is_held: bool = False

    @property
    def config(self) -> RDropConfig:
        """R-Drop's options without alpha."""
        if self.name == BASELINE:
            return RDropConfig(alpha=0.0, num_passes=1)
        return RDropConfig(alpha=0.0, every_n_steps=self.k, rescale=not self.is_held)


def ways(ks: Sequence[int]) -> list[Way]:
    """Return the baseline, full R-Drop, and both ways of every k."""
    return [
        Way(BASELINE),
        Way(FULL),
        *(Way(f"every {k}, alpha times {k}", k) for k in ks),
        *(Way(f"every {k}, gradient held", k, is_held=True) for k in ks),
    ]


def kl_alone(logits: Tensor, target: Tensor, *, num_passes: int) -> ItemTerms:
    """Return the terms of a cross entropy without its likelihood."""
    terms = cross_entropy_terms(logits, target, num_passes=num_passes)
    return terms._replace(nll=terms.nll * 0)


class HeldGradient:
    """The gradient of the KL of the last step with R-Drop.

    Args:
        model: The model.
        alpha: Weight of the KL on every step.
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        self.parameters = list(model.parameters())
        self.alpha = alpha
        self.gradient: Sequence[Tensor] = ()

    def backward(self, logits: Tensor, target: Tensor, config: RDropConfig, step: int) -> None:
        """Add the gradients of this step's likelihood and of the held KL.

        Args:
            logits: Those of the step's passes, stacked.
            target: The target of one pass.
            config: R-Drop's options.
            step: The step.
        """

        def part(**options: Any) -> Tensor:
            given = lambda _: logits  # noqa: E731 the passes are run, and their parts are two
            return rdrop_step(given, target, target, config=config, step=step, **options).loss

        if logits.shape[0] > target.shape[0]:
            kl = part(loss=kl_alone, alpha=self.alpha)
            self.gradient = torch.autograd.grad(kl, self.parameters, retain_graph=True)
        part(alpha=0.0).backward()
        for parameter, gradient in zip(self.parameters, self.gradient, strict=False):
            assert parameter.grad is not None
            parameter.grad += gradient


def batches(prepared: PreparedTask, size: int, seed: int) -> Iterator[Any]:
    """Draw the batches of a run; the same for all ways of a seed."""
    rows = prepared.splits["train"]
    sized: Any = rows
    for chosen in draw_batches(len(sized), size, torch.Generator().manual_seed(seed)):
        yield collate(prepared, [rows[i] for i in chosen])


def train(
    prepared: PreparedTask, way: Way, seed: int, alpha: float, training: TrainingSettings
) -> dict[str, Any]:
    """Train in a way and return the test figures of the best checkpoint."""
    torch.manual_seed(seed)
    model = prepared.build_model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    warm_up = max(1, round(training.warmup_ratio * training.max_steps))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warm_up))
    held = HeldGradient(model, alpha) if way.is_held else None
    config = way.config
    best: dict[str, Any] = {"nll": float("inf")}
    lengths, validation, seconds, mark = [], [], 0.0, time.perf_counter()
    drawn = islice(batches(prepared, training.batch_size, seed), training.max_steps)
    for step, batch in enumerate(drawn):
        model.train()
        target = batch.pop("labels")
        if held is None:
            forward = lambda x: model(**x).logits  # noqa: E731 of this step's model
            options: dict[str, Any] = {"config": config, "step": step, "alpha": alpha}
            rdrop_step(forward, batch, target, **options).loss.backward()
        else:
            is_double = step % way.k == 0
            stacked = {n: torch.cat([v, v]) if is_double else v for n, v in batch.items()}
            held.backward(model(**stacked).logits, target, config, step)
        lengths.append(float(nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)))
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if (step + 1) % training.eval_steps == 0:
            seconds += time.perf_counter() - mark
            found = evaluate(model, prepared, "validation", None)
            validation.append({"step": step + 1, **found})
            if found["nll"] < best["nll"]:
                best = {"nll": found["nll"], "step": step + 1, "weights": weights_of(model)}
            mark = time.perf_counter()
    model.load_state_dict(best["weights"])
    return {
        "seconds": seconds,
        "best_step": best["step"],
        "gradient_length": sum(lengths) / len(lengths),
        "longest_gradient": max(lengths),
        "validation": validation,
        "test": evaluate(model, prepared, "test", None),
    }


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def run(
    prepared: PreparedTask,
    folder: Path,
    settings: dict[str, Any],
    way: Way,
    seed: int,
    **given: Any,
) -> dict[str, Any]:
    """Return the record of a run; it is run if there is none.

    Raises:
        ValueError: If there is one of other settings.
    """
    slug = way.name.replace(", ", "-").replace(" ", "-")
    path = folder / f"{slug}-seed{seed}.json"
    plain = json.loads(json.dumps({**asdict(way), "seed": seed, "settings": settings}))
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {name: record.get(name) for name in plain} != plain:
            raise ValueError(f"{path} is of a run with other settings: use another --output")
        return record
    record = {**plain, **train(prepared, way, seed, **given)}
    write_json(path, record)
    return record


def summaries(records: Sequence[dict[str, Any]], chosen: Sequence[Way]) -> list[recording.Row]:
    """Return the mean test figures of every way."""
    rows = []
    for way in chosen:
        own = [r for r in records if r["name"] == way.name]
        nll = estimate([r["test"]["nll"] for r in own])
        rows.append(
            {
                "way": way.name,
                "cost": expected_cost(way.config),
                "nll": nll.mean,
                "nll_half_width": nll.half_width,
                "accuracy": 100 * estimate([r["test"]["accuracy"] for r in own]).mean,
                "mean_gradient": sum(r["gradient_length"] for r in own) / len(own),
                "longest_gradient": max(r["longest_gradient"] for r in own),
            }
        )
    return rows


def parts_of_gain(rows: Sequence[recording.Row]) -> Iterator[str]:
    """Yield what part of full R-Drop's gain in NLL each way has."""
    nll = {row["way"]: row["nll"] for row in rows}
    for way, value in nll.items():
        part = (nll[BASELINE] - value) / (nll[BASELINE] - nll[FULL])
        yield f"{way}: {part:.0%} of the gain"


def main() -> None:
    options = recording.parser(__doc__)
    options.add_argument("--data", default=None, help="folder of Fashion-MNIST")
    options.add_argument("--alpha", type=float, default=6.0, help="weight of the KL")
    options.add_argument("--ks", default="3,5", help="numbers of steps, by commas")
    options.add_argument("--seeds", type=int, default=3)
    arguments = recording.parse(options)
    task: Any = change_task(
        find_task("digits" if arguments.quick else "fashion-mnist-part"), data=arguments.data
    )
    changes: dict[str, Any] = {}
    if arguments.quick:
        arguments.ks, arguments.seeds = "3", 2
        changes = {"steps": 12, "settings": ["training.eval_steps=6"]}
    task = change_task(task, **changes)
    quiet_libraries()
    console = Console()
    settings = {
        "task": task.name,
        "alpha": arguments.alpha,
        "steps": task.training.max_steps,
        "learning_rate": task.training.learning_rate,
    }
    record_of = partial(
        run,
        task.prepare(),
        arguments.output.with_suffix(""),
        settings,
        alpha=arguments.alpha,
        training=task.training,
    )
    chosen = ways([int(k) for k in arguments.ks.split(",")])
    records = []
    for seed in range(arguments.seeds):
        for way in chosen:
            records.append(record_of(way, seed))
            console.print(f"done: {way.name}, seed {seed}")
    rows = summaries(records, chosen)
    recording.show(rows, {name: name for name in rows[0]}, task.name, console)
    for line in parts_of_gain(rows):
        console.print(line)
    recording.write(rows, arguments, console, **settings)


if __name__ == "__main__":
    main()
