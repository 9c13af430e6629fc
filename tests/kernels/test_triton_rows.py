"""The Triton kernel: on a GPU where there is one, else interpreted on the CPU."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import implementations
from implementations import gradient
from regdrop import rdrop_cross_entropy
from regdrop.kernels import Target, rdrop_terms, selection

pytest.importorskip("triton", reason="triton is not installed")
triton_rows = pytest.importorskip("regdrop.kernels.triton_rows")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(*sizes, **options):
    return tuple(x.to(DEVICE) for x in implementations.make(*sizes, **options))


def set_tiles(patch, elements):
    """Let a tile be of so many elements: several a row."""
    patch.setattr(triton_rows, "FORWARD_ELEMENTS", elements)
    patch.setattr(triton_rows, "BACKWARD_ELEMENTS", elements)


@pytest.fixture
def small_tiles(monkeypatch):
    set_tiles(monkeypatch, 64)


@pytest.mark.parametrize("num_passes", [2, 3])
def test_gradcheck_over_several_tiles(num_passes, monkeypatch):
    set_tiles(monkeypatch, 8)
    logits, target = make(num_passes, 1, 5)
    options = {"alpha": 1.3, "num_passes": num_passes, "label_smoothing": 0.1, "impl": "triton"}

    def loss(x):
        return rdrop_cross_entropy(x, target, **options).loss

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (3, 1000), (2, 9001)])
@pytest.mark.parametrize(("num_passes", "inplace"), [(2, False), (2, True), (3, False)])
def test_error_is_at_most_that_of_eager(dtype, shape, num_passes, inplace):
    """Against float64 on the same rounded logits, with ignored rows and an upstream gradient."""
    logits, target = make(num_passes, *shape, ignored=[1], dtype=dtype)
    options = {"alpha": 1.0, "num_passes": num_passes, "label_smoothing": 0.1}
    upstream = 3.7
    truth = rdrop_cross_entropy(logits.double(), target, impl="eager", **options)
    true_grad = gradient(logits.double(), target, upstream, impl="eager", **options)
    errors = []
    for choice in ({"impl": "triton", "inplace": inplace}, {"impl": "eager"}):
        output = rdrop_cross_entropy(logits, target, **choice, **options)
        grad = gradient(logits, target, upstream, **choice, **options)
        assert output.loss.dtype == torch.float32
        assert grad.dtype == dtype
        errors.append(
            [
                (output.kl - truth.kl).abs().item(),
                (output.nll - truth.nll).abs().item(),
                (grad.double() - true_grad).norm().item(),
            ]
        )
    # One rounding of the result is granted where both are that close.
    slack = [truth.kl.item() * 2e-7, truth.nll.item() * 2e-7, true_grad.norm().item() * 1e-7]
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        # The interpreter cuts digits off where a GPU rounds to bfloat16: up to one unit, not half.
        grad = gradient(logits, target, upstream, impl="triton", inplace=inplace, **options)
        wrong = (grad.double() - true_grad).abs()
        assert (wrong <= true_grad.abs() * 2**-7 + slack[2]).all()
        slack[2] = math.inf
    for ours, eager, granted in zip(*errors, slack, strict=True):
        assert ours <= eager + granted


def test_a_lone_class_is_certain_and_has_no_gradient():
    logits, target = make(2, 3, 1)
    output = rdrop_cross_entropy(logits, target, alpha=1.0, impl="triton")
    assert output.loss == output.nll == output.kl == 0
    assert torch.equal(gradient(logits, target, alpha=1.0, impl="triton"), logits * 0)


@settings(max_examples=12, deadline=None)
@given(
    num_passes=st.integers(1, 5),
    batch=st.integers(0, 2),
    classes=st.integers(1, 50),
    backward_passes=st.integers(1, 5),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.booleans(),
    probabilities=st.booleans(),
    elements=st.sampled_from([32, 4096]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_eager_on_any_shape(
    num_passes,
    batch,
    classes,
    backward_passes,
    label_smoothing,
    weighted,
    probabilities,
    elements,
    seed,
):
    # Chances of one class are refused, but for a single item.
    assume(not probabilities or classes > 1 or batch < 2)
    logits, target = make(num_passes, batch, classes, seed=seed)
    target[torch.rand(batch) < 0.3] = -100
    if probabilities:
        target = torch.rand(batch, classes, device=DEVICE).double().softmax(-1)
    options = {
        "alpha": 0.0 if num_passes == 1 else 1.7,
        "num_passes": num_passes,
        "backward_passes": min(num_passes, backward_passes),
        "label_smoothing": label_smoothing,
        "weight": torch.rand(classes, device=DEVICE) + 0.1 if weighted else None,
    }
    with pytest.MonkeyPatch.context() as patch:
        set_tiles(patch, elements)
        ours = rdrop_cross_entropy(logits, target, impl="triton", **options)
        grad = gradient(logits, target, 1.5, impl="triton", **options)
    eager = rdrop_cross_entropy(logits, target, impl="eager", **options)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        grad, gradient(logits, target, 1.5, impl="eager", **options), rtol=1e-8, atol=1e-11
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("num_passes", [2, 3])
def test_rising_maxima_and_rows_far_apart_keep_their_digits(num_passes):
    """Sums are relative to running maxima: neither their rise nor a row's constant costs digits."""
    logits, target = make(num_passes, 3, 300, dtype=torch.float32)
    logits += torch.arange(300, device=DEVICE) * 0.5
    shift = torch.arange(num_passes * 3, device=DEVICE)[:, None] * 2048.0
    rounded = (logits + shift) - shift
    options = {"alpha": 1.0, "num_passes": num_passes, "label_smoothing": 0.1}
    truth = rdrop_cross_entropy(rounded.double(), target, impl="eager", **options)
    output = rdrop_cross_entropy(rounded + shift, target, impl="triton", **options)
    assert output.kl.item() == pytest.approx(truth.kl.item(), rel=1e-5)
    assert output.nll.item() == pytest.approx(truth.nll.item(), rel=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("where", ["first block", "last block", "all but one"])
def test_masked_blocks_contribute_nothing(where):
    logits, target = make(2, 3, 100, dtype=torch.float32)
    keep = {
        "first block": torch.arange(100) >= 32,
        "last block": torch.arange(100) < 64,
        "all but one": torch.arange(100) == 50,
    }[where].to(DEVICE)
    target = keep.nonzero()[:3, 0].flip(0)
    target = target.expand(3) if target.numel() == 1 else target
    masked = logits.masked_fill(~keep, -math.inf)
    compact = torch.searchsorted(keep.nonzero()[:, 0], target.contiguous())
    ours = rdrop_cross_entropy(masked, target, alpha=1.0, impl="triton")
    small = rdrop_cross_entropy(logits[:, keep], compact, alpha=1.0, impl="eager")
    torch.testing.assert_close(ours.loss, small.loss, rtol=1e-6, atol=1e-6)
    grad = gradient(masked, target, alpha=1.0, impl="triton")
    assert (grad[:, ~keep] == 0).all()
    expected = gradient(logits[:, keep], compact, alpha=1.0, impl="eager")
    torch.testing.assert_close(grad[:, keep], expected, rtol=1e-5, atol=1e-6)


def test_offsets_beyond_32_bits():
    """Passes 2^31 elements apart; memory that is not touched is not taken."""
    passes = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided(
        (2, 3, 8), (2**31, 8, 1)
    )
    small, index = make(2, 3, 8, dtype=torch.float16)
    passes.copy_(small.view(2, 3, 8))
    target = Target(index, None, None, 0.0, None)
    grads = []
    for logits, inplace in ((passes, True), (small.view(2, 3, 8), False)):
        leaf = logits.detach().requires_grad_()
        options = {"backward_passes": 2, "inplace": inplace, "impl": "triton"}
        nll, kl = rdrop_terms(leaf.view_as(leaf), target, **options)
        grads.append(torch.autograd.grad((nll + kl).sum(), leaf)[0])
    assert grads[0].data_ptr() == passes.data_ptr()
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0


def test_forward_alone_keeps_nothing():
    logits, target = make(2, 3, 8, dtype=torch.float32)
    with torch.no_grad():
        output = rdrop_cross_entropy(logits.requires_grad_(), target, alpha=1.0, impl="triton")
    assert output.loss.grad_fn is None


def test_auto_takes_it_on_a_gpu_where_it_can_run(monkeypatch):
    monkeypatch.setattr(selection, "_can_run_triton", lambda device, dtype: device.index == 0)
    monkeypatch.setattr(triton_rows, "triton_kernel", lambda device: "triton")
    monkeypatch.setattr(selection, "chunked_kernel", lambda compiled: "chunked")
    devices = [torch.device(name) for name in ("cuda:0", "cuda:1", "cpu")]
    chosen = [selection.select_kernel("auto", device) for device in devices]
    assert chosen == ["triton", "chunked", "chunked"]


COMPILE = """
import collections, re, triton, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from regdrop import rdrop_cross_entropy
from regdrop.kernels.triton_programs import backward_kernel, forward_kernel

try:
    rdrop_cross_entropy(torch.ones(4, 3), torch.tensor([0, 1]), alpha=1.0, impl="triton")
except ValueError as error:
    print(error)

def compiled(kernel, **constants):
    constants |= dict(LABEL_SMOOTHING=0.1, PASSES=2, ROWS=2, SCALE=1.0, SOFTCAP=None)
    constants |= dict(probabilities=None, weight=None, first=0)
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name.endswith("stride_class"):
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("logits", "out"):
            signature[name] = "*bf16"
        elif "stride" in name or name in ("num_items", "width", "num_classes", "tiles"):
            signature[name] = "i64" if name.endswith("stride_pass") else "i32"
        else:
            signature[name] = {"classes": "*i64", "valid": "*i1"}.get(name, "*fp32")
        if name not in constants and name != "tiles":
            aligned[(i,)] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    ptx = triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["ptx"]
    wide = re.findall(r"(?:ld|st)[.]global[.]v4", ptx)
    # What threads wait for, between a label and a jump back to it.
    lines, waits = ptx.splitlines(), 0
    for i, line in enumerate(lines):
        label = re.search("bra.*([$]L__BB[0-9_]+);", line)
        starts = [j for j, x in enumerate(lines[:i]) if label and x.startswith(label[1] + ":")]
        waits += sum("bar.sync" in x or "shfl" in x for j in starts for x in lines[j:i])
    print(kernel.fn.__name__, dict(collections.Counter(wide)), waits)

compiled(forward_kernel, FIRST=True, LAST=True, LANES=128, WIDE=8)
compiled(backward_kernel, BACKWARD_PASSES=2, TILE=2048)
"""


@pytest.mark.slow
def test_compiles_for_a_gpu_with_wide_loads_and_stores(tmp_path):
    """No GPU is needed for that; what the interpreter accepts need not compile."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    refusal, forward, backward = done.stdout.splitlines()
    assert "impl='triton' needs logits on a GPU" in refusal
    # 2 x 1024 and 2 x 2048 numbers of 2 bytes by 128 threads: 2 and 4 times 16 bytes a thread. The
    # forward has two forms of a tile, whole and not; the backward writes a gradient, or zeros to an
    # ignored item. No thread waits for another within the loop of the forward.
    assert forward == "forward_kernel {'ld.global.v4': 4} 0"
    assert backward == "backward_kernel {'ld.global.v4': 4, 'st.global.v4': 8} 0"
