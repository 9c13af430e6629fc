"""What the loss, the last layer and whole steps cost: three sections of `gpu.py`.

They are the benchmarks of the same names on the shapes of a GPU.
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
SMALL = [
    (items, classes, dtype)
    for items, classes in ((8, 2), (32, 3), (512, 30), (32, 1000))
    for dtype in (F32, BF16)
]
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
# torch.compile takes half a minute for a shape: at one it is measured.
COMPILED_AT = (4096, 32_000)
COMPILED = ("compiled", "compiled, in place")
# A C++ compiler is not asked for.
WITHOUT = ("C++", "C++, in place", "fused, C++")
FOREIGN = ("Apple's", "Liger's")


def loss(findings: Findings) -> None:
    shapes = [(8, 50, F32)] if findings.quick else [*LARGE[:2], *SMALL, *LARGE[2:]]
    for items, classes, dtype in shapes:
        without = WITHOUT if (items, classes) == COMPILED_AT else (*WITHOUT, *COMPILED)
        repeats = 25 if items * classes < 2**22 else 10
        measure = partial(bench_loss.measure, items, classes, dtype, without=without)
        title = f"loss, 2 x {items} x {classes:,} {_name(dtype)}"
        _keep(findings, title, partial(measure, repeats=repeats))


def fused_linear(findings: Findings) -> None:
    shapes = [(8, 16, 50)] if findings.quick else bench_fused_linear.ON_GPU
    dtype = F32 if findings.quick else BF16
    for items, features, words in shapes:
        measure = partial(
            bench_fused_linear.measure, items, features, words, dtype, without=WITHOUT
        )
        title = f"last layer, 2 x {items} x {features}, {words:,} words, {_name(dtype)}"
        _keep(findings, title, partial(measure, repeats=8))


def step(findings: Findings) -> None:
    sizes = [bench_step.SMALLEST] if findings.quick else bench_step.SIZES["cuda"]
    # Of the large models bfloat16 alone: float32 would take minutes.
    cases = [(size, True) for size in sizes] + ([] if findings.quick else [(sizes[0], False)])
    for size, half in cases:
        repeats = 7 if size == sizes[0] else 5
        measure = partial(bench_step.measure, size, half)
        title = f"step, {size.width} wide, {size.layers} + {size.layers} layers"
        _keep(
            findings,
            f"{title}, {'bfloat16' if half else 'float32'}",
            partial(measure, repeats=repeats),
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
