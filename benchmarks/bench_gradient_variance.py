"""How noisy the gradient of each way of R-Drop is, beside what a step of it costs.

    python benchmarks/bench_gradient_variance.py --task multi30k-part-de-en
    python benchmarks/bench_gradient_variance.py --quick    # on digits, to see that it runs

A model is trained by R-Drop for some steps. Then, its weights unchanged, the gradient of every way
is drawn many times, once with the masks alone drawn anew (one batch) and once with the batch too.
Figures are the variance of a draw over the squared length of the mean gradient of full R-Drop, and
the cosine of the way's mean and full R-Drop's. Lengths and cosines are estimated from independent
draws, so that noise does not bias them: of an unbiased way the cosine is 1 but for their error.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import recording
from regdrop import RDropConfig
from regdrop.diagnostics import expected_cost
from regdrop.experiments import build_arms
from regdrop.experiments.running.building import build_trainer
from regdrop.experiments.running.progress import quiet_libraries
from regdrop.tasks import Task
from regdrop.tasks.configure import change_task, find_task

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "one backward": {"backward_passes": 1},
    "a third of the batch": {"fraction": 1 / 3},
    "every 3rd step, rescaled": {"every_n_steps": 3},
    "every 3rd step, as in the paper": {"every_n_steps": 3, "rescale": False},
    "one backward, half of the batch": {"backward_passes": 1, "fraction": 0.5},
    "two passes, no KL": {"alpha": 0.0},
    "one pass, no KL": {"alpha": 0.0, "num_passes": 1},
}


TURN = 3  # every_n_steps of all ways divides it


class Moments:
    """Sums of gradients and of their squared lengths, and the sums of two halves of the draws."""

    def __init__(self) -> None:
        self.halves: list[Tensor | float] = [0.0, 0.0]
        self.squares = 0.0
        self.count = 0

    def add(self, gradient: Tensor) -> None:
        """Take one draw; halves are of whole turns of a way that differs from step to step."""
        self.halves[self.count // TURN % 2] += gradient
        self.squares += float(gradient.double().square().sum())
        self.count += 1

    @property
    def mean(self) -> Any:
        """The mean gradient."""
        return (self.halves[0] + self.halves[1]) / self.count

    @property
    def squared_length(self) -> float:
        """The squared length of the true mean, without the bias that noise adds."""
        first, second = (half / (self.count / 2) for half in self.halves)
        return float((first * second).sum())

    @property
    def variance(self) -> float:
        """The variance of one draw, summed over all parameters."""
        return self.squares / self.count - self.squared_length


def gradients(trainer: Any, batches: Sequence[Any]) -> Iterator[Tensor]:
    """Draw gradients without end, as the optimiser would get them, of batches in turn."""
    model = trainer.model.train()
    device = trainer.args.device
    for step, batch in enumerate(cycle(batches)):
        trainer.state.global_step = step
        samples, items = trainer.get_batch_samples(iter([batch]), 1, device)
        model.zero_grad()
        inputs = trainer._prepare_inputs(samples[0])
        trainer.compute_loss(model, inputs, num_items_in_batch=items).backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        yield torch.cat(grads).float()


def epochs(loader: Any) -> Iterator[Any]:
    """Return the batches of one epoch after the other, each in an order of its own."""
    for epoch in count():
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield from loader


def measure(task: Task, steps: int, draws: int, console: Console) -> dict[str, dict[str, Moments]]:
    """Return the moments of every way's gradient, by what is drawn anew."""
    arm = build_arms(task)["rdrop"]
    prepared = task.prepare()
    torch.manual_seed(0)
    model = prepared.build_model()
    found: dict[str, dict[str, Moments]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def trainer_of(rdrop: RDropConfig) -> Any:
            trainer = build_trainer(
                task,
                replace(arm, rdrop=rdrop),
                0,
                Path(folder),
                prepared,
                model,
                train=prepared.splits["train"],
                validation=prepared.splits["validation"],
            )
            trainer.args.eval_strategy = trainer.args.save_strategy = "no"
            trainer.args.load_best_model_at_end = False
            return trainer

        trainer = trainer_of(arm.rdrop)
        trainer.train()
        batches = list(islice(epochs(trainer.get_train_dataloader()), draws))
        for way, changes in track(list(WAYS.items()), "drawing gradients", console=console):
            trainer = trainer_of(replace(arm.rdrop, **changes))
            found[way] = {"masks": Moments(), "masks and batches": Moments()}
            for moments, used in zip(found[way].values(), (batches[:1], batches), strict=True):
                torch.manual_seed(len(found))  # no way draws the masks of another
                for gradient in islice(gradients(trainer, used), draws):
                    moments.add(gradient)
    return found


def summarise(found: dict[str, dict[str, Moments]], rdrop: RDropConfig) -> list[dict[str, Any]]:
    """Return a row for every way: its cost, and its noise and direction beside full R-Drop's."""
    rows = []
    for way, moments in found.items():
        row: dict[str, Any] = {
            "variant": way,
            "cost": expected_cost(replace(rdrop, **WAYS[way])),
        }
        for kind, own in moments.items():
            full = found["full"][kind]
            row[kind] = own.variance / full.squared_length
            # Full R-Drop's own direction is told by its two halves.
            inner = full.squared_length if own is full else float((own.mean * full.mean).sum())
            length = (abs(own.squared_length) * abs(full.squared_length)) ** 0.5
            row[f"cosine, {kind}"] = inner / length
        rows.append(row)
    return rows


COLUMNS = {
    "variant": "way",
    "cost": "cost",
    "masks": "masks",
    "cosine, masks": "cosine",
    "masks and batches": "masks and batches",
    "cosine, masks and batches": "cosine",
}


def main() -> None:
    options = recording.parser(__doc__)
    options.add_argument("--task", default="digits")
    options.add_argument("--data", default=None)
    options.add_argument("--steps", type=int, default=300, help="steps of R-Drop beforehand")
    options.add_argument("--draws", type=int, default=60, help="gradients of each way")
    arguments = recording.parse(options)
    if arguments.draws % (2 * TURN):
        options.error(f"--draws must be a multiple of {2 * TURN}, got {arguments.draws}")
    steps, draws = (5, 2 * TURN) if arguments.quick else (arguments.steps, arguments.draws)
    console = Console()
    quiet_libraries()
    task = change_task(find_task(arguments.task), data=arguments.data, steps=steps)
    rows = summarise(measure(task, steps, draws, console), task.rdrop)
    recording.show(rows, COLUMNS, f"{task.name}, alpha {task.rdrop.alpha:g}", console)
    if arguments.output == options.get_default("output"):
        arguments.output = arguments.output.with_stem(f"gradient_variance_{arguments.task}")
    recording.write(rows, arguments, console, alpha=task.rdrop.alpha)


if __name__ == "__main__":
    main()
