"""Time and peak memory of the last linear layer and the loss in one, with gradients.

    python benchmarks/bench_fused_linear.py            # all shapes, some minutes
    python benchmarks/bench_fused_linear.py --quick    # one small shape, to see that it runs

Everything is measured in one process, interleaved; ratios are taken round by round, and their
median, 10th and 90th percentile kept. Time and memory are drawn against words and items.
Baselines: the layer and then the public implementations' form, two calls of `F.cross_entropy`, or
the closed form over explicit logits; on a GPU Apple's `cut_cross_entropy`, without a KL, where it
is installed; and the floor: the three matrix products of a linear layer, into buffers that were
touched before. Peak memory is what was allocated above the inputs, in times of the gradients of
hidden states and weight, which every way has to return.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import chain

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

import recording
from bench_loss import reference
from drawing import draw_sweeps
from measuring import can_build_cpp, peak_bytes, ratio, time_interleaved
from recording import Row
from regdrop import linear_rdrop_cross_entropy, rdrop_cross_entropy

FEATURES = 768
# Items a pass and words: many of the one at a fixed number of the other.
WORDS = [(256, v) for v in (8_000, 32_000, 64_000)]
ITEMS = [(n, 32_000) for n in (128, 256, 512)]
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
        **({"fused, C++": fused(impl="cpp")} if can_build_cpp() else {}),
        "fused, 64 rows a chunk": fused(chunk_size=32),
        "fused, one backward pass": fused(backward_passes=1),
        **(gpu_variants() if torch.cuda.is_available() else {}),
    }


def gpu_variants() -> dict[str, Loss]:
    """Return what runs on a GPU alone, by name."""
    if find_spec("cut_cross_entropy") is None:
        return {}
    from cut_cross_entropy import linear_cross_entropy

    return {"Apple's cross entropy, no KL": lambda h, w, y: linear_cross_entropy(h, w, y.repeat(2))}


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


def measure(items: int, words: int, dtype: torch.dtype, device: str, repeats: int) -> list[Row]:
    """Measure all variants on one shape."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * items, FEATURES, generator=generator).to(device, dtype)
    weight = (torch.randn(words, FEATURES, generator=generator) / FEATURES**0.5).to(device, dtype)
    target = torch.randint(0, words, (items,), generator=generator).to(device)
    hidden.requires_grad_()
    weight.requires_grad_()
    calls = {name: partial(gradients, f, hidden, weight, target) for name, f in variants().items()}
    buffers = hidden.new_empty(2 * items, words), hidden.new_empty(hidden.shape), weight.clone()
    floor = partial(products, hidden, weight, tuple(x.detach() for x in buffers))
    times = time_interleaved({**calls, FLOOR: floor}, repeats, device)
    del floor, buffers
    rows = []
    for name, own in times.items():
        row: Row = {
            "items": items,
            "features": FEATURES,
            "words": words,
            "dtype": str(dtype).removeprefix("torch."),
            "variant": name,
            "times_three_products": ratio(own, times[FLOOR]),
            "speedup_over_official": ratio(times[OFFICIAL], own),
        }
        if name in calls:
            peak = peak_bytes(calls[name], device)
            row["peak_times_gradients"] = peak / (hidden.nbytes + weight.nbytes)
            row["peak_mebibytes"] = peak / 2**20
        if device == "cuda":
            row["milliseconds"] = {k: v * 1e3 for k, v in ratio(own, [1.0] * len(own)).items()}
        rows.append(row)
    return rows


COLUMNS = {
    "variant": "layer, loss and gradients",
    "times_three_products": "times the products",
    "speedup_over_official": "speed-up over the official form",
    "peak_times_gradients": "peak, gradients",
}


def main() -> None:
    options = recording.parser(__doc__, repeats=3)
    arguments = recording.parse(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sweeps = {"words": WORDS, "items": ITEMS}
    if arguments.quick:
        sweeps = {axis: [(64, 1000)] for axis in sweeps}
    cases = [(*shape, torch.float32) for shape in dict.fromkeys(chain(*sweeps.values()))]
    if not arguments.quick:
        cases.append((256, 32_000, torch.bfloat16))
    console = Console()
    rows: list[Row] = []
    for items, words, dtype in track(cases, "measuring", console=console):
        found = measure(items, words, dtype, device, arguments.repeats)
        title = f"2 x {items} x {FEATURES}, {words:,} words, {found[0]['dtype']}"
        recording.show(found, COLUMNS, title, console)
        rows += found
    recording.write(rows, arguments, console)
    titles = {
        "times_three_products": "time in times of the products",
        "peak_mebibytes": "peak above the inputs, MiB",
    }
    draw_sweeps(rows, sweeps, titles, arguments.output.with_suffix(".png"), console)


if __name__ == "__main__":
    main()
