"""Blocks of classes, the way of a GPU, on the CPU: in torch and by interpreted Triton kernels."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from implementations import TRITON
from regdrop import linear_rdrop_cross_entropy, rdrop_cross_entropy
from regdrop.kernels import class_blocks
from regdrop.kernels.class_blocks import make_plan
from regdrop.kernels.projection import Projection
from regdrop.loss import (
    combine_terms,
    linear_cross_entropy_loss,
    linear_cross_entropy_terms,
    linear_items,
)

FEATURES, CLASSES = 6, 29
WEIGHTS = torch.linspace(0.2, 3, CLASSES)
HALVES = [torch.bfloat16, torch.float16]


def make(num_passes=2, items=5, *, classes=CLASSES, dtype=torch.float64, seed=0):
    """Return hidden states, weight, bias (all with a gradient) and target."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_passes * items, FEATURES), (classes, FEATURES), (classes,)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    target = torch.randint(0, classes, (items,), generator=generator)
    return [tensor.requires_grad_() for tensor in tensors], target


def explicit(hidden, weight, target, *, bias=None, logit_scale=1.0, softcap=None, **options):
    """Return the loss from explicit logits, by the definition."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    options["weight"] = options.pop("class_weight", None)
    options["impl"] = "eager"
    return rdrop_cross_entropy(logits, target, **options)


def by_classes(block_size):
    """Return `linear_rdrop_cross_entropy` that takes the way of blocks of so many classes."""
    return partial(cross_entropy_by_classes, block_size=block_size)


def cross_entropy_by_classes(
    hidden,
    weight,
    target,
    *,
    block_size,
    alpha,
    bias=None,
    num_passes=2,
    logit_scale=1.0,
    softcap=None,
    class_weight=None,
    impl="auto",
    reduction="mean",
    **options,
):
    projection = Projection(weight, bias, logit_scale, softcap, impl=impl, block_size=block_size)
    options |= {"projection": projection, "num_passes": num_passes, "weight": class_weight}
    if reduction == "none":
        terms = linear_cross_entropy_terms(hidden, target, **options)
        return combine_terms(terms, alpha=alpha, num_passes=num_passes, reduction=reduction)
    return linear_cross_entropy_loss(hidden, target, alpha=alpha, reduction=reduction, **options)


def assert_same_as_explicit(loss, tensors, target, upstream=0.37, *, tolerance=None, **options):
    hidden, weight, bias = tensors
    used = [x for x in tensors if x is not None and x.requires_grad]
    results = []
    for function in (loss, explicit):
        output = function(hidden, weight, target, bias=bias, **options)
        scale = torch.full_like(output.loss, upstream)
        if scale.dim():  # under "none" another one for each item
            scale = torch.linspace(-1, 2, scale.numel(), dtype=scale.dtype)
        results.append((*output, *torch.autograd.grad(output.loss, used, scale)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or {}))


@pytest.mark.parametrize("impl", ["chunked", TRITON])
@pytest.mark.parametrize(
    ("num_passes", "options"),
    [
        (2, {}),
        (1, {"label_smoothing": 0.1}),
        (2, {"reduction": "none", "label_smoothing": 0.1}),
        (3, {"reduction": "sum", "backward_passes": 1, "logit_scale": 0.7}),
        (2, {"class_weight": WEIGHTS, "label_smoothing": 0.2, "num_items": 3}),
        (3, {"softcap": 3.0, "logit_scale": 1.3, "ignore_index": 4}),
    ],
    ids=str,
)
def test_equals_the_loss_of_explicit_logits(impl, num_passes, options):
    """In blocks of 6 classes: some in scratch, some in the weight's memory, some not kept."""
    tensors, target = make(num_passes, 3)
    target[1] = options.get("ignore_index", -100)
    loss_of = by_classes(6)
    options = {"alpha": 1.7 if num_passes > 1 else 0.0, "num_passes": num_passes, **options}
    assert_same_as_explicit(loss_of, tensors, target, impl=impl, **options)


