"""The elementwise functions that torch compiles for a GPU, compiled for the CPU by a C++ compiler.

Their text is the same, so that all but the start of the functions is tested without a GPU.
"""

import ctypes
import os
import re
import subprocess
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from implementations import WHY_NO_CPP
from regdrop.kernels import jitted_rows, selection
from regdrop.kernels.chunked import chunked_kernel
from regdrop.kernels.closed_form import closed_form_sum, closed_form_terms
from regdrop.kernels.target import Target

pytestmark = pytest.mark.skipif(WHY_NO_CPP != "", reason=WHY_NO_CPP)
ITEMS, CLASSES = 40, 23
# Of the norm: the rounding of a type.
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class ElementwiseCompiler:
    """Compiles functions once, and calls them as torch does on a GPU."""

    def __init__(self, folder):
        self.folder, self.built, self.calls = folder, {}, []

    def __call__(self, text, num_outputs):
        if text not in self.built:
            self.built[text] = self._build(text)
        return partial(self._run, text, num_outputs)

    def _build(self, text):
        name = re.search(r"void (\w+)\(", text)[1]
        count = text[: text.index(")")].count(",") + 1
        values = ", ".join(f"memory[{i}][k]" for i in range(count))
        starts = "".join(
            f'extern "C" void {name}_{kind}(long n, {kind}** memory) '
            f"{{ for (long k = 0; k < n; ++k) {name}<{kind}>({values}); }}\n"
            for kind in ("float", "double")
        )
        source = self.folder / f"{name}.cpp"
        source.write_text(f"#include <math.h>\n{text}\n{starts}")
        library = source.with_suffix(".so")
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        found = ctypes.CDLL(str(library))
        return {kind: getattr(found, f"{name}_{kind}") for kind in ("float", "double")}

    def _run(self, text, num_outputs, *tensors):
        assert len(tensors) <= 8  # as many as torch takes
        dtype = torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        inputs = [x.to(dtype).contiguous() for x in torch.broadcast_tensors(*tensors)]
        outputs = [torch.empty_like(inputs[0]) for _ in range(num_outputs)]
        pointers = [x.data_ptr() for x in (*inputs, *outputs)]
        start = self.built[text]["double" if dtype == torch.float64 else "float"]
        start(ctypes.c_long(inputs[0].numel()), (ctypes.c_void_p * len(pointers))(*pointers))
        self.calls.append(text)
        return outputs[0] if num_outputs == 1 else tuple(outputs)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    return ElementwiseCompiler(tmp_path_factory.mktemp("elementwise"))


@pytest.fixture
def kernel(compiler):
    compiler.calls.clear()
    return jitted_rows.jitted_kernel(compiler, least_logits=0, smallest_block=1)


def draw(dtype=torch.float32, num_passes=2, constant=0.0):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_passes, ITEMS, CLASSES, generator=generator) * 3
    logits += constant * torch.randn(num_passes, ITEMS, 1, generator=generator)
    classes = torch.randint(0, CLASSES, (ITEMS,), generator=generator)
    return logits.to(dtype), Target(classes, None, None, 0.0, None)


def measure(kernel, logits, target, backward_passes=2, inplace=False):
    """Return both terms of each item, and the gradient of a mixture of them."""
    leaf = logits.clone().requires_grad_()
    nll, kl = closed_form_terms(
        leaf * 1, target, kernel, backward_passes=backward_passes, inplace=inplace
    )
    items = torch.linspace(0.5, 1.5, ITEMS, dtype=nll.dtype, device=nll.device)
    (gradient,) = torch.autograd.grad((nll * items + kl * items.flip(0)).sum(), leaf)
    return nll, kl, gradient


def assert_alike(found, truth, dtype):
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        bound = BOUNDS[dtype] if i == 2 else max(1e-14, min(1e-6, BOUNDS[dtype]))
        assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def test_a_target_of_the_least_finite_number_costs_as_much(kernel):
    logits, target = draw()
    least = torch.finfo(torch.float32).min
    logits[:, 0, target.classes[0]] = least
    nll, _, _ = kernel.forward(logits, target)
    assert nll[0] == -least


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("constant", [0.0, 100.0])
@pytest.mark.parametrize("backward_passes", [2, 1])
def test_terms_and_gradient_are_those_of_float64(
    kernel, compiler, dtype, constant, backward_passes
):
    logits, target = draw(dtype, constant=constant)
    found = measure(kernel, logits, target, backward_passes)
    truth = measure(chunked_kernel(), logits.double(), target, backward_passes)
    assert_alike(found, truth, dtype)
    assert {jitted_rows.WEIGH, jitted_rows.GRADE} == set(compiler.calls)
    assert len(compiler.calls) == 2 * 4 + 1  # of four blocks, and the targets' classes


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("is_ignored", [False, True])
@pytest.mark.parametrize(
    ("label_smoothing", "weight"),
    [(0.0, None), (0.1, None), (0.0, torch.linspace(0.1, 2, CLASSES))],
    ids=["plain", "smoothed", "weighted"],
)
def test_every_target_of_classes(kernel, inplace, is_ignored, label_smoothing, weight):
    logits, target = draw()
    target = target._replace(label_smoothing=label_smoothing, weight=weight)
    if is_ignored:
        target = target._replace(valid=torch.arange(ITEMS) % 3 > 0)
        logits[:, ~target.valid] = torch.nan
    found = measure(kernel, logits, target, inplace=inplace)
    if is_ignored:
        logits = logits.nan_to_num()
        assert not found[2][:, ~target.valid].any()
    assert_alike(found, measure(chunked_kernel(), logits.double(), target), torch.float32)


