import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from implementations import CPP, HAS_COMPILER, TRITON, gradient, make
from regdrop import RDropCrossEntropyLoss, rdrop_cross_entropy
from regdrop.kernels.chunked import row_blocks
from regdrop.loss import cross_entropy_terms

IMPLEMENTATIONS = ["eager", "chunked"]
CLOSED_FORMS = ["chunked", TRITON, CPP]
ALL = ["eager", *CLOSED_FORMS]


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("num_passes", [2, 3, 4])
@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"weight": torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.1, 1.0])},
        {"weight": torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.1, 1.0]), "label_smoothing": 0.2},
        {"num_items": 11},
        {"num_items": 11, "num_weight": 7.5},
    ],
)
def test_value_is_that_of_the_paper(impl, num_passes, scale, options):
    logits, target = make(num_passes, ignored=[1])
    arguments = {"alpha": 1.7, "num_passes": num_passes, "scale": scale, **options}
    expected = reference.rdrop_loss(logits, target, **arguments)
    output = rdrop_cross_entropy(logits, target, impl=impl, **arguments)
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_probability_targets(impl, label_smoothing, weighted):
    logits, _ = make()
    target = torch.rand(5, 7, dtype=torch.float64).softmax(-1)
    weight = torch.rand(7, dtype=torch.float64) if weighted else None
    options = {"weight": weight, "label_smoothing": label_smoothing}
    expected = reference.rdrop_loss(logits, target, alpha=2.0, **options)
    output = rdrop_cross_entropy(logits, target, alpha=2.0, impl=impl, **options)
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)
    passes = logits.chunk(2)
    torch_nll = sum(F.cross_entropy(p, target, **options) for p in passes) / 2
    torch.testing.assert_close(output.nll, torch_nll)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_one_pass_without_alpha_is_torchs_cross_entropy(impl, reduction, weighted, label_smoothing):
    logits, target = make(1, ignored=[0, 3])
    options = {
        "weight": torch.rand(7, dtype=torch.float64) if weighted else None,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    logits.requires_grad_()
    expected = F.cross_entropy(logits, target, **options)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    output = rdrop_cross_entropy(logits, target, alpha=0, num_passes=1, impl=impl, **options)
    (grad,) = torch.autograd.grad(output.loss.sum(), logits)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_passes", [2, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradcheck(impl, num_passes, reduction, label_smoothing):
    logits, target = make(num_passes, batch=4, classes=3, ignored=[2])
    options = {"alpha": 1.3, "num_passes": num_passes, "reduction": reduction, "impl": impl}

    def loss(x):
        return rdrop_cross_entropy(x, target, label_smoothing=label_smoothing, **options).loss

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


@pytest.mark.parametrize("impl", CLOSED_FORMS)
@pytest.mark.parametrize("num_passes", [2, 3])
@pytest.mark.parametrize("backward_passes", [1, 2, None])
@pytest.mark.parametrize("kind", ["index", "weighted", "smoothed", "probabilities"])
def test_closed_gradient_equals_eager(impl, num_passes, backward_passes, kind):
    logits, target = make(num_passes, ignored=[4])
    options = {"alpha": 0.8, "num_passes": num_passes, "backward_passes": backward_passes}
    if kind in ("weighted", "smoothed"):
        options["weight"] = torch.rand(7, dtype=torch.float64)
    if kind == "smoothed":
        options["label_smoothing"] = 0.1
    if kind == "probabilities":
        target = torch.rand(5, 7, dtype=torch.float64).softmax(-1)
    upstream = 0.37
    eager = gradient(logits, target, upstream, impl="eager", **options)
    for inplace in (False, True):
        closed = gradient(logits, target, upstream, impl=impl, inplace=inplace, **options)
        torch.testing.assert_close(closed, eager, rtol=1e-10, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(
    num_passes=st.integers(1, 4),
    batch=st.integers(0, 6),
    length=st.integers(1, 5),
    classes=st.integers(1, 33),
    alpha=st.floats(0, 10),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    scale=st.sampled_from(["sum", "mean"]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_implementations_agree_on_any_shape(
    num_passes, batch, length, classes, alpha, label_smoothing, reduction, scale, weighted, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_passes * batch, length, classes, generator=generator).double() * 3
    target = torch.randint(0, classes, (batch, length), generator=generator)
    target[torch.rand(batch, length, generator=generator) < 0.3] = -1
    weight = torch.rand(classes, generator=generator).double() + 0.1 if weighted else None
    options = {
        "alpha": 0.0 if num_passes == 1 else alpha,
        "num_passes": num_passes,
        "ignore_index": -1,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
        "scale": scale,
        "weight": weight,
    }
    outputs = [rdrop_cross_entropy(logits, target, impl=i, **options) for i in IMPLEMENTATIONS]
    for eager, chunked in zip(*outputs, strict=True):
        torch.testing.assert_close(chunked, eager, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        gradient(logits, target, 1.5, impl="chunked", **options),
        gradient(logits, target, 1.5, impl="eager", **options),
        rtol=1e-8,
        atol=1e-11,
    )
    if reduction != "none" and bool((target != -1).any()):
        expected = reference.rdrop_loss(logits, target, **options)
        assert outputs[1].loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (7, 1000), (33, 4097)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_error_is_at_most_that_of_eager(dtype, shape, label_smoothing):
    """Against float64 on the same rounded logits, with ignored rows and an upstream gradient."""
    batch, classes = shape
    logits, target = make(2, batch, classes, ignored=[1], dtype=dtype)
    options = {"alpha": 1.0, "label_smoothing": label_smoothing}
    upstream = 3.7
    truth = rdrop_cross_entropy(logits.double(), target, impl="eager", **options)
    true_grad = gradient(logits.double(), target, upstream, impl="eager", **options)
    errors = {}
    for impl in IMPLEMENTATIONS:
        output = rdrop_cross_entropy(logits, target, impl=impl, **options)
        grad = gradient(logits, target, upstream, impl=impl, **options)
        assert output.loss.dtype == torch.float32
        assert grad.dtype == dtype
        errors[impl] = [
            (output.kl - truth.kl).abs().item(),
            (output.nll - truth.nll).abs().item(),
            (grad.double() - true_grad).norm().item(),
        ]
    # One rounding of the result is granted where both are that close.
    slack = [truth.kl.item() * 2e-7, truth.nll.item() * 2e-7, true_grad.norm().item() * 1e-7]
    for ours, eager, granted in zip(errors["chunked"], errors["eager"], slack, strict=True):
        assert ours <= eager + granted


@pytest.mark.parametrize("impl", ALL)
def test_class_probabilities_below_0_are_refused(impl):
    logits, _ = make(2)
    target = torch.rand(5, 7).softmax(-1)
    target[3:] = -100  # padding
    with pytest.raises(ValueError, match="class probabilities, which are at least 0, got -100"):
        rdrop_cross_entropy(logits, target, alpha=1.0, impl=impl)


@pytest.mark.parametrize("impl", ALL)
def test_extreme_logits(impl):
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [-1e4, 1e4, 1.0], [1e4, 1e4, -1e4]])
    target = torch.tensor([0, 1])
    expected = reference.rdrop_loss(logits, target, alpha=1.0)
    output = rdrop_cross_entropy(logits, target, alpha=1.0, impl=impl)
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert gradient(logits, target, alpha=1.0, impl=impl).isfinite().all()


@pytest.mark.parametrize("impl", ALL)
def test_constant_added_to_a_row_changes_nothing(impl):
    logits, target = make(dtype=torch.float32)
    shift = torch.tensor([1000.0, -1000.0] * 5)[:, None]
    rounded = (logits + shift) - shift
    a = rdrop_cross_entropy(rounded + shift, target, alpha=1.0, impl=impl)
    b = rdrop_cross_entropy(rounded, target, alpha=1.0, impl=impl)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.kl, b.kl, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("num_passes", [2, 3])
def test_class_masked_in_every_pass_contributes_nothing(impl, num_passes):
    logits, target = make(num_passes)
    masked = torch.cat([logits, torch.full((num_passes * 5, 2), -math.inf)], -1)
    options = {"alpha": 1.0, "num_passes": num_passes, "impl": impl}
    with_mask = rdrop_cross_entropy(masked, target, **options)
    without = rdrop_cross_entropy(logits, target, **options)
    torch.testing.assert_close(with_mask.loss, without.loss)
    torch.testing.assert_close(
        gradient(masked, target, **options)[:, :-2], gradient(logits, target, **options)
    )
    assert (gradient(masked, target, **options)[:, -2:] == 0).all()


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("num_passes", [1, 2, 3])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_a_masked_class_costs_infinity_where_the_target_has_mass_on_it(
    impl, num_passes, label_smoothing, weighted, kind
):
    """Elsewhere it costs nothing, and the gradient is finite in any case."""
    logits, _ = make(num_passes)
    logits[:, 0] = -math.inf
    target = torch.tensor([0, 1, 2, 0, 4])
    one_hot = F.one_hot(target, 7).double()
    weight = torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0]) if weighted else None
    mass = (1 - label_smoothing) * one_hot[:, 0] + label_smoothing / 7
    masked_is_wanted = (mass > 0) & (not weighted)
    target = one_hot if kind == "probabilities" else target
    options = {"num_passes": num_passes, "impl": impl, "weight": weight}
    options["label_smoothing"] = label_smoothing
    terms = cross_entropy_terms(logits, target, **options)
    assert torch.equal(terms.nll.isinf(), masked_is_wanted)
    assert (terms.nll[~masked_is_wanted] < 100).all()
    options |= {"alpha": 1.0 if num_passes > 1 else 0.0, "reduction": "sum"}
    output = rdrop_cross_entropy(logits, target, **options)
    torch.testing.assert_close(output.nll, terms.nll.sum() / terms.nll_count)
    assert gradient(logits, target, **options).isfinite().all()


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize(
    ("dtype", "num_passes", "share"),
    [
        (torch.float32, 1, 1.0),
        (torch.float32, 2, 1.0),
        (torch.float32, 2, 0.6),
        (torch.float32, 3, 1.0),
        (torch.bfloat16, 4, 0.3),
        (torch.float16, 2, 1.0),
        (torch.float64, 7, 1.0),
    ],
    ids=str,
)
def test_mask_of_the_least_finite_number_contributes_nothing(impl, dtype, num_passes, share):
    logits, target = make(num_passes, ignored=[1], dtype=dtype)
    mask = torch.full((len(logits), 2), torch.finfo(dtype).min * share, dtype=dtype)
    masked = torch.cat([logits, mask], -1)
    # A large weight must not make of a difference that does not count an infinite one.
    options = {"alpha": 30.0 if num_passes > 1 else 0.0, "num_passes": num_passes, "impl": impl}
    with_mask = rdrop_cross_entropy(masked, target, **options)
    without = rdrop_cross_entropy(logits, target, **options)
    torch.testing.assert_close(with_mask.loss, without.loss)
    grad = gradient(masked, target, **options)
    torch.testing.assert_close(grad[:, :-2], gradient(logits, target, **options))
    assert (grad[:, -2:] == 0).all()


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("num_passes", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("classes", [7, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_least_finite_number_costs_what_torch_says(impl, num_passes, classes, dtype):
    logits, target = make(1, classes=classes, dtype=dtype)
    logits[:, target[0]] = torch.finfo(dtype).min
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    expected = F.cross_entropy(wide, target, reduction="none")[0]
    assert expected.isfinite()
    logits = logits.repeat(num_passes, 1)
    terms = cross_entropy_terms(logits, target, num_passes=num_passes, impl=impl)
    torch.testing.assert_close(terms.nll[0], expected)
    options = {"alpha": 0.0, "num_passes": num_passes, "impl": impl}
    loss = rdrop_cross_entropy(logits[::5], target[:1], **options).loss
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_passes", [2, 3])
def test_a_mask_over_the_first_blocks_contributes_nothing(impl, dtype, num_passes):
    """Kernels that keep a running maximum then start with one of the least finite number."""
    logits = make(num_passes, batch=2, dtype=dtype)[0]
    mask = torch.full((len(logits), 8200), torch.finfo(dtype).min, dtype=dtype)
    options = {"alpha": 1.0, "num_passes": num_passes, "impl": impl}
    target = torch.tensor([3, 6])
    masked = torch.cat([mask, logits], -1)
    torch.testing.assert_close(
        rdrop_cross_entropy(masked, target + 8200, **options).loss,
        rdrop_cross_entropy(logits, target, **options).loss,
    )
    torch.testing.assert_close(
        gradient(masked, target + 8200, **options)[:, 8200:], gradient(logits, target, **options)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("impl", ALL)
def test_a_lowest_number_in_one_pass_is_a_mask_in_one_pass(impl, dtype):
    logits, target = make(dtype=dtype)
    logits[2, 3] = torch.finfo(dtype).min
    with pytest.raises(ValueError, match="the KL is infinite"):
        rdrop_cross_entropy(logits, target, alpha=1.0, impl=impl)
    logits[2 + 5, 3] = torch.finfo(dtype).min
    assert rdrop_cross_entropy(logits, target, alpha=1.0, impl=impl).loss < 100


@pytest.mark.parametrize("impl", ["eager", "chunked", TRITON])
def test_class_masked_in_one_pass_is_an_error_however_unlikely_it_is_in_the_other(impl):
    logits = torch.tensor([[0.0, -math.inf], [0.0, -200.0]])
    with pytest.raises(ValueError, match="the KL is infinite"):
        rdrop_cross_entropy(logits, torch.tensor([0]), alpha=1.0, impl=impl)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("num_passes", [2, 3])
def test_class_masked_in_one_pass_is_an_error(impl, num_passes):
    logits, target = make(num_passes)
    logits[0, (target[0] + 1) % 7] = -math.inf
    with pytest.raises(ValueError, match=r"-inf .* in one\s+pass"):
        rdrop_cross_entropy(logits, target, alpha=1.0, num_passes=num_passes, impl=impl)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_overflow_reach_loss_and_gradient(impl, dtype, value):
    logits, target = make(dtype=dtype)
    logits[0, (target[0] + 1) % 7] = value
    grad = gradient(logits, target, alpha=1.0, impl=impl)
    assert rdrop_cross_entropy(logits, target, alpha=1.0, impl=impl).loss.isnan()
    assert grad[0].isnan().all()
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("weighted", [False, True])
def test_all_ignored_gives_zero_loss_and_gradient(impl, weighted):
    logits, _ = make()
    target = torch.full((5,), -100)
    weight = torch.rand(7) if weighted else None
    output = rdrop_cross_entropy(logits, target, alpha=1.0, weight=weight, impl=impl)
    assert [x.item() for x in output] == [0, 0, 0]
    assert (gradient(logits, target, alpha=1.0, weight=weight, impl=impl) == 0).all()


@pytest.mark.parametrize("impl", ALL)
def test_empty_batch(impl):
    logits, target = torch.zeros(0, 7), torch.zeros(0, dtype=torch.long)
    assert rdrop_cross_entropy(logits, target, alpha=1.0, impl=impl).loss.item() == 0
    assert gradient(logits, target, alpha=1.0, impl=impl).shape == (0, 7)


@pytest.mark.parametrize("impl", ALL)
def test_ignored_rows_get_exact_zeros_whatever_they_hold(impl):
    logits, target = make(ignored=[2])
    clean = gradient(logits, target, alpha=1.0, impl=impl)
    logits[2], logits[7] = math.nan, math.inf
    grad = gradient(logits, target, alpha=1.0, impl=impl)
    assert (grad[[2, 7]] == 0).all()
    torch.testing.assert_close(grad, clean)


@pytest.mark.parametrize("impl", CLOSED_FORMS)
def test_non_contiguous_logits(impl):
    logits, target = make()
    wide = torch.stack([logits, logits], -1)[..., 0]
    assert not wide.is_contiguous()
    for inplace in (False, True):
        a = wide.requires_grad_(False).clone(memory_format=torch.preserve_format)
        leaf = logits.clone().requires_grad_()
        strided = torch.stack([leaf, leaf], -1)[..., 0]
        rdrop_cross_entropy(strided, target, alpha=1.0, inplace=inplace, impl=impl).loss.backward()
        torch.testing.assert_close(leaf.grad, gradient(a, target, alpha=1.0))
    transposed = logits.T.contiguous().T
    torch.testing.assert_close(
        gradient(transposed, target, alpha=1.0, impl=impl), gradient(logits, target, alpha=1.0)
    )


@pytest.mark.parametrize("impl", CLOSED_FORMS)
def test_lazy_negatives(impl):
    """Their memory holds the numbers that they negate."""
    logits, _ = make()
    target = torch.rand(5, 7, dtype=torch.float64).softmax(-1)
    weight = torch.rand(7, dtype=torch.float64)
    options = {"alpha": 1.0, "impl": impl}
    expected = rdrop_cross_entropy(logits, target, weight=weight, **options).loss
    lazy = [torch._neg_view(-x) for x in (logits, target, weight)]
    assert all(x.is_neg() for x in lazy)
    found = rdrop_cross_entropy(*lazy[:2], weight=lazy[2], **options).loss
    torch.testing.assert_close(found, expected)
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        lazy_logits = torch._neg_view(-leaf)
        rdrop_cross_entropy(
            lazy_logits, target, weight=weight, inplace=inplace, **options
        ).loss.backward()
        torch.testing.assert_close(leaf.grad, gradient(logits, target, weight=weight, alpha=1.0))


@pytest.mark.parametrize("impl", CLOSED_FORMS)
@pytest.mark.parametrize("shape", [(4, 0, 3), (0, 3)])
def test_inplace_without_elements(impl, shape):
    leaf = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape[0] // 2, *shape[1:-1], dtype=torch.long)
    rdrop_cross_entropy(leaf * 1, target, alpha=1.0, inplace=True, impl=impl).loss.backward()
    assert leaf.grad.shape == shape


@pytest.mark.parametrize(
    "choice", [{}, {"inplace": True}, {"reduction": "none"}, {"backward_passes": 1}], ids=str
)
def test_many_blocks_equal_the_items_one_by_one(choice):
    # In place, the gradient of as many logits is not kept: the backward computes blocks again.
    logits, target = make(batch=33, classes=2**16, ignored=[3], dtype=torch.float32)
    assert len(row_blocks(logits.view(2, 33, -1))) > 4
    options = {"alpha": 1.0, "label_smoothing": 0.1, "reduction": "sum", **choice}
    losses, gradients = [], []
    for i in range(33):
        item = logits[[i, 33 + i]], target[i : i + 1]
        losses.append(rdrop_cross_entropy(*item, **options).loss.sum())
        gradients.append(gradient(*item, **options))
    loss = rdrop_cross_entropy(logits, target, **options).loss
    torch.testing.assert_close(loss.sum(), torch.stack(losses).sum())
    expected = torch.stack(gradients, 1).flatten(0, 1)
    torch.testing.assert_close(gradient(logits, target, **options), expected)


@pytest.mark.parametrize("impl", CLOSED_FORMS)
def test_second_backward(impl):
    logits, target = make()
    leaf = logits.clone().requires_grad_()
    loss = rdrop_cross_entropy(leaf * 1, target, alpha=1.0, impl=impl).loss
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)

    leaf = logits.clone().requires_grad_()
    loss = rdrop_cross_entropy(leaf * 1, target, alpha=1.0, inplace=True, impl=impl).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", CLOSED_FORMS)
def test_inplace_overwrites_the_logits_in_the_backward_only(impl):
    logits, target = make()
    leaf = logits.clone().requires_grad_()
    stacked = leaf * 1
    loss = rdrop_cross_entropy(stacked, target, alpha=1.0, inplace=True, impl=impl).loss
    torch.testing.assert_close(stacked.detach(), logits)
    loss.backward()
    torch.testing.assert_close(stacked.detach(), leaf.grad)


@pytest.mark.parametrize("impl", CLOSED_FORMS)
def test_head_that_needs_its_output_raises_under_inplace(impl):
    logits, target = make()
    leaf = logits.clone().requires_grad_()
    loss = rdrop_cross_entropy(torch.relu(leaf), target, alpha=1.0, inplace=True, impl=impl).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_refuses_shared_memory():
    target = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="do not share memory"):
        rdrop_cross_entropy(
            torch.randn(1, 5).expand(4, 5), target, alpha=1.0, inplace=True, impl="chunked"
        )
    overlapping = torch.randn(20).as_strided((4, 5), (3, 1))
    with pytest.raises(ValueError, match="do not share memory"):
        rdrop_cross_entropy(overlapping, target, alpha=1.0, inplace=True)


def test_none_reduction_has_the_shape_of_the_target_and_sums_to_sum():
    logits = torch.randn(6, 4, 9)
    target = torch.randint(0, 9, (3, 4))
    target[0, :2] = -100
    items = rdrop_cross_entropy(logits, target, alpha=1.0, reduction="none")
    total = rdrop_cross_entropy(logits, target, alpha=1.0, reduction="sum")
    assert items.loss.shape == target.shape
    assert (items.loss[0, :2] == 0).all()
    torch.testing.assert_close(items.loss.sum(), total.loss)
    torch.testing.assert_close(items.nll, total.nll)


@pytest.mark.parametrize("num_passes", [2, 3])
def test_parts_add_up(num_passes):
    logits, target = make(num_passes, ignored=[0])
    options = {"alpha": 1.5, "num_passes": num_passes}
    total = rdrop_cross_entropy(logits, target, scale="sum", **options)
    torch.testing.assert_close(total.loss, num_passes * total.nll + 1.5 * total.kl)
    mean = rdrop_cross_entropy(logits, target, **options)
    torch.testing.assert_close(mean.loss, mean.nll + 1.5 / num_passes * mean.kl)
    assert not total.nll.requires_grad
    assert not total.kl.requires_grad


def test_accumulation_with_num_items_equals_one_batch():
    logits, target = make(batch=8, ignored=[1, 6])
    whole = gradient(logits, target, alpha=1.0)
    first, second = logits.chunk(2)
    parts = torch.zeros_like(logits)
    for items in (slice(0, 3), slice(3, 8)):
        micro = torch.cat([first[items], second[items]])
        grad = gradient(micro, target[items], alpha=1.0, num_items=torch.tensor(6))
        parts[:8][items], parts[8:][items] = grad.chunk(2)
    torch.testing.assert_close(parts, whole)


def test_num_items_of_zero_gives_zero():
    logits, _ = make()
    target = torch.full((5,), -100)
    nothing = torch.tensor(0)
    assert rdrop_cross_entropy(logits, target, alpha=1.0, num_items=nothing).loss.item() == 0


def test_no_gradient_work_without_alpha(monkeypatch):
    import regdrop.kernels.chunked as chunked

    seen = []
    original = chunked._gradient

    def spy(found, target, grad_nll, grad_kl, *options):
        seen.append((grad_nll is None, grad_kl is None))
        return original(found, target, grad_nll, grad_kl, *options)

    monkeypatch.setattr(chunked, "_gradient", spy)
    logits, target = make()
    gradient(logits, target, alpha=0.0)
    assert seen == [(False, True)]
    with torch.no_grad():
        assert not rdrop_cross_entropy(logits.requires_grad_(), target, alpha=1.0).loss.grad_fn
    assert len(seen) == 1


def test_float16_with_a_gradient_scaler_at_4096_rows():
    """Gradients over N are formed in float32 with the scaler's factor folded in."""
    logits, target = make(batch=4096, classes=512, dtype=torch.float16)
    grad = gradient(logits, target, upstream=2.0**16, alpha=1.0).double() / 2**16
    truth = gradient(logits.double(), target, alpha=1.0, impl="eager")
    assert (grad == 0).double().mean() < 0.01
    assert (grad - truth).norm() < 2e-3 * truth.norm()


@pytest.mark.parametrize("inplace", [False, True])
def test_under_autocast(inplace):
    layer = torch.nn.Linear(6, 7)
    x, target = torch.randn(10, 6), torch.randint(0, 7, (5,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(x)
        output = rdrop_cross_entropy(logits, target, alpha=1.0, inplace=inplace)
        eager = rdrop_cross_entropy(logits, target, alpha=1.0, impl="eager")
    assert logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, eager.loss)
    output.loss.backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
def test_under_torch_compile(inplace):
    logits, target = make(dtype=torch.float32, ignored=[1])

    @torch.compile(fullgraph=True, backend="inductor" if HAS_COMPILER else "aot_eager")
    def loss(x):
        return rdrop_cross_entropy(x * 2, target, alpha=1.0, inplace=inplace).loss

    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    torch.testing.assert_close(value, rdrop_cross_entropy(logits * 2, target, alpha=1.0).loss)
    torch.testing.assert_close(leaf.grad, 2 * gradient(logits * 2, target, alpha=1.0))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_chunked(dtype):
    logits, target = make(batch=9, classes=65, dtype=dtype, ignored=[1])
    options = {"alpha": 1.0, "label_smoothing": 0.1}
    compiled = rdrop_cross_entropy(logits, target, impl="compiled", **options)
    chunked = rdrop_cross_entropy(logits, target, impl="chunked", **options)
    torch.testing.assert_close(compiled.loss, chunked.loss)
    expected = gradient(logits, target, impl="chunked", **options)
    for inplace in (False, True):
        found = gradient(logits, target, impl="compiled", inplace=inplace, **options)
        torch.testing.assert_close(found, expected)


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("regdrop.kernels.selection.find_spec", lambda name: None)
    logits, target = make()
    with pytest.raises(ValueError, match="impl='triton' needs the package triton"):
        rdrop_cross_entropy(logits, target, alpha=1.0, impl="triton")


def test_target_that_requires_a_gradient_gets_one():
    logits, _ = make()
    target = torch.rand(5, 7, dtype=torch.float64).softmax(-1).requires_grad_()
    rdrop_cross_entropy(logits, target, alpha=1.0).loss.backward()
    expected = -sum(p.log_softmax(-1) for p in logits.chunk(2)) / 5 / 2
    torch.testing.assert_close(target.grad, expected)
    with pytest.raises(ValueError, match="detach"):
        rdrop_cross_entropy(logits, target, alpha=1.0, impl="chunked")


def test_module_is_the_function():
    logits, target = make(3, ignored=[0])
    weight = torch.rand(7, dtype=torch.float64)
    options = {
        "num_passes": 3,
        "weight": weight,
        "label_smoothing": 0.1,
        "scale": "sum",
        "backward_passes": 1,
    }
    module = RDropCrossEntropyLoss(0.5, **options)
    assert "weight" in module.state_dict()
    module.alpha = 2.0
    for ours, expected in zip(
        module(logits, target, num_items=9),
        rdrop_cross_entropy(logits, target, alpha=2.0, num_items=9, **options),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)
    assert "alpha=2.0" in repr(module)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "alpha must be finite and at least 0, got -1.0"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite"),
        ({"alpha": torch.tensor(1.0)}, TypeError, "alpha must be a number, got Tensor"),
        ({"alpha": "1"}, TypeError, "alpha must be a number, got str"),
        ({"alpha": "auto"}, TypeError, r"got 'auto', which RDropConfig takes, .*\.alpha_at\(step"),
        ({"alpha": True}, TypeError, "alpha must be a number, got bool"),
        ({"num_passes": 1}, ValueError, "num_passes must be at least 2"),
        ({"num_passes": 0}, ValueError, "num_passes must be at least 1, got 0"),
        ({"num_passes": 2.0}, TypeError, "num_passes must be an integer, got float"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"scale": "avg"}, ValueError, "scale must be one of"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"backward_passes": 3}, ValueError, "backward_passes must be None or from 1"),
        ({"backward_passes": 1.5}, TypeError, "backward_passes must be an integer, got float"),
        ({"backward_passes": True}, TypeError, "backward_passes must be an integer, got bool"),
        ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number, got str"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be finite and from 0 to 1"),
        ({"num_items": -1}, ValueError, "num_items must be finite and above 0, got -1"),
        ({"num_items": 0}, ValueError, "num_items must be finite and above 0, got 0"),
        ({"num_weight": math.nan}, ValueError, "num_weight must be finite and above 0"),
        ({"num_items": torch.tensor(-3)}, ValueError, "num_items must be finite and at least 0"),
        ({"num_weight": torch.tensor(math.nan)}, ValueError, "num_weight must be finite"),
        ({"num_items": "3"}, TypeError, "num_items must be a number, got str"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items is only used"),
        ({"weight": torch.ones(3)}, ValueError, "weight must have one entry a class"),
        ({"inplace": True, "impl": "eager"}, ValueError, "inplace=True needs"),
        ({"logits": torch.ones(10, 7, dtype=torch.long)}, TypeError, "logits must be floating"),
        ({"logits": torch.ones(5, 7)}, ValueError, "the model saw the batch once"),
        ({"logits": torch.ones(9, 7)}, ValueError, "got 9 rows for 5 targets"),
        (
            {"logits": torch.ones(9, 10, 7), "target": torch.ones(9, 5).long()},
            ValueError,
            r"time comes first; give logits\.transpose\(0, 1\) and target\.transpose\(0, 1\)",
        ),
        (
            {"logits": {"n": 1, "out": torch.ones(10, 7)}},
            TypeError,
            r"logits must be a tensor, got dict; take one of its tensors, as logits\['out'\]",
        ),
        ({"target": (torch.ones(5).long(),)}, TypeError, r"got tuple; take .*, as target\[0\]"),
        ({"logits": torch.ones(10, 7, 4)}, ValueError, r"\(5, 7\), got \(5,\) .* class_dim=-1"),
        ({"target": torch.ones(10, dtype=torch.long)}, ValueError, "target was stacked too"),
        ({"target": torch.full((5,), 7)}, ValueError, "from 0 to 6 .* got 7"),
        ({"target": torch.full((5,), -1)}, ValueError, "got -1"),
        ({"target": torch.ones(5, dtype=torch.bool)}, TypeError, "target must hold integers"),
        ({"target": [1, 2, 3, 4, 5]}, TypeError, "target must be a tensor, got list"),
        ({"target": torch.ones(5, 6)}, ValueError, "class probabilities must have the shape"),
    ],
)
def test_bad_input_is_named(change, error, message):
    logits, target = make()
    arguments = {"logits": logits, "target": target, "alpha": 1.0} | change
    with pytest.raises(error, match=message):
        rdrop_cross_entropy(**arguments)


