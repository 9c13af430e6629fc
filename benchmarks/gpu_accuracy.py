"""Every kernel on the device against float64: the section "accuracy" of `gpu.py`."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_findings import Findings, UnavailableError
from measuring import has_triton
from regdrop import linear_rdrop_cross_entropy, rdrop_cross_entropy

ALPHA, UPSTREAM = 1.0, 3.7
# Of the loss, relative; of a gradient, in times of its norm: the rounding of its type.
LOSS_BOUND = 1e-6
GRADIENT_BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of the loss of a layer whose products are rounded to a type: a mean of as many errors of either
# sign as there are items. Explicit logits, rounded once more by a softcap, are no measure of it.
LINEAR_LOSS_BOUND = {F32: 2e-6, BF16: 3e-4, F16: 5e-5}


@dataclass(frozen=True)
class Case:
    """One problem; an item of 13 is ignored."""

    dtype: torch.dtype
    classes: int
    num_passes: int = 2
    label_smoothing: float = 0.0
    weighted: bool = False
    inplace: bool = False
    backward_passes: int | None = None
    unlabelled: bool = False
    probabilities: bool = False
    items: int = 64

    def __str__(self) -> str:
        options = [
            name
            for name in ("weighted", "inplace", "unlabelled", "probabilities")
            if getattr(self, name)
        ]
        if self.label_smoothing:
            options.append(f"smoothing {self.label_smoothing}")
        if self.backward_passes is not None:
            options.append(f"{self.backward_passes} backward")
        shape = f"{self.num_passes} x {self.items} x {self.classes} {_name(self.dtype)}"
        return ", ".join([shape, *options])


CASES = [
    Case(F32, 2),
    Case(F32, 103, 3, 0.1, weighted=True),
    Case(F32, 1000, probabilities=True),
    Case(F32, 32_000, label_smoothing=0.1, inplace=True),
    Case(F32, 50_257, backward_passes=1),
    Case(F32, 128_256, label_smoothing=0.1, weighted=True),
    Case(F32, 256_000, inplace=True),
    Case(BF16, 1000, label_smoothing=0.1),
    Case(BF16, 32_000, 3, 0.1, weighted=True),
    Case(BF16, 32_001, unlabelled=True),
    Case(BF16, 128_256, inplace=True),
    Case(BF16, 256_000, label_smoothing=0.1, inplace=True, backward_passes=1),
    Case(F16, 9, 4, weighted=True),
    Case(F16, 50_257, label_smoothing=0.1, inplace=True),
    Case(F16, 128_256, label_smoothing=0.1),
    # Many rows: other blocks, and more programs than a GPU runs at once.
    Case(F32, 3, items=20_000),
    Case(BF16, 1000, items=5000, inplace=True),
]
TINY_CASES = [Case(F32, 9, 3, 0.1, weighted=True, items=15), Case(F32, 60, inplace=True, items=15)]


@dataclass(frozen=True)
class LinearCase:
    """One problem of the fused last layer; an item of 13 is ignored."""

    dtype: torch.dtype
    words: int
    features: int = 256
    items: int = 200
    softcap: float | None = None
    biased: bool = False
    label_smoothing: float = 0.0
    backward_passes: int | None = None

    def __str__(self) -> str:
        shape = f"2 x {self.items} x {self.features}, {self.words} words, {_name(self.dtype)}"
        return f"{shape}, softcap {self.softcap}, {self.backward_passes or 2} backward"


LINEAR_CASES = [
    LinearCase(F32, 32_000, biased=True, label_smoothing=0.1),
    LinearCase(F32, 1001, features=64, items=3000, softcap=30.0),
    LinearCase(BF16, 50_257, softcap=30.0),
    LinearCase(BF16, 128_256, items=1500, label_smoothing=0.1),
    LinearCase(BF16, 128_256, items=1500, backward_passes=1),
    LinearCase(BF16, 256_000, items=1000, biased=True),
    LinearCase(F16, 32_000, items=2500),
    LinearCase(F16, 5008, softcap=20.0),
]
TINY_LINEAR_CASES = [LinearCase(F32, 60, features=8, items=15, biased=True, softcap=3.0)]


def run(findings: Findings) -> None:
    device, quick = findings.device, findings.quick
    for case in TINY_CASES if quick else CASES:
        implementations = ["eager", "chunked", "auto"]
        if has_triton(device, case.dtype):
            implementations.append("triton")
        findings.check(f"accuracy, {case}", partial(compare, case, device, implementations))
    for linear in TINY_LINEAR_CASES if quick else LINEAR_CASES:
        findings.check(f"fused layer, {linear}", partial(compare_linear, linear, device))
    findings.check("more than 2^31 elements, in place", partial(exceed_32_bits, device))


def compare(case: Case, device: str, implementations: list[str]) -> str:
    """Compare loss and gradient of one problem with those in float64 of the same logits."""
    logits, target, options = draw(case, device)
    truth = measure(logits.double(), target, impl="eager", **options)
    seen = []
    for impl in implementations:
        inplace = case.inplace and impl != "eager"
        found = measure(logits, target, impl=impl, inplace=inplace, **options)
        errors = _relative(found[0], truth[0]), _relative(found[1], truth[1])
        _assert_within(errors[0], LOSS_BOUND, f"loss of {impl}")
        _assert_within(errors[1], GRADIENT_BOUND[case.dtype], f"gradient of {impl}")
        seen.append("{} {:.1e} {:.1e}".format(impl, *errors))
    return "; ".join(seen)


def draw(case: Case, device: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return logits, the target and the options of a problem."""
    generator = torch.Generator(device).manual_seed(0)
    on_device = {"generator": generator, "device": device}
    rows = case.num_passes * case.items
    logits = torch.randn(rows, case.classes, **on_device).mul_(2).to(case.dtype)
    options: dict[str, Any] = {
        "num_passes": case.num_passes,
        "label_smoothing": case.label_smoothing,
        "backward_passes": case.backward_passes,
    }
    if case.weighted:
        options["weight"] = torch.rand(case.classes, **on_device) + 0.5
    if case.probabilities:
        return logits, torch.rand(case.items, case.classes, **on_device).softmax(-1), options
    target = torch.randint(0, case.classes, (case.items,), **on_device)
    target[::13] = -100
    if case.unlabelled:
        target[1::13] = -1
        options["unlabelled_index"] = -1
    return logits, target, options


