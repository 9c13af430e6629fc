"""Ways to lay out the Triton kernel's work, side by side: the section "tuning" of `gpu.py`.

It is not among the sections that run by default: it is for choosing `triton_rows.TUNING` on a card.
Forward and backward in place are timed apart, on the device alone.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_findings import Findings, UnavailableError
from measuring import ratio, spread, time_on_device
from recording import Row
from regdrop.kernels import Target

# By name, what differs from the default.
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "one sum a row": {"lane_bytes": None},
    "backward from the first item on": {"reverse": False},
    "forward, 3 stages": {"stages": 3},
    "forward, 8192 numbers": {"forward_elements": 8192},
    "forward, 8192 numbers, 16 warps": {"forward_elements": 8192, "forward_warps": 16},
    "forward, 4 warps": {"forward_warps": 4},
    "backward, 8192 numbers": {"backward_elements": 8192},
    "backward, 2048 numbers, 4 warps": {"backward_elements": 2048, "backward_warps": 4},
    "backward, 4 warps": {"backward_warps": 4},
}
SHAPES = [(4096, 32_000), (16_384, 32_000), (2048, 128_256)]
REPEATS = 10
# Of the logits: read twice and written once, where a copy reads and writes them.
MOVED, COPIED = 3, 2


def run(findings: Findings) -> None:
    for items, classes in SHAPES:
        call = partial(measure, findings, items, classes)
        findings.check(f"tuning, 2 x {items} x {classes:,}", call)


def measure(findings: Findings, items: int, classes: int) -> str:
    """Time all ways on one shape in bfloat16, once their gradients agree."""
    if findings.device != "cuda":
        raise UnavailableError("the kernel's layout is one of a GPU")
    from regdrop.kernels.triton_rows import TUNING, triton_kernel

    device = torch.device("cuda")
    source = torch.randn(2, items, classes, dtype=torch.bfloat16, device=device).mul_(2)
    target = Target(torch.randint(0, classes, (items,), device=device), None, None, 0.0, None)
    work, floor = torch.empty_like(source), torch.empty_like(source)
    grads = (torch.full((items,), 1.0, device=device), torch.full((items,), 0.5, device=device))
    refill = partial(work.copy_, source)
    calls, statistics = {"copy": partial(floor.copy_, work)}, {}
    expected: Tensor | None = None
    for name, changes in CHANGES.items():
        kernel = triton_kernel(device, TUNING._replace(**changes))
        refill()
        statistics[name] = kernel.forward(work, target)[2]
        backward = partial(
            kernel.backward, work, work, target, statistics[name], *grads, backward_passes=2
        )
        backward()
        sample = work[:, :: items // 8].float()
        expected = sample if expected is None else expected
        torch.testing.assert_close(sample, expected, rtol=2e-2, atol=1e-6)
        calls[f"{name}/forward"] = partial(kernel.forward, work, target)
        calls[f"{name}/backward"] = backward
    times = time_on_device(calls, REPEATS, refill)
    floors = [MOVED / COPIED * seconds for seconds in times["copy"]]
    rows: list[Row] = []
    for name in CHANGES:
        forward, backward = (times[f"{name}/{part}"] for part in ("forward", "backward"))
        both = [a + b for a, b in zip(forward, backward, strict=True)]
        rows.append(
            {
                "items": items,
                "classes": classes,
                "dtype": "bfloat16",
                "variant": name,
                "forward_milliseconds": spread(forward, 1e3),
                "backward_milliseconds": spread(backward, 1e3),
                "share_of_copy_bandwidth": ratio(floors, both),
            }
        )
        print("{variant}: {forward_milliseconds} {backward_milliseconds}".format(**rows[-1]))
    findings.add(rows)
    shares = {row["variant"]: row["share_of_copy_bandwidth"]["median"] for row in rows}
    best = max(shares, key=lambda name: shares[name])
    return f"best {shares[best]:.0%} ({best}), default {shares['default']:.0%} of the bandwidth"
