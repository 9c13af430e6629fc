"""What can run here, times taken in turn, their ratios, and peak memory."""

import gc
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.cpp_extension import is_ninja_available


def has_compiler() -> bool:
    """Return whether torch.compile finds a C++ compiler."""
    return any(map(shutil.which, ("c++", "g++", "clang++")))


def can_build_cpp() -> bool:
    """Return whether the C++ kernel runs here: on a CPU, with what it takes to build it."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    return not torch.cuda.is_available() and bool(shutil.which(compiler)) and is_ninja_available()


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Return the seconds of every call, one after the other, `repeats` times.

    A first round, which warms up and compiles, is not kept; nor is the time of `prepare`, which
    goes before every call.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            prepare()
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return the median, and the 10th and 90th percentile, of ratios taken round by round."""
    ratios = [own / other for own, other in zip(times, others, strict=True)]
    if len(ratios) == 1:
        ratios *= 2
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    return {"median": statistics.median(ratios), "p10": tenths[0], "p90": tenths[-1]}


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
    current = highest = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        highest = max(highest, current)
    return highest