def measure(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of the logits, under a gradient that is not 1."""
    leaf = logits.detach().clone().requires_grad_()
    behind = leaf.view_as(leaf)
    loss = rdrop_cross_entropy(behind, target, alpha=ALPHA, **options).loss
    return loss.detach(), torch.autograd.grad(loss * UPSTREAM, behind)[0]


def compare_linear(case: LinearCase, device: str) -> str:
    """Compare the fused layer with float64, beside explicit logits in its own type."""
    generator = torch.Generator(device).manual_seed(0)
    on_device = {"generator": generator, "device": device}
    hidden = torch.randn(2 * case.items, case.features, **on_device)
    weight = torch.randn(case.words, case.features, **on_device) * 2 / case.features**0.5
    tensors = [hidden, weight]
    if case.biased:
        tensors.append(torch.randn(case.words, **on_device))
    tensors = [x.to(case.dtype) for x in tensors]
    target = torch.randint(0, case.words, (case.items,), **on_device)
    target[::13] = -100
    options = {"label_smoothing": case.label_smoothing, "backward_passes": case.backward_passes}

    def fused(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_rdrop_cross_entropy(
            hidden, weight, target, alpha=ALPHA, bias=bias, softcap=case.softcap, **options
        ).loss

    def explicit(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        return rdrop_cross_entropy(logits, target, alpha=ALPHA, impl="chunked", **options).loss

    truth = _with_gradients(explicit, [x.double() for x in tensors])
    ours, plain = (
        [_relative(a, b) for a, b in zip(_with_gradients(f, tensors), truth, strict=True)]
        for f in (fused, explicit)
    )
    _assert_within(ours[0], LINEAR_LOSS_BOUND[case.dtype], "loss")
    for own, other in zip(ours[1:], plain[1:], strict=True):
        # Products are summed up in another order.
        _assert_within(own, 1.5 * other + LOSS_BOUND, "gradient, beside explicit logits,")
    return "; ".join(
        f"{name} " + " ".join(f"{x:.1e}" for x in errors)
        for name, errors in (("fused", ours), ("explicit", plain))
    )


def exceed_32_bits(device: str) -> str:
    """Compare items at both ends of logits that no 32-bit offset reaches with float64."""
    classes, items = 32_000, 36_000
    if device != "cuda" or torch.cuda.mem_get_info()[0] < 12 * 2**30:
        raise UnavailableError("needs a GPU with 12 GiB free")
    logits = torch.randn(2 * items, classes, dtype=BF16, device=device)
    target = torch.randint(0, classes, (items,), device=device)
    chosen = torch.tensor([0, 1, items // 2, items - 2, items - 1], device=device)
    rows = torch.cat([chosen, chosen + items])
    before = logits[rows].double().requires_grad_()
    leaf = logits.requires_grad_()
    behind = leaf.view_as(leaf)
    loss = rdrop_cross_entropy(behind, target, alpha=ALPHA, inplace=True).loss
    (grad,) = torch.autograd.grad(loss * items, behind)
    small = rdrop_cross_entropy(
        before, target[chosen], alpha=ALPHA, reduction="sum", impl="eager"
    ).loss
    small.backward()
    error = _relative(grad[rows], before.grad)
    _assert_within(error, GRADIENT_BOUND[BF16], "gradient")
    assert math.isfinite(loss.item()), f"the loss is {loss.item()}"
    return f"{logits.numel():.2e} elements, gradient {error:.1e}"


def _with_gradients(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss * UPSTREAM, leaves)]


def _relative(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def _assert_within(error: float, bound: float, what: str) -> None:
    # A nan is within nothing.
    assert error <= bound, f"{what} is off by {error:.2e}, at most {bound:.1e} is rounding"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