@settings(max_examples=60, deadline=None)
@given(
    num_passes=st.integers(1, 4),
    items=st.integers(0, 9),
    classes=st.integers(1, 40),
    scratch=st.integers(1, 50),
    has_bias=st.booleans(),
    share_ignored=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_agrees_on_any_shape(num_passes, items, classes, scratch, has_bias, share_ignored, seed):
    """Whatever is kept in scratch, in the memory of the weight's gradient, or not at all."""
    (hidden, weight, bias), target = make(num_passes, items, classes=classes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    target[torch.rand(target.shape, generator=generator) < share_ignored] = -100
    options = {"alpha": 1.3 if num_passes > 1 else 0.0, "num_passes": num_passes}
    tensors = hidden, weight, bias if has_bias else None
    assert_same_as_explicit(by_classes(scratch), tensors, target, **options)


def test_items_without_a_label_count_in_the_divergence_alone():
    tensors, target = make()
    target[0], target[3] = -1, -100
    loss_of = by_classes(4)
    assert_same_as_explicit(loss_of, tensors, target, alpha=1.0, unlabelled_index=-1)


@pytest.mark.parametrize("impl", ["chunked", TRITON])
@pytest.mark.parametrize("masked", [slice(0, 10), slice(20, None), slice(3, None)])
def test_classes_masked_in_every_pass_contribute_nothing(impl, masked):
    """Whole blocks of them, at the beginning and at the end; the target is in none."""
    (hidden, weight, bias), _ = make(2, 2)
    keep = torch.ones(CLASSES, dtype=torch.bool)
    keep[masked] = False
    position = torch.randint(0, int(keep.sum()), (2,))
    target = keep.nonzero()[:, 0][position]
    loss_of = by_classes(6)
    blocked = bias.detach().masked_fill(~keep, -torch.inf)
    found = loss_of(hidden, weight, target, alpha=1.0, bias=blocked, impl=impl)
    expected = explicit(hidden, weight[keep], position, alpha=1.0, bias=bias[keep])
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(x.loss, (hidden, weight)) for x in (found, expected))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("impl", ["chunked", TRITON])
def test_a_class_masked_in_one_pass_only_is_refused(impl):
    weight = make(2, 1)[0][1].detach()
    weight[:, 1] = 0
    hidden = torch.ones(2, FEATURES, dtype=torch.float64)
    weight[20, 1], hidden[1, 1] = 1e200, -1e200  # the product is -inf
    loss_of = by_classes(4)
    weight.requires_grad_()
    with pytest.raises(ValueError, match="the KL is infinite"):
        loss_of(hidden, weight, torch.tensor([1]), alpha=1.0, impl=impl)


def test_gradcheck():
    tensors, target = make(2, 3, classes=9)
    target[1] = -100
    loss_of = by_classes(2)
    options = {"alpha": 1.3, "softcap": 2.0, "label_smoothing": 0.1}

    def loss(hidden, weight, bias):
        return loss_of(hidden, weight, target, bias=bias, **options).loss

    assert torch.autograd.gradcheck(loss, tensors)


def test_a_second_backward_computes_what_the_first_has_overwritten():
    (hidden, weight, _), target = make()
    loss_of = by_classes(3)
    loss = loss_of(hidden, weight, target, alpha=1.0).loss
    first = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 3, (hidden, weight))
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y)
        assert x.data_ptr() != y.data_ptr()


@pytest.mark.parametrize("frozen", range(3))
def test_what_is_frozen_gets_no_gradient(frozen):
    tensors, target = make()
    tensors[frozen] = tensors[frozen].detach()
    loss_of = by_classes(3)
    assert_same_as_explicit(loss_of, tensors, target, alpha=1.0)


# --- half precision --------------------------------------------------------------------------


