"""What torch.compile makes of the loss, slowly: the section "compiled" of `gpu.py`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gpu_accuracy import BF16, F32, Case, compare
from gpu_findings import Findings
from regdrop import rdrop_cross_entropy


def run(findings: Findings) -> None:
    device, quick = findings.device, findings.quick
    findings.check("torch.compile of model and loss", partial(compile_step, device, quick))
    for dtype in [] if quick else [F32, BF16]:
        case = Case(dtype, 32_000, label_smoothing=0.1)
        findings.check(f"accuracy, compiled, {case}", partial(compare, case, device, ["compiled"]))


def compile_step(device: str, quick: bool) -> str:
    """Compile model and loss in one; the result is that of the parts."""
    items, features, classes = (8, 16, 50) if quick else (512, 256, 5000)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, features), nn.GELU(), nn.Linear(features, classes))
    model.to(device)
    # What differs between the passes is given, so that both ways compute the same.
    inputs = torch.randn(2 * items, features, device=device)
    target = torch.randint(0, classes, (items,), device=device)
    target[::7] = -100

    def compute(inputs: Tensor, target: Tensor) -> Tensor:
        return rdrop_cross_entropy(model(inputs), target, alpha=1.0).loss

    def results(function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        loss = function(inputs, target)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(compute, backend=backend, fullgraph=True)
    for found, expected in zip(results(compiled), results(compute), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    return f"{backend}, loss {results(compiled)[0].item():.5f}"
