"""Multi-label and regression losses, and the divergence by itself."""

import math
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

import reference
from regdrop import (
    RDropBCEWithLogitsLoss,
    RDropL1Loss,
    RDropMSELoss,
    RDropSmoothL1Loss,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_l1_loss,
    rdrop_mse_loss,
    rdrop_smooth_l1_loss,
    symmetric_kl,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slow_bernoulli_kl(a, b):
    p, q = sigmoid(a), sigmoid(b)

    def kl(p, q):
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    return (kl(p, q) + kl(q, p)) / 2


def slow_smooth_l1(difference, beta):
    d = abs(difference)
    return d * d / (2 * beta) if d < beta else d - beta / 2


def slow_mean(num_passes, stacked, target, likelihood, divergence, mask):
    passes = stacked.double().reshape(num_passes, -1).tolist()
    flat, counted = target.double().flatten().tolist(), mask.flatten().tolist()
    nll, kl, count = 0.0, 0.0, 0
    for n, (t, keep) in enumerate(zip(flat, counted, strict=True)):
        if keep:
            values = [p[n] for p in passes]
            nll += sum(likelihood(v, t) for v in values) / num_passes
            pairs = list(combinations(values, 2))
            kl += sum(divergence(a, b) for a, b in pairs) / len(pairs)
            count += 1
    return nll / count, kl / count


CASES = {
    "bce": (
        rdrop_binary_cross_entropy_with_logits,
        lambda z, t: -t * math.log(sigmoid(z)) - (1 - t) * math.log(1 - sigmoid(z)),
        slow_bernoulli_kl,
        lambda stacked, target: F.binary_cross_entropy_with_logits(stacked, target),
    ),
    "mse": (
        rdrop_mse_loss,
        lambda z, t: (z - t) ** 2,
        lambda a, b: (a - b) ** 2,
        lambda stacked, target: F.mse_loss(stacked, target),
    ),
    "l1": (
        rdrop_l1_loss,
        lambda z, t: abs(z - t),
        lambda a, b: abs(a - b),
        lambda stacked, target: F.l1_loss(stacked, target),
    ),
    "smooth_l1": (
        partial(rdrop_smooth_l1_loss, beta=0.7),
        lambda z, t: slow_smooth_l1(z - t, 0.7),
        lambda a, b: slow_smooth_l1(a - b, 0.7),
        lambda stacked, target: F.smooth_l1_loss(stacked, target, beta=0.7),
    ),
}
REGRESSION = ["mse", "l1", "smooth_l1"]


def make(num_passes=2, shape=(4, 3)):
    stacked = torch.randn(num_passes * shape[0], *shape[1:], dtype=torch.float64)
    target = torch.randint(0, 2, shape).double()
    return stacked, target


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_passes", [2, 3])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_value_is_that_of_the_formula(case, num_passes, scale):
    loss, likelihood, divergence, _ = CASES[case]
    stacked, target = make(num_passes)
    mask = torch.tensor([[True, False, True]] * 3 + [[False] * 3])
    nll, kl = slow_mean(num_passes, stacked, target, likelihood, divergence, mask)
    stacked[num_passes * 4 - 1] = math.nan  # masked
    output = loss(stacked, target, alpha=1.3, num_passes=num_passes, mask=mask, scale=scale)
    total = num_passes * nll + 1.3 * kl
    assert output.nll.item() == pytest.approx(nll)
    assert output.kl.item() == pytest.approx(kl)
    assert output.loss.item() == pytest.approx(total if scale == "sum" else total / num_passes)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(case, reduction):
    stacked, target = make(3)
    options = {"alpha": 0.7, "num_passes": 3, "reduction": reduction}
    loss = CASES[case][0]
    assert torch.autograd.gradcheck(
        lambda x: loss(x, target, **options).loss, stacked.requires_grad_()
    )


@pytest.mark.parametrize("case", CASES)
def test_one_pass_without_alpha_is_torchs_loss(case):
    loss, _, _, torch_loss = CASES[case]
    stacked, target = make(1)
    output = loss(stacked, target, alpha=0, num_passes=1)
    torch.testing.assert_close(output.loss, torch_loss(stacked, target))


@pytest.mark.parametrize("case", CASES)
def test_all_masked_gives_zero_loss_and_gradient(case):
    stacked, target = make()
    stacked.requires_grad_()
    mask = torch.zeros(4, 1, dtype=torch.bool)
    output = CASES[case][0](stacked, target, alpha=1.0, mask=mask)
    output.loss.backward()
    assert output.loss.item() == 0
    assert (stacked.grad == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_accumulation_with_num_items_equals_one_batch(case):
    loss = CASES[case][0]
    stacked, target = make()
    whole = loss(stacked, target, alpha=1.0).loss
    first, second = stacked.chunk(2)
    parts = [
        loss(torch.cat([first[s], second[s]]), target[s], alpha=1.0, num_items=12).loss
        for s in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("case", CASES)
def test_one_backward_pass_is_twice_the_gradient_of_the_first(case):
    loss = CASES[case][0]
    stacked, target = make()
    stacked.requires_grad_()
    (full,) = torch.autograd.grad(loss(stacked, target, alpha=1.0).loss, stacked)
    (one,) = torch.autograd.grad(loss(stacked, target, alpha=1.0, backward_passes=1).loss, stacked)
    torch.testing.assert_close(one[:4], 2 * full[:4])
    assert (one[4:] == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_masked_elements_may_hold_anything(case):
    loss = CASES[case][0]
    target = torch.tensor([[1.0], [math.nan]])
    stacked = torch.zeros(4, 1, requires_grad=True)
    mask = torch.tensor([[True], [False]])
    output = loss(stacked, target, alpha=3.0, mask=mask)
    likelihood = CASES[case][1](0.0, 1.0)  # ln 2 for a label, 1 for a squared error
    assert output.loss.item() == pytest.approx(likelihood)
    output.loss.backward()
    assert stacked.grad[[1, 3]].tolist() == [[0.0], [0.0]]
    filled = torch.tensor([[0.0], [math.nan], [0.0], [math.inf]], requires_grad=True)
    again = loss(filled, target, alpha=3.0, mask=mask, backward_passes=1)
    torch.testing.assert_close(again.loss, output.loss)
    again.loss.backward()
    assert filled.grad[1:].tolist() == [[0.0], [0.0], [0.0]]
    assert filled.grad[0].item() != 0


@pytest.mark.parametrize("padding", [-100.0, -1.0, 2.0, math.nan, -100, 255])
def test_labels_that_are_no_chances_are_refused(padding):
    target = torch.randint(0, 2, (4, 3))
    target = target if isinstance(padding, int) else target.float()
    target[:, 2] = padding
    stacked, counted = torch.randn(8, 3), torch.tensor([True, True, False])
    loss = partial(rdrop_binary_cross_entropy_with_logits, stacked, alpha=1.0)
    with pytest.raises(ValueError, match=rf"target must be between 0 and 1, got {padding:g}"):
        loss(target)
    output = loss(target, mask=counted)
    expected = loss(target.masked_fill(~counted, 0), mask=counted)
    torch.testing.assert_close(output, expected)
    # Without weight it counts in the divergence alone, whatever it is.
    unlabelled = loss(target, weight=counted.float())
    torch.testing.assert_close(unlabelled.nll, output.nll * 2 / 3)


def test_a_mask_of_stacked_items_is_none_of_the_items_of_one_pass():
    with pytest.raises(ValueError, match=r"the items of one pass, of shape \(4,\), got \(8,\)"):
        symmetric_kl(torch.randn(8, 5), mask=torch.ones(8, dtype=torch.bool))


def test_labels_that_are_chances_but_for_rounding_are_taken():
    target = torch.tensor([[1.0000001, -1e-7]]).bfloat16()
    output = rdrop_binary_cross_entropy_with_logits(torch.randn(2, 2), target, alpha=1.0)
    assert output.nll.isfinite()


def test_a_compiled_loss_refuses_labels_that_are_no_chances():
    def loss(stacked, target):
        return rdrop_binary_cross_entropy_with_logits(stacked, target, alpha=1.0).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    stacked, target = torch.randn(8, 3), torch.ones(4, 3)
    torch.testing.assert_close(compiled(stacked, target), loss(stacked, target))
    with pytest.raises(RuntimeError, match="target must be between 0 and 1"):
        compiled(stacked, -target)


def test_class_weights_of_the_likelihood():
    stacked, target = make()
    weight, pos_weight = torch.rand(3), torch.rand(3)
    output = rdrop_binary_cross_entropy_with_logits(
        stacked, target, alpha=1.0, weight=weight, pos_weight=pos_weight
    )
    expected = F.binary_cross_entropy_with_logits(
        stacked, target.repeat(2, 1), weight=weight.double(), pos_weight=pos_weight.double()
    )
    torch.testing.assert_close(output.nll, expected)
    module = RDropBCEWithLogitsLoss(1.0, weight=weight, pos_weight=pos_weight)
    torch.testing.assert_close(module(stacked, target).loss, output.loss)


def test_label_masked_in_both_passes_and_in_one():
    logits = torch.tensor([[-math.inf, 1.0], [-math.inf, 2.0]])
    target = torch.tensor([[0.0, 1.0]])
    output = rdrop_binary_cross_entropy_with_logits(logits, target, alpha=1.0)
    assert output.kl.item() == pytest.approx(slow_bernoulli_kl(1.0, 2.0) / 2)
    logits[0, 0] = 0.0
    with pytest.raises(ValueError, match="-inf"):
        rdrop_binary_cross_entropy_with_logits(logits, target, alpha=1.0)


@pytest.mark.parametrize("case", ["bce", "l1"])
@pytest.mark.parametrize("num_passes", [2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_least_finite_number_costs_what_torch_says(case, num_passes, dtype):
    loss, _, _, torch_loss = CASES[case]
    stacked = torch.full((num_passes, 1), torch.finfo(dtype).min, dtype=dtype)
    target = torch.ones(1, 1, dtype=dtype)
    expected = torch_loss(stacked[:1], target)
    assert expected.isfinite()
    output = loss(stacked, target, alpha=0.0, num_passes=num_passes)
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(4, 3), (3,), (4, 1), ()])
def test_weight_is_of_the_likelihood_alone(case, shape):
    loss = CASES[case][0]
    stacked, target = make()
    weight = torch.rand(shape, dtype=torch.float64) + 0.5
    options = {"alpha": 1.3, "reduction": "none"}
    plain = loss(stacked, target, **options | {"alpha": 0.0}).loss
    both = loss(stacked, target, **options).loss
    found = loss(stacked, target, weight=weight, **options).loss
    torch.testing.assert_close(found, plain * weight + (both - plain))
    # The mean is over elements, whatever their weights.
    mean = loss(stacked, target, weight=weight, alpha=1.3).loss
    torch.testing.assert_close(mean, found.mean())


@pytest.mark.parametrize("case", REGRESSION)
def test_minus_100_is_a_number_like_any_other(case):
    loss, likelihood, divergence, _ = CASES[case]
    stacked = torch.tensor([[-99.0], [-100.0], [-101.0], [-100.0]])
    output = loss(stacked, torch.full((2, 1), -100.0), alpha=1.0)
    assert output.nll.item() == pytest.approx(likelihood(1.0, 0.0) / 2)
    assert output.kl.item() == pytest.approx(divergence(2.0, 0.0) / 2)


def test_smooth_l1_without_a_smooth_part_is_l1():
    stacked, target = make()
    torch.testing.assert_close(
        rdrop_smooth_l1_loss(stacked, target, alpha=1.5, beta=0).loss,
        rdrop_l1_loss(stacked, target, alpha=1.5).loss,
    )
    for beta, error in ((-1.0, ValueError), (math.inf, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="beta must be"):
            rdrop_smooth_l1_loss(stacked, target, alpha=1.5, beta=beta)
        with pytest.raises(error, match="beta must be"):
            RDropSmoothL1Loss(1.5, beta=beta)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (RDropMSELoss, rdrop_mse_loss),
        (RDropL1Loss, rdrop_l1_loss),
        (partial(RDropSmoothL1Loss, beta=0.3), partial(rdrop_smooth_l1_loss, beta=0.3)),
    ],
)
def test_module_is_the_function(module, function):
    stacked, target = make(3)
    tensors = {"mask": target > 0, "weight": torch.rand(3), "num_items": 5}
    options = {"num_passes": 3, "scale": "mean", "backward_passes": 2}
    held = module(1.0, **options)
    held.alpha = 2.5
    found = held(stacked, target, **tensors)
    for ours, theirs in zip(
        found, function(stacked, target, alpha=2.5, **options, **tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_mse_module_and_half_precision():
    predictions, target = torch.randn(8).half(), torch.randn(4)
    output = RDropMSELoss(2.0, scale="mean")(predictions, target)
    assert output.loss.dtype == torch.float32
    a, b = predictions.float().chunk(2)
    torch.testing.assert_close(output.kl, (a - b).square().mean())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.ones(4, 2)}, ValueError, "target must have the shape of one pass"),
        ({"target": torch.ones(8, 3)}, ValueError, "target was stacked too"),
        ({"mask": torch.ones(4, 3)}, TypeError, "mask must be a boolean"),
        ({"mask": torch.ones(5, 3, dtype=torch.bool)}, ValueError, "mask must be broadcastable"),
        ({"weight": torch.ones(2)}, ValueError, "weight must be broadcastable"),
        ({"weight": torch.ones(1, 4, 3)}, ValueError, "weight must be broadcastable"),
        ({"alpha": -1}, ValueError, "alpha must be finite"),
    ],
)
def test_bad_input_is_named(case, change, error, message):
    stacked, target = make()
    arguments = {"target": target, "alpha": 1.0} | change
    with pytest.raises(error, match=message):
        CASES[case][0](stacked, **arguments)


@pytest.mark.parametrize("num_passes", [2, 3])
def test_symmetric_kl(num_passes):
    logits = torch.randn(num_passes * 4, 5, 6, dtype=torch.float64)
    mask = torch.rand(4, 5) < 0.6
    rows = logits.view(num_passes, 20, 6).transpose(0, 1).tolist()
    slow = torch.tensor([reference.symmetric_kl(row) for row in rows], dtype=torch.float64)
    items = symmetric_kl(logits, num_passes=num_passes, reduction="none")
    torch.testing.assert_close(items, slow.view(4, 5))
    masked = symmetric_kl(logits, num_passes=num_passes, mask=mask)
    torch.testing.assert_close(masked, items[mask].mean())
    total = symmetric_kl(logits, num_passes=num_passes, mask=mask, reduction="sum")
    torch.testing.assert_close(total, items[mask].sum())
    assert torch.autograd.gradcheck(
        lambda x: symmetric_kl(x, num_passes=num_passes, mask=mask), logits.requires_grad_()
    )


def test_symmetric_kl_checks_its_input():
    with pytest.raises(ValueError, match="num_passes=2"):
        symmetric_kl(torch.randn(5, 3))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        symmetric_kl(torch.randn(4, 3), num_passes=1)
    with pytest.raises(TypeError, match="logits must be floating point"):
        symmetric_kl(torch.ones(4, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((8, 1), {}),
        ((6, 1), {"num_passes": 3}),
        ((2, 5, 1), {}),
        ((2, 1, 4, 4), {"class_dim": 1}),
        ((8, 1), {"reduction": "none"}),
    ],
)
def test_symmetric_kl_of_one_class_is_refused(shape, options):
    with pytest.raises(ValueError, match=r"binary_cross_entropy_terms\(logits, target"):
        symmetric_kl(torch.randn(shape), **options)


@pytest.mark.parametrize("shape", [(2, 1), (0, 1), (0, 4, 1)])
def test_symmetric_kl_of_one_item_or_none_may_have_one_class(shape):
    """The last batch of a contrastive loss may be one pair, its own only candidate."""
    assert symmetric_kl(torch.randn(shape)) == 0
