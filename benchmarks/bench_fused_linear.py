"""Time and peak memory of the last linear layer and the loss in one, with gradients.

    python benchmarks/bench_fused_linear.py            # all shapes, some minutes
    python benchmarks/bench_fused_linear.py --quick    # one small shape, to see that it runs

Everything is measured in one process, interleaved; ratios are taken round by round, and their
median, 10th and 90th percentile kept. Time and memory are drawn against words and items.
Baselines: the layer and then the public implementations' form, two calls of `F.cross_entropy`, or
the closed form over explicit logits; on a GPU Apple's `cut_cross_entropy` and Liger's fused linear
cross entropy, without a KL, where they are installed; and the floor: the three matrix products of a
linear layer, into buffers that were touched before. Peak memory is what was allocated above the
inputs, in times of the gradients of hidden states and weight, which every way has to return.
"""

from collections.abc import Callable, Collection
from functools import partial
from importlib.util import find_spec
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

import recording
from bench_loss import reference
from measuring import (
    can_build_cpp,
    peak_bytes,
    ratio,
    split_working,
    spread,
    time_interleaved,
)
from recording import Row
from regdrop import linear_rdrop_cross_entropy, rdrop_cross_entropy

# Items a pass and words: many of the one at a fixed number of the other.
FEATURES = 768
WORDS = [(256, v) for v in (8_000, 32_000, 64_000)]
ITEMS = [(n, 32_000) for n in (128, 256, 512)]
# Items a pass, features and words of language models, in bfloat16.
ON_GPU = [(2048, 768, 32_000), (2048, 2048, 128_256), (4096, 4096, 128_256)]
FLOOR, OFFICIAL = "three matrix products", "official form"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def variants(device: str) -> dict[str, Loss]:
    """Return the measured functions of hidden states, weight and target by name."""

    def explicit(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
        return lambda hidden, weight, target: loss(F.linear(hidden, weight), target)

    def fused(**options: object) -> Loss:
        return lambda hidden, weight, target: (
            linear_rdrop_cross_entropy(
                hidden, weight, target, alpha=1.0, scale="sum", **options
            ).loss
        )

    return {
        OFFICIAL: explicit(lambda x, y: reference.official_loss(x, y, 1.0)),
        "two cross entropies, no KL": explicit(
            lambda x, y: sum(F.cross_entropy(p, y) for p in x.chunk(2))
        ),
        "explicit logits, in place": explicit(
            lambda x, y: rdrop_cross_entropy(x, y, alpha=1.0, scale="sum", inplace=True).loss
        ),
        "fused": fused(),
        "fused, one backward pass": fused(backward_passes=1),
        **(cpu_variants(fused) if device == "cpu" else gpu_variants()),
    }


def cpu_variants(fused: Callable[..., Loss]) -> dict[str, Loss]:
    """Return what is of interest on a CPU alone, by name."""
    in_cpp = {"fused, C++": fused(impl="cpp")} if can_build_cpp() else {}
    return {**in_cpp, "fused, 64 rows a chunk": fused(chunk_size=32)}


def gpu_variants() -> dict[str, Loss]:
    """Return what runs on a GPU alone, by name."""
    found: dict[str, Loss] = {}
    if find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        found["Apple's cross entropy, no KL"] = lambda h, w, y: linear_cross_entropy(
            h, w, y.repeat(2)
        )
    if find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger's fused linear cross entropy, no KL"] = lambda h, w, y: liger(
            w, h, y.repeat(2)
        )
    return found


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


def measure(
    items: int,
    features: int,
    words: int,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    without: Collection[str] = (),
) -> list[Row]:
    """Measure all variants on one shape, but those that are named."""
    generator = torch.Generator(device).manual_seed(0)
    on_device = {"generator": generator, "device": device}
    hidden = torch.randn(2 * items, features, **on_device).to(dtype).requires_grad_()
    weight = torch.randn(words, features, **on_device).div_(features**0.5)
    weight = weight.to(dtype).requires_grad_()
    target = torch.randint(0, words, (items,), **on_device)
    calls, failed = split_working(
        {
            name: partial(gradients, function, hidden, weight, target)
            for name, function in variants(device).items()
            if name not in without
        }
    )
    buffers = hidden.new_empty(2 * items, words), hidden.new_empty(hidden.shape), weight.clone()
    floor = partial(products, hidden, weight, tuple(x.detach() for x in buffers))
    times = time_interleaved({**calls, FLOOR: floor}, repeats, device)
    del floor, buffers
    shape: Row = {
        "items": items,
        "features": features,
        "words": words,
        "dtype": str(dtype).removeprefix("torch."),
    }
    returned = hidden.nbytes + weight.nbytes
    rows: list[Row] = []
    for name, own in times.items():
        row: Row = {**shape, "variant": name, "times_three_products": ratio(own, times[FLOOR])}
        if OFFICIAL in times:
            row["speedup_over_official"] = ratio(times[OFFICIAL], own)
        if name in calls:
            peak = peak_bytes(calls[name], device)
            row["peak_times_gradients"] = peak / returned
            row["peak_mebibytes"] = peak / 2**20
        if device == "cuda":
            row["milliseconds"] = spread(own, 1e3)
        rows.append(row)
    return rows + [{**shape, "variant": name, "failed": why} for name, why in failed.items()]


COLUMNS = {
    "variant": "layer, loss and gradients",
    "times_three_products": "times the products",
    "speedup_over_official": "speed-up over the official form",
    "peak_times_gradients": "peak, gradients",
    "failed": "does not run here",
}


def main() -> None:
    from rich.console import Console

    from drawing import draw_sweeps

    options = recording.parser(__doc__, repeats=3)
    arguments = recording.parse(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sweeps = {"words": WORDS, "items": ITEMS}
    if arguments.quick:
        sweeps = {axis: [(64, 1000)] for axis in sweeps}
    swept = dict.fromkeys(chain(*sweeps.values()))
    cases = [(n, FEATURES, words, torch.float32) for n, words in swept]
    if not arguments.quick:
        further = ON_GPU if device == "cuda" else [(256, FEATURES, 32_000)]
        cases += [(*shape, torch.bfloat16) for shape in further]
    console = Console()

    def measure_case(items: int, features: int, words: int, dtype: torch.dtype) -> list[Row]:
        return measure(items, features, words, dtype, device, arguments.repeats)

    def title(items: int, features: int, words: int, dtype: torch.dtype) -> str:
        name = str(dtype).removeprefix("torch.")
        return f"2 x {items} x {features}, {words:,} words, {name}"

    rows = recording.measure_cases(cases, measure_case, title, COLUMNS, arguments, console)
    titles = {
        "times_three_products": "time in times of the products",
        "peak_mebibytes": "peak above the inputs, MiB",
    }
    timed = [row for row in rows if "failed" not in row]
    draw_sweeps(timed, sweeps, titles, arguments.output.with_suffix(".png"), console)


if __name__ == "__main__":
    main()
