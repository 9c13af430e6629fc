"""What can run here, times taken in turn, their ratios, and peak memory."""

import gc
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec

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


def has_triton(device: str, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether Triton is installed and, on a GPU, knows a type there."""
    if find_spec("triton") is None:
        return False
    is_new = device == "cpu" or torch.cuda.get_device_capability() >= (8, 0)
    return is_new or dtype != torch.bfloat16


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


def split_working(
    calls: Mapping[str, Callable[[], object]], prepare: Callable[[], object] = lambda: None
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Run every call once; return those that work, and what the others raise.

    A large shape may not fit the memory of a card, and other libraries have limits of their own.
    """
    working, failed = {}, {}
    for name, call in calls.items():
        prepare()
        try:
            call()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".split("\n")[0]
        else:
            working[name] = call
    return working, failed


def time_replays(
    call: Callable[[], object], repeats: int, prepare: Callable[[], object]
) -> list[float]:
    """Return the seconds that a GPU takes for a call without its host: replays of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return time_on_device({"": graph.replay}, repeats, prepare)[""]


def time_on_device(
    calls: Mapping[str, Callable[[], object]], repeats: int, prepare: Callable[[], object]
) -> dict[str, list[float]]:
    """Return the seconds of every call by a GPU's own clock, one after the other.

    What the host does for a call is hidden as far as `prepare` keeps the GPU busy.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            prepare()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
    return times


def ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return the median, and the 10th and 90th percentile, of ratios taken round by round."""
    return spread(own / other for own, other in zip(times, others, strict=True))


def spread(values: Iterable[float], factor: float = 1.0) -> dict[str, float]:
    """Return the median, and the 10th and 90th percentile, of numbers times a factor."""
    numbers = [value * factor for value in values]
    if len(numbers) == 1:
        numbers *= 2
    tenths = statistics.quantiles(numbers, n=10, method="inclusive")
    return {"median": statistics.median(numbers), "p10": tenths[0], "p90": tenths[-1]}


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
