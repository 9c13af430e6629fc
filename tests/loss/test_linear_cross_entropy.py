import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from implementations import CPP, HAS_COMPILER, TRITON
from regdrop import linear_rdrop_cross_entropy, rdrop_cross_entropy
from regdrop.kernels import Projection
from regdrop.kernels.chunked import row_blocks
from regdrop.loss import linear_cross_entropy_loss

FEATURES, CLASSES = 5, 11
WEIGHTS = torch.linspace(0.2, 3, CLASSES, dtype=torch.float64)
HALVES = [torch.bfloat16, torch.float16]


def make(
    num_passes=2,
    batch=4,
    length=3,
    classes=CLASSES,
    *,
    dtype=torch.float64,
    ignored=((0, 1), (2, 2)),
    seed=0,
):
    """Return hidden states, weight, bias (all with a gradient) and target."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_passes * batch, length, FEATURES), (classes, FEATURES), (classes,)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    target = torch.randint(0, classes, (batch, length), generator=generator)
    for position in ignored:
        target[position] = -100
    return [tensor.requires_grad_() for tensor in tensors], target


def explicit(hidden, weight, target, *, bias, logit_scale=1.0, softcap=None, **options):
    """Return the loss from explicit logits, by the definition."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    options["weight"] = options.pop("class_weight", None)
    return rdrop_cross_entropy(logits, target, impl="eager", **options)


def both(tensors, target, *, chunk_size=None, impl="auto", upstream=0.37, **options):
    """Return outputs and gradients of the fused form, then of the explicit one."""
    hidden, weight, bias = tensors
    used = [x for x in tensors if x is not None]
    results = []
    for function, own in (
        (linear_rdrop_cross_entropy, {"chunk_size": chunk_size, "impl": impl}),
        (explicit, {}),
    ):
        output = function(hidden, weight, target, bias=bias, **options, **own)
        scale = torch.full_like(output.loss, upstream)
        if scale.dim():  # under "none" another one for each item
            scale = torch.linspace(-1, 2, scale.numel(), dtype=scale.dtype).view(scale.shape)
        results.append((output, torch.autograd.grad(output.loss, used, scale)))
    return results


def assert_same_result(results, **tolerance):
    (output, gradients), (expected, expected_gradients) = results
    for name, x, y in zip(output._fields, output, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
    for x, y in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


# --- the definition --------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_passes", [1, 2, 3])
@pytest.mark.parametrize("backward_passes", [None, 1])
@pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (0.7, None), (0.7, 3.0)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_equals_the_loss_of_explicit_logits(
    reduction, num_passes, backward_passes, logit_scale, softcap, has_bias
):
    (hidden, weight, bias), target = make(num_passes)
    options = {
        "alpha": 1.7 if num_passes > 1 else 0.0,
        "num_passes": num_passes,
        "reduction": reduction,
        "backward_passes": backward_passes,
        "logit_scale": logit_scale,
        "softcap": softcap,
    }
    tensors = hidden, weight, bias if has_bias else None
    for chunk_size in (None, 1, 3):
        assert_same_result(both(tensors, target, chunk_size=chunk_size, **options))


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("alpha", [0.0, 2.5])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"class_weight": WEIGHTS},
        {"class_weight": torch.arange(CLASSES)},
        {"class_weight": WEIGHTS, "label_smoothing": 0.2, "backward_passes": 1},
        {"num_items": 23},
        {"num_items": torch.tensor(23), "num_weight": 7.5, "class_weight": WEIGHTS},
        {"num_items": torch.tensor(0)},
        {"ignore_index": 3},
    ],
    ids=str,
)
def test_options_mean_what_they_mean_there(scale, alpha, options):
    tensors, target = make()
    target[target == -100] = options.get("ignore_index", -100)
    assert_same_result(both(tensors, target, chunk_size=4, scale=scale, alpha=alpha, **options))


