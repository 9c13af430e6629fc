"""What a device does with the loss: the section "runtime" of `gpu.py`.

Nothing waits for the GPU, graphs can be captured, a gradient scaler works, and a class out of range
is an error that says so.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from gpu_findings import Findings, UnavailableError
from measuring import has_triton
from recording import ROOT
from regdrop import (
    RDropConfig,
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_l1_loss,
    rdrop_mse_loss,
    rdrop_smooth_l1_loss,
    rdrop_step,
    repeat_batch,
    symmetric_kl,
)

OUT_OF_RANGE = """
import torch
from regdrop import linear_rdrop_cross_entropy, rdrop_cross_entropy
impl, device = {impl!r}, {device!r}
target = torch.tensor([1, 7], device=device)
if impl == "fused":
    x, w = (torch.randn(n, 8, device=device, requires_grad=True) for n in (4, 5))
    loss = linear_rdrop_cross_entropy(x, w, target, alpha=1.0).loss
else:
    loss = rdrop_cross_entropy(torch.randn(4, 5, device=device), target, alpha=1.0, impl=impl).loss
print(loss.item())
"""
# What the library says of it, or torch's own kernel that reads by the class.
SAYS = ("class ind", "out of bounds")
# Of 64 rows of 40 classes or more: as many logits as go through functions of their own.
LARGE = 5000


def run(findings: Findings) -> None:
    device, quick = findings.device, findings.quick
    # Processes of their own, since a failed assertion takes the GPU away: they start first.
    wrong = {
        impl: _start(OUT_OF_RANGE.format(impl=impl, device=device))
        for impl in [*implementations(device), "fused"]
    }
    for name, loss in losses(device).items():
        findings.check(f"no synchronisation, {name}", partial(count_nothing, loss, device))
    for impl in ["auto", "fused"]:
        findings.check(f"float16 with a scaler, {impl}", partial(scale, impl, device, quick))
    for name, loss in graph_losses(device).items():
        findings.check(f"CUDA graph, {name}", partial(capture, loss, device))
    for impl, process in wrong.items():
        findings.check(f"a class out of range is an error, {impl}", partial(read_error, process))


def implementations(device: str) -> list[str]:
    """Return the closed forms that a GPU has, as far as they run here."""
    return ["chunked", *(["triton"] if device == "cuda" and has_triton(device) else [])]


def losses(device: str) -> dict[str, Callable[[], Tensor]]:
    """Return the public losses with ignored items, by name; torch's CTC waits by itself."""
    logits = torch.randn(64, 50, device=device, requires_grad=True)
    target = torch.randint(0, 50, (32,), device=device)
    target[::5] = -100
    weight = torch.rand(50, device=device)
    numbers = torch.rand(32, 50, device=device)
    hidden = torch.randn(64, 16, device=device, requires_grad=True)
    layer = torch.randn(50, 16, device=device, requires_grad=True)
    mask = numbers > 0.5
    model = nn.Sequential(nn.Linear(16, 50), nn.Dropout(0.5)).to(device)
    half = hidden.detach()[:32]
    count = torch.tensor(20.0, device=device)

    def classes(**options: object) -> Callable[[], Tensor]:
        return lambda: rdrop_cross_entropy(logits, target, alpha=1.0, **options).loss

    def fused(**options: object) -> Callable[[], Tensor]:
        return lambda: linear_rdrop_cross_entropy(hidden, layer, target, alpha=1.0, **options).loss

    found = {
        f"cross entropy, {impl}": classes(impl=impl) for impl in ["eager", *implementations(device)]
    }
    found |= {
        "cross entropy, weights and smoothing": classes(weight=weight, label_smoothing=0.1),
        "cross entropy, unlabelled items": classes(unlabelled_index=-1),
        "cross entropy, a count of items": classes(num_items=count),
        "cross entropy, one backward pass": classes(backward_passes=1),
        "cross entropy, probabilities": lambda: (
            rdrop_cross_entropy(logits, numbers.softmax(-1), alpha=1.0).loss
        ),
        "fused layer": fused(),
        "fused layer, weights and smoothing": fused(class_weight=weight, label_smoothing=0.1),
        "fused layer, one backward pass": fused(backward_passes=1),
        "fused layer, a count of items": fused(num_items=count),
        "fused layer, item by item": lambda: fused(reduction="none")().sum(),
        "binary cross entropy": lambda: (
            rdrop_binary_cross_entropy_with_logits(logits, numbers.round(), alpha=1.0).loss
        ),
        "binary cross entropy, mask": lambda: (
            rdrop_binary_cross_entropy_with_logits(
                logits, numbers.round(), alpha=1.0, mask=mask
            ).loss
        ),
        "symmetric KL": lambda: symmetric_kl(logits),
        "rdrop_step": lambda: (
            rdrop_step(model, half, target, config=RDropConfig(alpha=1.0), step=3).loss
        ),
    }
    if device == "cuda":
        found["cross entropy, chunked, large"] = lambda: (
            rdrop_cross_entropy(logits.repeat(1, LARGE), target, alpha=1.0, impl="chunked").loss
        )
    for loss in (rdrop_mse_loss, rdrop_l1_loss, rdrop_smooth_l1_loss):
        found[loss.__name__] = lambda loss=loss: loss(logits, numbers, alpha=1.0, mask=mask).loss
    return found


