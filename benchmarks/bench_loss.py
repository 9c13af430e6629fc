"""Time and peak memory of the cross-entropy loss with gradient, against other ways to compute it.

    python benchmarks/bench_loss.py            # all shapes, some minutes
    python benchmarks/bench_loss.py --quick    # one small shape, to see that it runs

Everything is measured in one process, interleaved; ratios are taken round by round, and their
median, 10th and 90th percentile kept. Time and memory are drawn against classes and items.
Baselines: the public implementations' form (`log_softmax`, `softmax`, `kl_div` both ways, two cross
entropies), two calls of `F.cross_entropy`, and the copy floor: reading the logits once and writing
them once into a buffer that was touched before. Peak memory is what was allocated above the inputs,
in logits pairs: the gradient alone is 1.

On a GPU also the Triton kernel, with its share of the bandwidth of that copy (the kernel reads the
logits twice and writes them once), also by replays of a CUDA graph, without the host; and Liger's
cross entropy of the same rows, without a KL, where `liger_kernel` is installed. Apple's takes no
logits: see `bench_fused_linear.py`.
"""

import sys
from collections.abc import Callable, Collection
from functools import partial
from importlib.util import find_spec
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

import recording
from measuring import (
    can_build_cpp,
    has_compiler,
    has_triton,
    peak_bytes,
    ratio,
    split_working,
    spread,
    time_interleaved,
    time_replays,
)
from recording import ROOT, Row
from regdrop import rdrop_cross_entropy

sys.path.insert(0, str(ROOT / "tests"))  # the baseline of the tests
import reference

# Items a pass and classes: many of the one at a fixed number of the other.
ITEMS = {"cpu": [(64, 32_000), (256, 32_000), (1024, 32_000)]}
ITEMS["cuda"] = [(n, 32_000) for n in (256, 1024, 4096, 16_384)]
CLASSES = {
    "cpu": [(256, 2_000), (256, 32_000), (256, 128_000)],
    "cuda": [(2048, v) for v in (2_000, 10_000, 32_000, 128_000, 256_000)],
}
# Those of classifiers, where the time is that of starting operations.
SMALL = [(8, 2), (32, 3), (512, 30), (32, 1000)]
# Those of pixels and tokens, many rows of few classes.
FEW_CLASSES = [(16_384, 3), (65_536, 2)]
OFFICIAL, FLOOR = "official form", "copy floor"
LIGER = "Liger's cross entropy, in place"
# Of the logits read or written, in pairs: by a copy, and by the GPU kernel.
COPIED, MOVED = 2, 3
Loss = Callable[[Tensor, Tensor], Tensor]


def variants(device: str, dtype: torch.dtype) -> dict[str, Loss]:
    """Return the measured functions by name."""

    def ours(impl: str, inplace: bool = False) -> Loss:
        return lambda x, y: (
            rdrop_cross_entropy(x, y, alpha=1.0, scale="sum", impl=impl, inplace=inplace).loss
        )

    compiled = {"compiled": ours("compiled"), "compiled, in place": ours("compiled", True)}
    on_cpu = {"C++": ours("cpp"), "C++, in place": ours("cpp", True)}
    return {
        OFFICIAL: lambda x, y: reference.official_loss(x, y, 1.0),
        "eager": ours("eager"),
        "two cross entropies": lambda x, y: sum(F.cross_entropy(p, y) for p in x.chunk(2)),
        "chunked": ours("chunked"),
        "chunked, in place": ours("chunked", True),
        **(compiled if device == "cuda" or has_compiler() else {}),
        **(on_cpu if device == "cpu" and can_build_cpp() else {}),
        **(gpu_variants(dtype) if device == "cuda" else {}),
    }


def gpu_variants(dtype: torch.dtype) -> dict[str, Loss]:
    """Return what runs on a GPU alone, by name."""
    found: dict[str, Loss] = {}
    if has_triton("cuda", dtype):
        for name, inplace in (("triton", False), ("triton, in place", True)):
            found[name] = lambda x, y, inplace=inplace: (
                rdrop_cross_entropy(
                    x, y, alpha=1.0, scale="sum", impl="triton", inplace=inplace
                ).loss
            )
    if find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        # It overwrites the logits, as ours does in place.
        liger = LigerCrossEntropyLoss()
        found[LIGER] = lambda x, y: liger(x, y.repeat(2))
    return found