def errors(dtype, function, tensors, target, **options):
    """Return how far loss and gradients in `dtype` are from those of float64, relatively."""
    exact = [x.detach().to(dtype).double().requires_grad_() for x in tensors]
    rounded = [x.detach().to(dtype).requires_grad_() for x in tensors]
    truth = explicit(exact[0], exact[1], target, bias=exact[2], **options)
    output = function(rounded[0], rounded[1], target, bias=rounded[2], **options)
    wanted = torch.autograd.grad(truth.loss, exact)
    found = torch.autograd.grad(output.loss * 2.0**12, rounded)
    assert [x.dtype for x in found] == [dtype] * 3
    distances = [
        ((x.double() / 2.0**12 - y).norm() / y.norm()).item()
        for x, y in zip(found, wanted, strict=True)
    ]
    return [abs(output.loss.item() / truth.loss.item() - 1), *distances]


@pytest.mark.parametrize(
    ("impl", "softcap"),
    [("chunked", None), ("chunked", 4.0), pytest.param("triton", 4.0, marks=TRITON.marks)],
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_error_is_at_most_that_of_explicit_logits_in_the_same_dtype(impl, dtype, softcap):
    tensors, target = make(2, 6)
    options = {"alpha": 2.0, "softcap": softcap}
    loss_of = by_classes(12)
    ours = errors(dtype, loss_of, tensors, target, impl=impl, **options)
    theirs = errors(dtype, explicit, tensors, target, **options)
    slack = 4 * torch.finfo(dtype).eps
    assert all(a <= b + slack for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    assert max(ours) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("upstream", [2.0**20, 1.0])
def test_float16_gradients_do_not_underflow_before_a_scaler_acts(upstream):
    """Divided by the items in float16, nearly all gradients of the logits would be 0."""
    (hidden, weight, _), target = make(2, 512, dtype=torch.float16)
    loss_of = by_classes(10)
    num_items = 2.0**22 * upstream / 2.0**20

    def run(hidden, weight):
        options = {"alpha": 1.0, "num_items": num_items}
        loss = loss_of(hidden, weight, target, **options).loss
        return torch.autograd.grad(loss * upstream, (hidden, weight))

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    for x, y in zip(run(hidden, weight), run(*exact), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-2, atol=1e-3 * y.abs().max().item())


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_gives_gradients_in_the_dtypes_of_the_tensors(dtype):
    (hidden, weight, bias), target = make(dtype=torch.float32)
    loss_of = by_classes(3)
    with torch.autocast("cpu", dtype):
        output = loss_of(hidden, weight, target, bias=bias, alpha=2.0)
        expected = explicit(hidden, weight, target, bias=bias, alpha=2.0)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(output.loss, (hidden, weight, bias))
    wanted = torch.autograd.grad(expected.loss, (hidden, weight, bias))
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == torch.float32
        assert (x - y).norm() < 4 * torch.finfo(dtype).eps * y.norm()


# --- cost ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scratch", "again"), [(CLASSES, 0), (15, 14 - 8), (3, 26 - 15)])
def test_only_what_no_memory_holds_is_computed_again(scratch, again):
    (hidden, weight, _), target = make()  # 10 rows of logits, 6 features
    loss_of = by_classes(scratch)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        loss_of(hidden, weight, target, alpha=1.0).loss.backward()
    # Those of logits, (10, 6) by (6, classes); of gradients, addmm_.
    products = [event.input_shapes for event in profiler.events() if event.name == "aten::mm"]
    assert sum(width for _, (_, width), *_ in products) == CLASSES + again


class Started(TorchDispatchMode):
    """Notes the operations that a GPU is given, views and new memory left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function._schema.name:
            self.names.append(function._schema.name)
        return result


def test_a_gpu_does_not_wait_long_for_its_first_product():
    """What is started before costs the host time, in which the device has nothing to do."""
    tensors = [
        torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for shape in ((4096, 768), (32_000, 768))
    ]
    target = torch.empty(2048, dtype=torch.long, device="meta")
    with Started() as started:
        linear_rdrop_cross_entropy(*tensors, target, alpha=1.0)
    assert 0 < started.names.index("aten::mm") <= 10


@pytest.mark.parametrize(
    ("rows", "features", "classes", "kept"),
    [
        # All of them in the scratch buffer; then 5/8 and about 1/2; more rows than features.
        (4096, 768, 32_000, 1.0),
        (4096, 2048, 128_256, 0.62),
        (8192, 4096, 128_256, 0.54),
        (2048, 4096, 128_256, 1.0),
    ],
)
def test_what_is_kept_at_the_sizes_of_models(rows, features, classes, kept):
    hidden = torch.empty(2, rows // 2, features, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(classes, features, dtype=torch.bfloat16, device="meta")
    plan = make_plan(hidden, Projection(weight, dtype=torch.bfloat16))
    assert plan.kept / classes == pytest.approx(kept, abs=0.02)
    assert plan.scratch * rows * 2 + hidden.nbytes <= class_blocks.BUDGET


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_passes", [2, 3])
def test_a_bias_of_the_least_finite_number_masks_a_class(num_passes, dtype):
    """The sum of the passes' least finite numbers is infinite."""
    (hidden, weight, bias), target = make(num_passes, dtype=dtype)
    target[target == 0] = 1
    bias = bias.detach().clone()
    bias[0] = torch.finfo(dtype).min
    loss_of = by_classes(4)
    arguments = [(weight, bias, target), (weight[1:], bias[1:], target - 1)]
    masked, without = (
        loss_of(hidden, w, t, bias=b, alpha=30.0, num_passes=num_passes) for w, b, t in arguments
    )
    torch.testing.assert_close(masked, without, rtol=1e-2, atol=1e-4)
    gradients = [torch.autograd.grad(x.loss, (hidden, weight)) for x in (masked, without)]
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()
    assert (gradients[0][1][0] == 0).all()


def test_a_target_of_the_least_finite_number_costs_as_much():
    (hidden, weight, bias), target = make(dtype=torch.float32)
    bias = bias.detach().clone()
    bias[target[0]] = torch.finfo(torch.float32).min
    options = {"bias": bias, "alpha": 0.0, "reduction": "none"}
    found, expected = (f(hidden, weight, target, **options).loss for f in (by_classes(4), explicit))
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_items_that_are_kept_have_no_gradient(reduction, monkeypatch):
    """A GPU, which would be waited for, leaves none out."""
    monkeypatch.setattr(linear_items, "drops_rows", lambda device: False)
    tensors, target = make()
    target[1] = target[3] = -100
    loss_of = by_classes(4)
    assert_same_as_explicit(
        loss_of, tensors, target, alpha=1.3, label_smoothing=0.1, reduction=reduction
    )
    found = loss_of(*tensors[:2], target, alpha=1.3, reduction=reduction).loss
    (gradient,) = torch.autograd.grad(found.sum(), tensors[0])
    assert (gradient.view(2, 5, -1)[:, [1, 3]] == 0).all()


def test_classes_of_no_weight_take_no_part_in_the_smoothing():
    tensors, target = make()
    weight = WEIGHTS.clone()
    weight[[0, 7, 28]] = 0
    loss_of = by_classes(4)
    assert_same_as_explicit(
        loss_of, tensors, target, alpha=1.3, class_weight=weight, label_smoothing=0.2
    )


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16], ids=str)
def test_smoothed_terms_are_exact_by_any_default_dtype(default):
    """Of two Python numbers torch makes one in its default dtype."""
    tensors, target = make()
    options = {"alpha": 1.3, "label_smoothing": 0.1, "bias": tensors[2]}
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        outputs = [loss(*tensors[:2], target, **options).loss for loss in (by_classes(8), explicit)]
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(*outputs, rtol=1e-14, atol=0)
    gradients = [torch.autograd.grad(loss, tensors) for loss in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