@pytest.mark.parametrize("shape", [(5, 1), (5,), (5, 1, 3)])
@pytest.mark.parametrize("num_passes", [1, 2])
def test_labels_of_one_logit_are_sent_to_the_binary_loss(shape, num_passes):
    logits = torch.randn(num_passes * 5, 1, *shape[2:])
    options = {"alpha": num_passes - 1.0, "num_passes": num_passes, "class_dim": 1}
    with pytest.raises(ValueError, match="take rdrop_binary_cross_entropy_with_logits"):
        rdrop_cross_entropy(logits, torch.ones(shape), **options)
    with pytest.raises(ValueError, match="take rdrop_binary_cross_entropy_with_logits"):
        cross_entropy_terms(logits, torch.ones(shape), num_passes=num_passes, class_dim=1)
    wrong = torch.ones(5, *shape[2:], dtype=torch.long)
    with pytest.raises(ValueError, match=r"got 1; .* take rdrop_binary_cross_entropy_with_logits"):
        rdrop_cross_entropy(logits, wrong, **options)


@pytest.mark.parametrize("impl", ALL)
def test_the_one_class_there_is_may_be_the_target(impl):
    """A group with one candidate has nothing to learn, in torch's cross entropy too."""
    target = torch.zeros(5, dtype=torch.long)
    assert rdrop_cross_entropy(torch.randn(10, 1), target, alpha=1.0, impl=impl).loss == 0
    alone = rdrop_cross_entropy(torch.randn(2, 1), torch.ones(1, 1), alpha=1.0, impl=impl)
    assert alone.loss == 0
    none = rdrop_cross_entropy(torch.randn(0, 1), torch.ones(0, 1), alpha=1.0, impl=impl)
    assert none.loss == 0
