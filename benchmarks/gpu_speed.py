"""What the loss, the last layer and whole steps cost: four sections of `gpu.py`.

They are the benchmarks of the same names on the shapes of a GPU. What the aims are about comes
first: a section may run out of time.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch

import bench_fused_linear
import bench_loss
import bench_step
from gpu_findings import Findings
from recording import Row

F32, BF16 = torch.float32, torch.bfloat16
# Items a pass, classes, type.
SMALL = [(*shape, F32) for shape in bench_loss.SMALL]  # the host rules: any type takes as long
LARGE = [
    (4096, 32_000, BF16),
    (4096, 32_000, F32),
    (2048, 128_256, BF16),
    (2048, 128_256, F32),
    (1024, 256_000, BF16),
    (16_384, 32_000, BF16),
    (2048, 2000, F32),
    (8192, 10_000, BF16),
    (256, 32_000, BF16),
    (4096, 128_256, BF16),
]
# torch.compile takes half a minute for a shape: at one it is measured, beside few other ways.
COMPILED_AT = (4096, 32_000)
COMPILED = ("compiled", "compiled, in place")
WITH_COMPILED = (bench_loss.OFFICIAL, "chunked", "compiled")
# A C++ compiler is not asked for.
WITHOUT = ("C++", "C++, in place", "fused, C++")
FOREIGN = ("Apple's", "Liger's")


def loss(findings: Findings) -> None:
    shapes = [(8, 50, F32)] if findings.quick else [*SMALL, *LARGE]
    for items, classes, dtype in shapes:
        repeats = 25 if items * classes < 2**22 else 6
        _measure_loss(findings, (items, classes, dtype), (*WITHOUT, *COMPILED), repeats)


def compiled_loss(findings: Findings) -> None:
    if findings.quick:
        return findings.skip("loss, compiled", "it compiles for half a minute")
    for dtype in (BF16, F32):
        ways = bench_loss.variants(findings.device, dtype)
        without = [name for name in ways if name not in WITH_COMPILED]
        _measure_loss(findings, (*COMPILED_AT, dtype), without, repeats=6)


def _measure_loss(
    findings: Findings,
    shape: tuple[int, int, torch.dtype],
    without: Collection[str],
    repeats: int,
) -> None:
    items, classes, dtype = shape
    measure = partial(bench_loss.measure, items, classes, dtype, without=without)
    title = f"loss, 2 x {items} x {classes:,} {_name(dtype)}"
    _keep(findings, title, partial(measure, repeats=repeats))


def fused_linear(findings: Findings) -> None:
    # The smallest has no aim.
    shapes = [(8, 16, 50)] if findings.quick else bench_fused_linear.ON_GPU[::-1]
    dtype = F32 if findings.quick else BF16
    for items, features, words in shapes:
        measure = partial(
            bench_fused_linear.measure, items, features, words, dtype, without=WITHOUT
        )
        title = f"last layer, 2 x {items} x {features}, {words:,} words, {_name(dtype)}"
        _keep(findings, title, partial(measure, repeats=6))


def step(findings: Findings) -> None:
    sizes = [bench_step.SMALLEST] if findings.quick else bench_step.SIZES["cuda"]
    # Of the large models bfloat16 alone: float32 would take minutes.
    cases = [(size, True) for size in sizes] + ([] if findings.quick else [(sizes[0], False)])
    for size, half in cases:
        measure = partial(bench_step.measure, size, half)
        title = f"step, {size.width} wide, {size.layers} + {size.layers} layers"
        _keep(
            findings,
            f"{title}, {'bfloat16' if half else 'float32'}",
            partial(measure, repeats=4),
        )


def _keep(findings: Findings, title: str, measure: Callable[..., Sequence[Row]]) -> None:
    """Measure a shape, keep its rows, and check that everything of ours runs there."""

    def call() -> str:
        repeats = {"repeats": 1} if findings.quick else {}
        rows = measure(device=findings.device, **repeats)
        findings.add(rows)
        if findings.device == "cuda":
            torch.cuda.empty_cache()
        return _assert_ours_run(rows)

    findings.check(title, call)


def _assert_ours_run(rows: Collection[Row]) -> str:
    failed = {row["variant"]: row["failed"] for row in rows if "failed" in row}
    ours = {
        name: why
        for name, why in failed.items()
        if not name.startswith(FOREIGN) and not why.startswith("OutOfMemoryError")
    }
    assert not ours, "; ".join(f"{name}: {why}" for name, why in ours.items())
    ran = f"{len(rows) - len(failed)} ways"
    return "; ".join([ran, *(f"not {name}: {why}" for name, why in failed.items())])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