@pytest.mark.parametrize("impl", ["chunked", CPP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bias_of_the_least_finite_number_masks_a_class(impl, dtype, reduction):
    (hidden, weight, bias), target = make(dtype=dtype)
    bias = bias.detach().clone()
    bias[0] = torch.finfo(dtype).min
    target[target == 0] = 1
    options = {"alpha": 30.0, "reduction": reduction}
    masked = linear_rdrop_cross_entropy(hidden, weight, target, bias=bias, impl=impl, **options)
    without = linear_rdrop_cross_entropy(
        hidden,
        weight[1:],
        (target - 1).clamp(min=-100),
        bias=bias[1:],
        ignore_index=-100,
        **options,
    )
    upstream = torch.ones_like(masked.loss)
    gradients = [torch.autograd.grad(x.loss, (hidden, weight), upstream) for x in (masked, without)]
    torch.testing.assert_close(masked.loss, without.loss)
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-4)
    assert (gradients[0][1][0] == 0).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_that_is_a_tensor_gets_its_gradient(softcap, has_bias, shape):
    (hidden, weight, bias), target = make()
    tensors = hidden, weight, bias if has_bias else None
    scale = torch.full(shape, 1.3, dtype=torch.float64, requires_grad=True)
    options = {"alpha": 1.5, "bias": tensors[2], "softcap": softcap, "logit_scale": scale}
    wanted = [x for x in (*tensors, scale) if x is not None]
    results = []
    for function in (linear_rdrop_cross_entropy, explicit):
        output = function(hidden, weight, target, **options)
        results.append((output, torch.autograd.grad(output.loss, wanted)))
    assert_same_result(results)


def test_a_scale_that_is_a_tensor_keeps_half_precision():
    (hidden, weight, _), target = make(dtype=torch.bfloat16)
    scale = torch.tensor(1.5, requires_grad=True)
    linear_rdrop_cross_entropy(hidden, weight, target, alpha=1.0, logit_scale=scale).loss.backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert scale.grad.dtype == torch.float32
    assert scale.grad != 0


@pytest.mark.parametrize("impl", [CPP, TRITON])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_every_kernel_compares_the_logits_of_a_chunk(impl, reduction, softcap):
    # The C++ kernel has an exponential of its own in float32.
    made = make(2, dtype=torch.float32 if impl == "cpp" else torch.float64)
    assert_compares_chunks(made, 3, impl=impl, reduction=reduction, softcap=softcap)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_several_blocks_compare_the_logits_of_a_chunk(reduction, softcap):
    assert_compares_chunks(several_blocks(), 11, reduction=reduction, softcap=softcap)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_compare_the_logits_of_a_chunk():
    assert_compares_chunks(several_blocks(), 11, impl="compiled", reduction="none")


def several_blocks():
    """Return what `make` does, so large that eleven items are two blocks."""
    assert len(row_blocks(torch.empty(2, 11, 2**15))) == 2
    return make(batch=7, classes=2**15)


def assert_compares_chunks(made, chunk_size, **options):
    tensors, target = made
    options |= {"label_smoothing": 0.1, "alpha": 1.7}
    for backward_passes in (None, 1):
        for size in (chunk_size, None):
            options["backward_passes"] = backward_passes
            assert_same_result(both(tensors, target, chunk_size=size, **options))


@settings(max_examples=40, deadline=None)
@given(
    num_passes=st.integers(1, 4),
    batch=st.integers(0, 5),
    length=st.integers(1, 4),
    alpha=st.floats(0, 10),
    chunk_size=st.sampled_from([None, 1, 2, 7]),
    share_ignored=st.sampled_from([0.0, 0.5, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_agrees_on_any_shape(
    num_passes, batch, length, alpha, chunk_size, share_ignored, reduction, seed
):
    tensors, target = make(num_passes, batch, length, ignored=(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    target[torch.rand(target.shape, generator=generator) < share_ignored] = -100
    options = {"alpha": alpha if num_passes > 1 else 0.0, "num_passes": num_passes}
    assert_same_result(both(tensors, target, chunk_size=chunk_size, reduction=reduction, **options))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("num_passes", [2, 3])
@pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (1.3, 2.0)])
def test_gradcheck(reduction, num_passes, logit_scale, softcap):
    tensors, target = make(num_passes, 2, 2, ignored=[(0, 1)])

    def loss(hidden, weight, bias):
        return linear_rdrop_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            alpha=1.3,
            num_passes=num_passes,
            reduction=reduction,
            logit_scale=logit_scale,
            softcap=softcap,
            label_smoothing=0.1,
            chunk_size=2,
        ).loss

    assert torch.autograd.gradcheck(loss, tensors)


def test_without_alpha_one_pass_is_torchs_cross_entropy():
    (hidden, weight, bias), target = make(1)
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    output = linear_rdrop_cross_entropy(hidden, weight, target, bias=bias, alpha=0, num_passes=1)
    torch.testing.assert_close(output.loss, expected)
    assert output.kl == 0


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


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("backward_passes", [None, 1])
def test_error_is_at_most_that_of_explicit_logits_in_the_same_dtype(
    dtype, softcap, backward_passes
):
    tensors, target = make(2, 40, 7)
    options = {"alpha": 2.0, "softcap": softcap, "backward_passes": backward_passes}

    def chunked(*arguments, **options):
        return linear_rdrop_cross_entropy(*arguments, chunk_size=64, **options)

    ours = errors(dtype, chunked, tensors, target, **options)
    theirs = errors(dtype, explicit, tensors, target, **options)
    slack = 4 * torch.finfo(dtype).eps
    assert all(a <= b + slack for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    assert max(ours) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_do_not_underflow_before_a_scaler_acts(reduction):
    """Divided by the items in float16, nearly all gradients of the logits would be 0."""
    (hidden, weight, _), target = make(2, 4096, 1, dtype=torch.float16, ignored=())
    num_items = 2.0**22

    def run(hidden, weight):
        options = {"reduction": reduction} if reduction == "none" else {"num_items": num_items}
        loss = linear_rdrop_cross_entropy(hidden, weight, target, alpha=1.0, **options).loss
        loss = loss.sum() / num_items if reduction == "none" else loss
        return torch.autograd.grad(loss * 2.0**20, (hidden, weight))

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    for x, y in zip(run(hidden, weight), run(*exact), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-2, atol=1e-3 * y.abs().max().item())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_multiplies_in_its_dtype_and_gives_gradients_in_those_of_the_tensors(
    dtype, reduction
):
    (hidden, weight, bias), target = make(dtype=torch.float32)
    options = {"alpha": 2.0, "reduction": reduction}
    with torch.autocast("cpu", dtype):
        output = linear_rdrop_cross_entropy(hidden, weight, target, bias=bias, **options)
        expected = explicit(hidden, weight, target, bias=bias, **options)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(output.loss.sum(), (hidden, weight, bias))
    wanted = torch.autograd.grad(expected.loss.sum(), (hidden, weight, bias))
    assert {x.dtype for x in found} == {torch.float32}
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).norm() < 4 * torch.finfo(dtype).eps * y.norm()
    with torch.autocast("cpu", dtype):
        mixed = linear_rdrop_cross_entropy(hidden.to(dtype), weight, target, bias=bias, **options)
        assert torch.equal(mixed.loss, output.loss)


# --- gradients -------------------------------------------------------------------------------


def test_a_tied_weight_gets_both_gradients():
    (_, weight, _), target = make()
    words = torch.randint(0, CLASSES, (8, 3), generator=torch.Generator().manual_seed(1))

    def run(loss):
        embedding = weight.detach().clone().requires_grad_()
        loss(F.embedding(words, embedding).tanh(), embedding).loss.backward()
        return embedding.grad

    ours = run(lambda h, w: linear_rdrop_cross_entropy(h, w, target, alpha=1.0))
    theirs = run(lambda h, w: explicit(h, w, target, bias=None, alpha=1.0))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_other_passes_may_come_without_a_gradient_and_get_none(reduction):
    (hidden, weight, _), target = make(3)
    rest = hidden[4:].detach()
    options = {"alpha": 1.0, "num_passes": 3, "backward_passes": 1, "reduction": reduction}
    whole = linear_rdrop_cross_entropy(hidden, weight, target, **options)
    (gradient,) = torch.autograd.grad(whole.loss.sum(), hidden)
    assert (gradient[4:] == 0).all()
    assert gradient[:4].abs().max() > 0
    joined = torch.cat([hidden[:4], rest])
    part = linear_rdrop_cross_entropy(joined, weight, target, **options)
    torch.testing.assert_close(torch.autograd.grad(part.loss.sum(), hidden)[0], gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", range(3))
def test_what_is_frozen_costs_no_gradient(reduction, frozen):
    tensors, target = make()
    expected = both(tensors, target, alpha=1.0, reduction=reduction)[1][1]
    tensors[frozen] = tensors[frozen].detach()
    output = linear_rdrop_cross_entropy(
        *tensors[:2], target, bias=tensors[2], alpha=1.0, reduction=reduction
    )
    upstream = torch.full_like(output.loss, 0.37)
    if reduction == "none":
        upstream = torch.linspace(-1, 2, upstream.numel(), dtype=upstream.dtype)
        upstream = upstream.view(output.loss.shape)
    output.loss.backward(upstream)
    for i, (tensor, gradient) in enumerate(zip(tensors, expected, strict=True)):
        assert (tensor.grad is None) == (i == frozen)
        if i != frozen:
            torch.testing.assert_close(tensor.grad, gradient)


def products(function):
    """Return the number of matrix products that a function computes."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    names = [event.name for event in profiler.events()]
    return sum(name in ("aten::mm", "aten::addmm", "aten::addmm_") for name in names)


def test_products_are_those_of_a_linear_layer_and_none_without_a_gradient():
    (hidden, weight, _), target = make()

    def loss(h, w, **options):
        return linear_rdrop_cross_entropy(h, w, target, alpha=1.0, **options).loss

    assert products(lambda: loss(hidden, weight).backward()) == 3
    assert products(lambda: loss(hidden, weight, reduction="none").sum().backward()) == 4
    assert products(lambda: loss(hidden, weight.detach()).backward()) == 2
    assert products(lambda: loss(hidden.detach(), weight.detach())) == 1
    with torch.no_grad():
        assert products(lambda: loss(hidden, weight)) == 1


def test_autograd_takes_the_gradient_of_the_weight_as_it_is():
    """The gradient of a large weight is neither cloned nor touched anew in the backward."""
    (hidden, weight, _), target = make(dtype=torch.float32)
    loss = linear_rdrop_cross_entropy(hidden, weight, target, alpha=1.0).loss
    node = loss.grad_fn.next_functions[0][0]
    pointer = node.gradients.weight.data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == pointer
    assert node.gradients is None


def test_a_second_backward_gives_the_same_gradient():
    (hidden, weight, _), target = make()
    loss = linear_rdrop_cross_entropy(hidden, weight, target, alpha=1.0).loss
    first = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 3, (hidden, weight))
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y)
        assert x.data_ptr() != y.data_ptr()


def test_ignored_items_have_no_gradient_whatever_they_hold():
    (hidden, weight, _), target = make()
    expected = linear_rdrop_cross_entropy(hidden, weight, target, alpha=1.0).loss
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    with torch.no_grad():
        hidden[[0, 4], 1] = torch.nan
    loss = linear_rdrop_cross_entropy(hidden, weight, target, alpha=1.0).loss
    gradient, weight_gradient = torch.autograd.grad(loss, (hidden, weight))
    assert torch.equal(loss, expected)
    assert torch.equal(weight_gradient, expected_gradient)
    assert (gradient[[0, 4], 1] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_without_items_gives_a_loss_and_gradients_of_zero(reduction):
    tensors, target = make()
    output = linear_rdrop_cross_entropy(
        *tensors[:2], torch.full_like(target, -100), alpha=1.0, reduction=reduction
    )
    assert output.loss.sum() == output.nll == output.kl == 0
    for gradient in torch.autograd.grad(output.loss.sum(), tensors[:2]):
        assert (gradient == 0).all()


# --- memory ----------------------------------------------------------------------------------


def peak(num_items, classes, reduction="mean", dtype=torch.float32):
    """Return the highest number of bytes allocated above the inputs, with the gradients."""
    hidden = torch.randn(2 * num_items, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(classes, 8, dtype=dtype, requires_grad=True)
    target = torch.randint(0, classes, (num_items,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = linear_rdrop_cross_entropy(hidden, weight, target, alpha=1.0, reduction=reduction)
        output.loss.sum().backward()
    current = highest = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        highest = max(highest, current)
    return highest


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_items_times_vocabulary(reduction, dtype):
    classes = 6000
    small, large = (peak(n, classes, reduction, dtype) for n in (256, 2048))
    pair_of_logits = 2 * 2048 * classes * dtype.itemsize
    # What is allowed to grow: the gradient of hidden and a few numbers an item.
    assert large - small < 2048 * 2 * 8 * 4 * 4
    assert large < pair_of_logits / 2


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.ones(8, 3, 5).long()}, TypeError, "hidden must be floating point"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": torch.ones(11, 4)}, ValueError, r"weight must be .* 5 features.*\(11, 4\)"),
        ({"weight": torch.ones(11, 5).half()}, TypeError, "one dtype outside autocast, got"),
        ({"target": torch.rand(4, 3, 11)}, TypeError, "class probabilities are taken by rdrop_cro"),
        ({"target": torch.zeros(4, 2).long()}, ValueError, r"target must have .* got \(4, 2\)"),
        ({"target": torch.zeros(8, 3).long()}, ValueError, "either target was stacked too"),
        (
            {"hidden": torch.ones(3, 8, 5), "target": torch.zeros(3, 4).long()},
            ValueError,
            r"time comes first; give hidden\.transpose\(0, 1\)",
        ),
        ({"target": torch.full((4, 3), 11)}, ValueError, "class indices from 0 to 10 .* got 11"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have one entry a class, shape \(11,\)"),
        ({"class_weight": torch.ones(5)}, ValueError, "class_weight must have one entry a class"),
        ({"class_weight": torch.ones(11, requires_grad=True)}, ValueError, "class_weight must not"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale must be finite, got inf"),
        ({"softcap": 0.0}, ValueError, r"softcap must be None or above 0, got 0\.0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be None or at least 1, got 0"),
        ({"alpha": -1.0}, ValueError, "alpha must be finite and at least 0"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items is only used with"),
        ({"backward_passes": 3}, ValueError, "backward_passes must be None or from 1 to"),
        ({"impl": "fast"}, ValueError, r"impl must be one of .* got 'fast'"),
        ({"impl": "eager"}, ValueError, "impl='eager' keeps full logits"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changes, error, message):
    arguments = {
        "hidden": torch.ones(8, 3, 5),
        "weight": torch.ones(11, 5),
        "target": torch.zeros(4, 3).long(),
        "alpha": 1.0,
    }
    with pytest.raises(error, match=message):
        linear_rdrop_cross_entropy(**{**arguments, **changes})


def test_the_loss_of_a_known_layer_has_no_terms_of_every_item():
    (hidden, weight, _), target = make()
    options = {"projection": Projection(weight), "alpha": 1.0, "num_passes": 2}
    with pytest.raises(ValueError, match="linear_cross_entropy_terms returns the terms"):
        linear_cross_entropy_loss(hidden, target, reduction="none", **options)


def test_a_class_masked_in_one_pass_only_is_refused_and_in_all_contributes_nothing():
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.5, 1.0]])
    bias, target = torch.tensor([0.0, 0.0, -torch.inf]), torch.tensor([1])
    output = linear_rdrop_cross_entropy(hidden, weight, target, bias=bias, alpha=1.0)
    assert output.loss.isfinite()
    hidden[1, 1], weight[2, 1] = -1e38, 1e38  # the product is -inf
    with pytest.raises(ValueError, match="the KL is infinite"):
        linear_rdrop_cross_entropy(hidden, weight, target, alpha=1.0)


def test_inside_a_compiled_function_it_is_the_same():
    hidden = torch.randn(8, 6, requires_grad=True)
    weight = torch.randn(11, 6, requires_grad=True)
    target = torch.tensor([3, -100, 10, 0])

    def step(hidden, weight):
        return linear_rdrop_cross_entropy(hidden * 2, weight, target, alpha=1.0).loss * 3

    expected = step(hidden, weight)
    found = torch.compile(step, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss, [hidden, weight]) for loss in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_part_of_an_empty_batch_has_a_loss_of_zero():
    """One process of several may have it, and the others wait for that one."""
    weight = torch.randn(7, 5, requires_grad=True)
    hidden, nothing = weight.new_zeros(0, 5), torch.zeros(0, dtype=torch.long)
    output = linear_cross_entropy_loss(
        hidden, nothing, projection=Projection(weight), alpha=1.0, num_passes=2, items=nothing
    )
    output.loss.backward()
    assert [x.item() for x in output] == [0, 0, 0]
    assert (weight.grad == 0).all()
