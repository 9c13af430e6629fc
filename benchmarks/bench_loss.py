"""Time and peak memory of the cross-entropy loss with gradient, against other ways to compute it.

    python benchmarks/bench_loss.py            # all shapes, a few minutes
    python benchmarks/bench_loss.py --quick    # one small shape, to see that it runs

Everything is measured in one process, interleaved; figures are medians. Baselines: the public
implementations' form (`log_softmax`, `softmax`, `kl_div` both ways, two cross entropies), two
calls of `F.cross_entropy`, and the copy floor: reading the logits once and writing them once into
a buffer that was touched before. Peak memory is what was allocated above the inputs, in logits
pairs: the gradient alone is 1.

On a GPU also the Triton kernel, with its share of the bandwidth of that copy (the kernel reads the
logits twice and writes them once), and Liger's cross entropy of the same rows, without a KL, where
`liger_kernel` is installed. Apple's `cut_cross_entropy` takes no logits, so it is not comparable.
"""

import argparse
import gc
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.cpp_extension import is_ninja_available

from regdrop import rdrop_cross_entropy
from regdrop.experiments.record import describe_hardware, library_versions

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import reference  # noqa: E402  the baseline of the tests

SHAPES = {
    "cpu": [(4096, 10_000), (1024, 32_000), (256, 128_000)],
    "cuda": [(8192, 10_000), (4096, 32_000), (2048, 128_000), (1024, 256_000)],
}
Loss = Callable[[Tensor, Tensor], Tensor]


def variants() -> dict[str, Loss]:
    """Return the measured functions by name."""

    def ours(impl: str, inplace: bool = False) -> Loss:
        return lambda x, y: rdrop_cross_entropy(x, y, alpha=1.0, impl=impl, inplace=inplace).loss

    compiled = {"compiled": ours("compiled"), "compiled, in place": ours("compiled", True)}
    on_cpu = {"C++": ours("cpp"), "C++, in place": ours("cpp", True)}
    can_build = not torch.cuda.is_available() and is_ninja_available()
    can_compile = torch.cuda.is_available() or any(map(shutil.which, ("c++", "g++", "clang++")))
    return {
        "official form": lambda x, y: reference.official_loss(x, y, 1.0),
        "eager": ours("eager"),
        "two cross entropies": lambda x, y: sum(F.cross_entropy(p, y) for p in x.chunk(2)),
        "chunked": ours("chunked"),
        "chunked, in place": ours("chunked", True),
        **(compiled if can_compile else {}),
        **(on_cpu if can_compile and can_build else {}),
        **(gpu_variants() if torch.cuda.is_available() else {}),
    }


def gpu_variants() -> dict[str, Loss]:
    """Return what runs on a GPU alone, by name."""
    found: dict[str, Loss] = {}
    if find_spec("triton") is not None:
        for name, inplace in (("triton", False), ("triton, in place", True)):
            found[name] = lambda x, y, inplace=inplace: (
                rdrop_cross_entropy(x, y, alpha=1.0, impl="triton", inplace=inplace).loss
            )
    if find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        # It overwrites the logits, as ours does in place.
        liger = LigerCrossEntropyLoss()
        found["Liger's cross entropy, in place"] = lambda x, y: liger(x, y.repeat(2))
    return found


def time_once(function: Loss, source: Tensor, target: Tensor, device: str) -> float:
    """Return the seconds of one forward and backward from logits that are no leaf."""
    leaf = source.detach().requires_grad_()
    logits = leaf.view_as(leaf)
    synchronise(device)
    start = time.perf_counter()
    # Not backward(): it would copy the gradient, which a layer behind the logits takes as it is.
    torch.autograd.grad(function(logits, target) * 1.5, logits)
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_pairs(function: Loss, source: Tensor, target: Tensor, device: str) -> float:
    """Return the highest memory above the inputs, in logits pairs."""
    logits = source.clone().requires_grad_().view_as(source)
    peak = peak_bytes(lambda: torch.autograd.grad(function(logits, target) * 1.5, logits), device)
    return peak / (source.numel() * source.element_size())


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Return the highest memory that a function allocates."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return highest_allocation(profiler)


def highest_allocation(profiler: profile) -> int:
    """Return the highest sum of allocations and releases, in bytes."""
    current = highest = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        highest = max(highest, current)
    return highest


def measure(
    rows: int, classes: int, dtype: torch.dtype, device: str, repeats: int
) -> dict[str, object]:
    """Measure all variants on one shape."""
    generator = torch.Generator().manual_seed(0)
    source = (torch.randn(2 * rows, classes, generator=generator) * 2).to(device, dtype)
    target = torch.randint(0, classes, (rows,), generator=generator).to(device)
    functions = variants()
    work, floor = torch.empty_like(source), torch.empty_like(source)
    times: dict[str, list[float]] = {name: [] for name in [*functions, "copy floor"]}
    for repeat in range(repeats + 1):  # the first warms up and compiles
        for name, function in functions.items():
            work.copy_(source)
            seconds = time_once(function, work, target, device)
            if repeat:
                times[name].append(seconds)
        synchronise(device)
        start = time.perf_counter()
        floor.copy_(source)
        synchronise(device)
        if repeat:
            times["copy floor"].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    peaks = {name: peak_pairs(f, source, target, device) for name, f in functions.items()}
    return {
        "rows": rows,
        "classes": classes,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "speedup_over_official": {
            name: medians["official form"] / value for name, value in medians.items()
        },
        "times_copy_floor": {
            name: value / medians["copy floor"] for name, value in medians.items()
        },
        "peak_logits_pairs": peaks,
        **(gpu_figures(medians) if device == "cuda" else {}),
    }


def gpu_figures(medians: dict[str, float]) -> dict[str, object]:
    """Return times, and the kernel's bytes a second over those of the copy."""
    copied, moved = 2, 3  # logits read or written, in pairs
    return {
        "milliseconds": {name: value * 1e3 for name, value in medians.items()},
        "share_of_copy_bandwidth": {
            name: moved / value / (copied / medians["copy floor"])
            for name, value in medians.items()
            if name.startswith("triton")
        },
    }


def show(results: list[dict[str, object]], console: Console) -> None:
    """Print the ratios."""
    for result in results:
        table = Table(
            "loss and gradient",
            "speed-up over the official form",
            "times the copy floor",
            "peak, logits pairs",
            title=f"2 x {result['rows']} x {result['classes']} {result['dtype']}",
        )
        speed, floor, peak = (
            result[k] for k in ("speedup_over_official", "times_copy_floor", "peak_logits_pairs")
        )
        assert isinstance(speed, dict)
        assert isinstance(floor, dict)
        assert isinstance(peak, dict)
        for name in speed:
            shown = f"{peak[name]:.2f}" if name in peak else ""
            table.add_row(name, f"{speed[name]:.2f}x", f"{floor[name]:.1f}x", shown)
        console.print(table)
        shares = result.get("share_of_copy_bandwidth", {})
        assert isinstance(shares, dict)
        for name, share in shares.items():
            console.print(f"{name}: {share:.0%} of the copy's bandwidth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench_loss.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = [torch.float32] if arguments.quick else [torch.float32, torch.bfloat16]
    shapes = [(64, 1000)] if arguments.quick else SHAPES[device]
    cases = [(rows, classes, dtype) for dtype in dtypes for rows, classes in shapes]
    console = Console()
    results = []
    for rows, classes, dtype in track(cases, "measuring", console=console):
        results.append(measure(rows, classes, dtype, device, arguments.repeats))
    show(results, console)
    record = {
        "command": "python benchmarks/bench_loss.py" + (" --quick" if arguments.quick else ""),
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