@pytest.mark.parametrize(("nll_weight", "kl_weight"), [(1.0, None), (None, 2.0), (0.5, 2.0)])
def test_either_term_alone(kernel, nll_weight, kl_weight):
    logits, target = draw()
    target = target._replace(label_smoothing=0.1)
    found = []
    for used, given in ((kernel, logits), (chunked_kernel(), logits.double())):
        leaf = given.clone().requires_grad_()
        loss, _, _ = closed_form_sum(
            leaf,
            target,
            used,
            nll_weight=nll_weight,
            kl_weight=kl_weight,
            backward_passes=2,
            inplace=False,
        )
        found.append((loss.detach(), loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert_alike(*found, torch.float32)


def test_a_class_masked_in_both_passes_costs_nothing(kernel):
    logits, target = draw()
    target = target._replace(classes=target.classes.clamp(min=2))
    logits[:, :, 1] = -torch.inf
    found = measure(kernel, logits, target)
    assert not found[2][:, :, 1].any()
    assert_alike(found, measure(chunked_kernel(), logits.double(), target), torch.float32)


@pytest.mark.parametrize("other", [0.0, -500.0], ids=["likely", "so unlikely that its odds are 0"])
def test_a_class_masked_in_one_pass_only_is_infinitely_far(kernel, other):
    logits, target = draw()
    logits[0, 3, 5], logits[1, 3, 5] = -torch.inf, other
    kl = kernel.forward(logits, target._replace(classes=torch.zeros_like(target.classes)))[1]
    assert kl[3] > 1e30
    assert kl[torch.arange(ITEMS) != 3].max() < 100


def test_no_number_is_read():
    """Tensors of the meta device hold none."""

    def compiler(text, num_outputs):
        return lambda *tensors: [torch.broadcast_tensors(*tensors)[0].clone()] * num_outputs

    kernel = jitted_rows.jitted_kernel(compiler, least_logits=0)
    logits, target = (x.to("meta") if isinstance(x, torch.Tensor) else x for x in draw())
    classes, valid = torch.zeros(2, ITEMS, dtype=torch.long, device="meta")
    target = target._replace(classes=classes, valid=valid == 0)
    assert all(x.device.type == "meta" for x in measure(kernel, logits, target))


def test_what_has_no_function_is_left_to_the_chunked_form(kernel, compiler):
    logits, target = draw()
    weight = torch.linspace(0.1, 2, CLASSES)
    others = [
        (draw(num_passes=3)[0], target),
        (logits, target._replace(label_smoothing=0.1, weight=weight)),
        (logits, target._replace(classes=None, probabilities=logits[0].softmax(-1))),
    ]
    for given, aim in others:
        passes = len(given)
        found = measure(kernel, given, aim, backward_passes=passes)
        truth = measure(chunked_kernel(), given, aim, backward_passes=passes)
        assert all(map(torch.equal, found, truth))
    small = jitted_rows.jitted_kernel(compiler, least_logits=logits.numel() + 1)
    measure(small, logits, target)
    assert compiler.calls == []


def test_it_is_the_chunked_form_of_a_gpu_that_compiles(monkeypatch):
    gpu = torch.device("cuda", 0)
    seen = []
    monkeypatch.setattr(selection, "can_compile_elementwise", lambda device: seen.append(device))
    assert selection.select_kernel("chunked", gpu).backward.func is not jitted_rows._backward
    monkeypatch.setattr(selection, "can_compile_elementwise", lambda device: True)
    assert selection.select_kernel("chunked", gpu).backward.func is jitted_rows._backward
    assert seen == [gpu]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_device_but_a_gpu_compiles_them():
    devices = ("cpu", "meta", "mps", "cuda")
    assert not any(map(jitted_rows.can_compile_elementwise, map(torch.device, devices)))


@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_in_a_checkpoint_is_that_without(kernel, compiler, inplace):
    logits, target = draw(torch.float64)

    def loss(x):
        nll, kl = closed_form_terms(x * 1, target, kernel, backward_passes=2, inplace=inplace)
        return (nll + kl).sum()

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    (found,) = torch.autograd.grad(checkpoint(loss, leaf, use_reentrant=False), leaf)
    assert jitted_rows.GRADE in compiler.calls
    torch.testing.assert_close(found, expected)