def count_nothing(loss: Callable[[], Tensor], device: str) -> str:
    """Run a loss and its backward; on a GPU an operation that waits for it raises."""
    (loss() * 1.5).backward()  # compiles, and warns of what it warns of once
    with raising_on_synchronisation(device):
        (loss() * 1.5).backward()
    return "" if device == "cuda" else "ran; a CPU has nothing to wait for"


@contextmanager
def raising_on_synchronisation(device: str) -> Iterator[None]:
    """Let every operation raise that makes the host wait for a GPU."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def graph_losses(device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return losses of (64, 40) numbers and 32 classes, by name."""
    layer = torch.randn(50, 40, device=device)

    def explicit(impl: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: rdrop_cross_entropy(x, y, alpha=1.0, impl=impl).loss

    return {
        **{impl: explicit(impl) for impl in implementations(device)},
        "chunked, large": lambda x, y: explicit("chunked")(x.repeat(1, LARGE), y),
        "fused": lambda x, y: linear_rdrop_cross_entropy(x, layer, y, alpha=1.0).loss,
    }


def capture(loss: Callable[[Tensor, Tensor], Tensor], device: str) -> str:
    """Capture loss and backward as a CUDA graph, and replay it on other numbers."""
    if device != "cuda":
        raise UnavailableError("CUDA graphs need a GPU")
    numbers = torch.randn(64, 40, device=device, requires_grad=True)
    target = torch.randint(0, 40, (32,), device=device)

    def compute() -> tuple[Tensor, Tensor]:
        value = loss(numbers, target)
        return value, torch.autograd.grad(value, numbers)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    with torch.no_grad():
        numbers.copy_(torch.randn(64, 40, device=device) * 3)
        target.copy_(torch.randint(0, 40, (32,), device=device))
        target[3] = -100
    graph.replay()
    for replayed, expected in zip(captured, compute(), strict=True):
        torch.testing.assert_close(replayed, expected, rtol=1e-5, atol=1e-7)
    return f"loss {captured[0].item():.5f}"


def scale(impl: str, device: str, quick: bool) -> str:
    """Train in float16 with a gradient scaler; many items make small gradients."""
    items, features, words = (8, 16, 50) if quick else (4096, 512, 32_000)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Dropout(0.1)).to(device)
    head = nn.Linear(features, words, bias=False).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler(device)
    inputs = torch.randn(items, features, device=device)
    target = torch.randint(0, words, (items,), device=device)
    seen = []
    for _ in range(12):
        with torch.autocast(device, torch.float16):
            hidden = model(repeat_batch(inputs))
            if impl == "fused":
                output = linear_rdrop_cross_entropy(hidden, head.weight, target, alpha=1.0)
            else:
                output = rdrop_cross_entropy(head(hidden), target, alpha=1.0, inplace=True)
        scaler.scale(output.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append(output.nll.item())
    assert seen[-1] < 0.8 * seen[0], f"the likelihood's term went from {seen[0]} to {seen[-1]}"
    assert scaler.get_scale() >= 1024, f"the scale fell to {scaler.get_scale()}"
    return f"nll {seen[0]:.3f} to {seen[-1]:.3f}, scale {scaler.get_scale():.0f}"


def read_error(process: subprocess.Popen[str]) -> str:
    """Return the error of another process, which names what is wrong."""
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0, f"nothing was raised: {output[-200:]}"
    lines = [line.strip() for line in output.splitlines() if any(words in line for words in SAYS)]
    assert lines, f"the error does not say so: {output[-300:]}"
    return lines[0][-160:]


def _start(code: str) -> subprocess.Popen[str]:
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