def gradient(function: Loss, work: Tensor, target: Tensor) -> object:
    """Run one forward and backward from logits that are no leaf."""
    leaf = work.detach().requires_grad_()
    logits = leaf.view_as(leaf)
    # Not backward(): it would copy the gradient, which a layer behind the logits takes as it is.
    return torch.autograd.grad(function(logits, target) * 1.5, logits)


def measure(
    items: int,
    classes: int,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    without: Collection[str] = (),
) -> list[Row]:
    """Measure all variants on one shape, but those that are named."""
    generator = torch.Generator(device).manual_seed(0)
    on_device = {"generator": generator, "device": device}
    source = torch.randn(2 * items, classes, **on_device).mul_(2).to(dtype)
    target = torch.randint(0, classes, (items,), **on_device)
    work, floor = torch.empty_like(source), torch.empty_like(source)
    # Some overwrite the logits.
    refill = partial(work.copy_, source)
    calls, failed = split_working(
        {
            name: partial(gradient, function, work, target)
            for name, function in variants(device, dtype).items()
            if name not in without
        },
        refill,
    )
    times = time_interleaved(
        {**calls, FLOOR: partial(floor.copy_, work)}, repeats, device, prepare=refill
    )
    shape: Row = {
        "items": items,
        "classes": classes,
        "dtype": str(dtype).removeprefix("torch."),
    }
    rows: list[Row] = []
    for name, own in times.items():
        row: Row = {**shape, "variant": name}
        if OFFICIAL in times:
            row["speedup_over_official"] = ratio(times[OFFICIAL], own)
        row["times_copy_floor"] = ratio(own, times[FLOOR])
        if name in calls:
            refill()
            row["peak_logits_pairs"] = peak_bytes(calls[name], device) / source.nbytes
        if device == "cuda":
            row["milliseconds"] = spread(own, 1e3)
        if LIGER in times:
            row["times_liger"] = ratio(own, times[LIGER])
        rows.append(row)
    for row in rows:
        if row["variant"].startswith("triton"):
            call, copy = calls[row["variant"]], partial(floor.copy_, work)
            floors = [MOVED / COPIED * seconds for seconds in times[FLOOR]]
            row["share_of_copy_bandwidth"] = ratio(floors, times[row["variant"]])
            alone, copies = (time_replays(f, repeats, refill) for f in (call, copy))
            floors = [MOVED / COPIED * seconds for seconds in copies]
            row["milliseconds_without_host"] = spread(alone, 1e3)
            row["share_of_copy_bandwidth_without_host"] = ratio(floors, alone)
    return rows + [{**shape, "variant": name, "failed": why} for name, why in failed.items()]


COLUMNS = {
    "variant": "loss and gradient",
    "speedup_over_official": "speed-up over the official form",
    "times_copy_floor": "times the copy floor",
    "peak_logits_pairs": "peak, logits pairs",
    "failed": "does not run here",
}


def main() -> None:
    from rich.console import Console

    from drawing import draw_sweeps

    options = recording.parser(__doc__, repeats=3)
    options.add_argument("--small", action="store_true", help="few items or few classes alone")
    arguments = recording.parse(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sweeps = {"classes": CLASSES[device], "items": ITEMS[device]}
    if arguments.quick:
        sweeps = {axis: [(64, 1000)] for axis in sweeps}
    if arguments.small:
        sweeps = {"": FEW_CLASSES}
    shapes = list(dict.fromkeys(chain([] if arguments.quick else SMALL, *sweeps.values())))
    console = Console()
    dtypes = [torch.float32] if arguments.quick else [torch.float32, torch.bfloat16]
    cases = [(*shape, dtype) for dtype in dtypes for shape in shapes]

    def measure_case(items: int, classes: int, dtype: torch.dtype) -> list[Row]:
        return measure(items, classes, dtype, device, arguments.repeats)

    def title(items: int, classes: int, dtype: torch.dtype) -> str:
        return f"2 x {items} x {classes:,} {str(dtype).removeprefix('torch.')}"

    rows = recording.measure_cases(cases, measure_case, title, COLUMNS, arguments, console)
    titles = {
        "times_copy_floor": "time in copies of the logits",
        "peak_logits_pairs": "peak above the inputs, logits pairs",
    }
    timed = [row for row in rows if "failed" not in row]
    if not arguments.small:  # no axis has so many of them
        draw_sweeps(timed, sweeps, titles, arguments.output.with_suffix(".png"), console)


if __name__ == "__main__":
    main()
