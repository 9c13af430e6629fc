"""Time and peak memory of the last linear layer and the loss in one, with gradients.

    python benchmarks/bench_fused_linear.py            # all shapes, some minutes
    python benchmarks/bench_fused_linear.py --quick    # one small shape, to see that it runs

Everything is measured in one process, interleaved; figures are medians. Baselines: the layer and
then the public implementations' form, two calls of `F.cross_entropy`, or the closed form over
explicit logits; and the floor: the three matrix products of a linear layer, into buffers that were
touched before. Peak memory is what was allocated above the inputs, in times of the gradients of
hidden states and weight, which every way has to return.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench_loss import ROOT, peak_bytes, reference, synchronise
from regdrop import linear_rdrop_cross_entropy, rdrop_cross_entropy
from regdrop.experiments.record import describe_hardware, library_versions

# Items a pass, features, words.
SHAPES = [(2048, 256, 10_000), (1024, 768, 32_000), (512, 768, 128_000)]
FLOOR, OFFICIAL = "three matrix products", "official form"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def variants() -> dict[str, Loss]:
    """Return the measured functions of hidden states, weight and target by name."""

    def explicit(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
        return lambda hidden, weight, target: loss(F.linear(hidden, weight), target)

    def fused(**options: object) -> Loss:
        return lambda hidden, weight, target: (
            linear_rdrop_cross_entropy(hidden, weight, target, alpha=1.0, **options).loss
        )

    return {
        OFFICIAL: explicit(lambda x, y: reference.official_loss(x, y, 1.0)),
        "two cross entropies, no KL": explicit(
            lambda x, y: sum(F.cross_entropy(p, y) for p in x.chunk(2))
        ),
        "explicit logits, in place": explicit(
            lambda x, y: rdrop_cross_entropy(x, y, alpha=1.0, inplace=True).loss
        ),
        "fused": fused(),
        "fused, 64 rows a chunk": fused(chunk_size=32),
        "fused, 256 rows a chunk": fused(chunk_size=128),
        "fused, 1024 rows a chunk": fused(chunk_size=512),
        "fused, one backward pass": fused(backward_passes=1),
    }


def gradients(function: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> object:
    """Run one forward and backward."""
    return torch.autograd.grad(function(hidden, weight, target) * 1.5, (hidden, weight))


def products(hidden: Tensor, weight: Tensor, buffers: tuple[Tensor, Tensor, Tensor]) -> None:
    """Compute the products of a linear layer: logits, and the gradients that come from theirs."""
    logits, grad_hidden, grad_weight = buffers
    with torch.no_grad():
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.t(), hidden, out=grad_weight)


def seconds(function: Callable[[], object], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, repeats: int
) -> dict[str, object]:
    """Measure all variants on one shape."""
    items, features, words = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * items, features, generator=generator).to(device, dtype)
    weight = (torch.randn(words, features, generator=generator) / features**0.5).to(device, dtype)
    target = torch.randint(0, words, (items,), generator=generator).to(device)
    hidden.requires_grad_()
    weight.requires_grad_()
    calls = {name: partial(gradients, f, hidden, weight, target) for name, f in variants().items()}
    buffers = hidden.new_empty(2 * items, words), hidden.new_empty(hidden.shape), weight.clone()
    floor = partial(products, hidden, weight, tuple(x.detach() for x in buffers))
    times: dict[str, list[float]] = {name: [] for name in [*calls, FLOOR]}
    for repeat in range(repeats + 1):  # the first warms up
        for name, call in {**calls, FLOOR: floor}.items():
            value = seconds(call, device)
            if repeat:
                times[name].append(value)
    del floor, buffers
    medians = {name: statistics.median(values) for name, values in times.items()}
    needed = (hidden.numel() + weight.numel()) * hidden.element_size()
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    return {
        "items": items,
        "features": features,
        "words": words,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "times_three_products": {name: value / medians[FLOOR] for name, value in medians.items()},
        "speedup_over_official": {
            name: medians[OFFICIAL] / value for name, value in medians.items()
        },
        "peak_times_gradients": {name: peak / needed for name, peak in peaks.items()},
        "peak_mebibytes": {name: peak / 2**20 for name, peak in peaks.items()},
        **({"milliseconds": {n: v * 1e3 for n, v in medians.items()}} if device == "cuda" else {}),
    }


def show(results: list[dict[str, object]], console: Console) -> None:
    """Print the ratios."""
    keys = ("times_three_products", "speedup_over_official", "peak_times_gradients")
    for result in results:
        title = "2 x {items} x {features}, {words} words, {dtype}".format(**result)
        titles = ("times the products", "speed-up over the official form", "peak, gradients")
        table = Table("layer, loss and gradients", *titles, title=title)
        products_, speed, peak = (result[key] for key in keys)
        assert isinstance(products_, dict)
        assert isinstance(speed, dict)
        assert isinstance(peak, dict)
        for name, value in products_.items():
            shown = f"{peak[name]:.2f}" if name in peak else ""
            table.add_row(name, f"{value:.2f}", f"{speed[name]:.2f}x", shown)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench_fused_linear.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = [torch.float32] if arguments.quick else [torch.float32, torch.bfloat16]
    shapes = [(64, 32, 1000)] if arguments.quick else SHAPES
    cases = [(shape, dtype) for dtype in dtypes for shape in shapes]
    console = Console()
    results = [
        measure(shape, dtype, device, arguments.repeats)
        for shape, dtype in track(cases, "measuring", console=console)
    ]
    show(results, console)
    suffix = " --quick" if arguments.quick else ""
    record = {
        "command": f"python benchmarks/bench_fused_linear.py{suffix}",
        "date": date.today().isoformat(),
        "versions": library_versions(),
        "hardware": describe_hardware(),
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
