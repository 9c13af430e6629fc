"""Exact unbiasedness: averages over every mask and every part of the batch, in float64."""

from functools import partial
from itertools import combinations, product

import pytest
import torch
from torch import nn

import reference
from regdrop import RDropConfig, rdrop_step, step_passes
from regdrop.kernels import Projection
from regdrop.loss import cross_entropy_terms, linear_cross_entropy_loss
from regdrop.schedule import plan_step
from steps import compute_step_loss

SIZE, FEATURES, CLASSES = 3, 2, 4


class MaskedModel(nn.Module):
    """A network whose dropout mask of every item is set from outside, one row a forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(FEATURES, 3, dtype=torch.float64)
        self.outer = nn.Linear(3, CLASSES, dtype=torch.float64)
        self.rows = iter(())

    def forward(self, batch):
        mask = next(self.rows)[batch["id"]]
        return self.outer(torch.tanh(self.inner(batch["x"])) * mask[:, None])


@pytest.fixture
def setup():
    model = MaskedModel()
    batch = {"x": torch.randn(SIZE, FEATURES, dtype=torch.float64), "id": torch.arange(SIZE)}
    target = torch.tensor([0, 3, -100])
    return model, batch, target


def loss_of(model, batch, target, config, masks, step=0, **options):
    model.rows = iter(torch.tensor(masks, dtype=torch.float64).view(-1, SIZE))
    output = compute_step_loss(
        model, batch, target, cross_entropy_terms, config, plan_step(config, step), **options
    )
    assert next(model.rows, None) is None
    return output


def gradient(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads])


def mean_gradient(setup, config, num_passes, parts=(None,)):
    """Average the gradient over all masks of all passes, and over parts of the batch."""
    model, batch, target = setup
    total, count = 0, 0
    for masks in product((0.0, 2.0), repeat=SIZE * num_passes):
        for part in parts:
            with pytest.MonkeyPatch.context() as patch:
                if part is not None:
                    chosen = torch.tensor(part)
                    patch.setattr(step_passes, "_random_items", lambda *_, chosen=chosen: chosen)
                output = loss_of(model, batch, target, config, masks)
            total, count = total + gradient(model, output.loss), count + 1
    return total / count


def options(**changes):
    return RDropConfig(**{"alpha": 1.3, "passes": "sequential", "scale": "sum", **changes})


@pytest.mark.parametrize(("num_passes", "backward_passes"), [(2, 1), (3, 1), (3, 2)])
def test_gradient_through_some_passes_is_unbiased_over_all_masks(
    setup, num_passes, backward_passes
):
    full = options(num_passes=num_passes)
    cheap = options(num_passes=num_passes, backward_passes=backward_passes)
    expected = mean_gradient(setup, full, num_passes)
    torch.testing.assert_close(mean_gradient(setup, cheap, num_passes), expected)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("backward_passes", [None, 1])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_divergence_of_a_part_is_unbiased_over_all_parts_and_masks(
    setup, size, backward_passes, scale
):
    parts = list(combinations(range(SIZE), size))
    part = options(fraction=size / SIZE, backward_passes=backward_passes, scale=scale)
    expected = mean_gradient(setup, options(scale=scale), 2)
    torch.testing.assert_close(mean_gradient(setup, part, 2, parts), expected)


def test_unequal_masks_bias_the_gradient_through_one_pass(setup):
    """The proof above is no tautology: it fails where the passes are not drawn alike."""
    model, batch, target = setup

    def average(config, is_graded_first):
        total = 0
        for masks in product((0.0, 2.0), repeat=SIZE):
            plain = (1.0,) * SIZE
            rows = masks + plain if is_graded_first else plain + masks
            total = total + gradient(model, loss_of(model, batch, target, config, rows).loss)
        return total / 2**SIZE

    one = average(options(backward_passes=1), is_graded_first=False)
    both = average(options(), is_graded_first=True)
    assert (one - both).abs().max() > 1e-2


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_every_nth_step_with_rescaling_has_the_same_mean_gradient(setup, scale):
    model, batch, target = setup
    every, third = options(scale=scale), options(scale=scale, every_n_steps=3)

    def average(config):
        total, count = 0, 0
        for masks in product((0.0, 2.0), repeat=2 * SIZE):
            for step in range(3):
                used = masks[: SIZE * plan_step(config, step).num_passes]
                loss = loss_of(model, batch, target, config, used, step).loss
                total, count = total + gradient(model, loss), count + 1
        return total / count

    torch.testing.assert_close(average(third), average(every))


@pytest.mark.parametrize(
    ("num_passes", "backward_passes", "size", "every_n_steps", "start_step"),
    [(2, None, 2, 2, 0), (2, 1, 3, 2, 1), (2, 1, 2, 2, 0), (2, 1, 2, 2, 1), (3, 1, 2, 1, 0)],
)
def test_every_combination_is_unbiased_over_masks_parts_and_steps(
    setup, num_passes, backward_passes, size, every_n_steps, start_step
):
    """From the first step with R-Drop on, over one turn of its steps."""
    model, batch, target = setup
    cheap = options(
        num_passes=num_passes,
        backward_passes=backward_passes,
        fraction=size / SIZE,
        every_n_steps=every_n_steps,
        start_step=start_step,
    )
    steps = range(start_step, start_step + every_n_steps)
    parts = [torch.tensor(part) for part in combinations(range(SIZE), size)]
    total, count = 0, 0
    for masks in product((0.0, 2.0), repeat=SIZE * num_passes):
        for part, step in product(parts, steps):
            used = masks[: SIZE * plan_step(cheap, step).num_passes]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(step_passes, "_random_items", lambda *_, part=part: part)
                loss = loss_of(model, batch, target, cheap, used, step).loss
            total, count = total + gradient(model, loss), count + 1
    expected = mean_gradient(setup, options(num_passes=num_passes), num_passes)
    torch.testing.assert_close(total / count, expected)


@pytest.mark.parametrize("passes", ["stacked", "sequential"])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_loss_is_that_of_the_paper(setup, passes, scale):
    _, batch, target = setup
    model = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    config = options(passes=passes, scale=scale)
    noise = torch.randn(2 * SIZE, CLASSES, dtype=torch.float64)
    drawn = []

    def forward(items):
        start = sum(map(len, drawn))
        logits = model(items["x"])
        drawn.append(logits + noise[start : start + len(logits)])
        return drawn[-1]

    output = compute_step_loss(
        forward, batch, target, cross_entropy_terms, config, plan_step(config, 0)
    )
    expected = reference.rdrop_loss(torch.cat(drawn), target, alpha=1.3, scale=scale)
    assert output.loss.item() == pytest.approx(expected)


def test_fraction_takes_that_many_items_at_random(setup):
    _, batch, target = setup
    seen = []

    def forward(items):
        seen.append(items["id"].tolist())
        return torch.zeros(len(items["id"]), CLASSES, dtype=torch.float64)

    config = options(fraction=0.6)
    for _ in range(40):
        compute_step_loss(forward, batch, target, cross_entropy_terms, config, plan_step(config, 0))
    assert seen[::2] == [[0, 1, 2]] * 40
    assert {len(set(part)) for part in seen[1::2]} == {2}
    assert {frozenset(part) for part in seen[1::2]} == {
        frozenset(pair) for pair in combinations(range(3), 2)
    }


def test_fraction_sees_at_least_one_item(setup):
    model, batch, target = setup
    output = loss_of(model, batch, target, options(fraction=0.01), [2.0, 2.0, 0.0] * 2)
    assert output.loss.isfinite()


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_a_step_of_one_pass_has_the_likelihoods_weight_and_no_divergence(setup, scale):
    model, batch, target = setup
    masks = [2.0, 0.0, 2.0]
    config = options(scale=scale, start_step=1)
    single = loss_of(model, batch, target, config, masks)
    double = loss_of(model, batch, target, options(scale=scale, alpha=0.0), masks * 2)
    assert single.kl == 0
    assert single.loss.item() == pytest.approx(double.loss.item())
    assert single.nll.item() == pytest.approx(double.nll.item())


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_num_items_is_the_denominator_of_both_terms(setup, fraction):
    model, batch, target = setup
    config = options(fraction=fraction)

    def run(**arguments):
        torch.manual_seed(3)
        return loss_of(model, batch, target, config, [2.0, 0.0, 2.0, 0.0, 2.0, 2.0], **arguments)

    # Two of the three items count.
    assert run(num_items=8).loss.item() == pytest.approx(run().loss.item() / 4)


@pytest.mark.parametrize("scale", ["mean", "sum"])
@pytest.mark.parametrize("backward_passes", [None, 1])
@pytest.mark.parametrize("fraction", [0.4, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_a_loss_that_computes_its_gradient_at_once_is_that_of_combined_terms(
    scale, backward_passes, fraction, alpha
):
    weight = torch.randn(CLASSES, FEATURES, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, FEATURES, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, -100, 1, 1])
    class_weight = torch.rand(CLASSES, dtype=torch.float64)
    config = RDropConfig(
        alpha=alpha,
        num_passes=3,
        scale=scale,
        backward_passes=backward_passes,
        fraction=fraction,
        passes="sequential",
    )

    def terms(hidden, target, /, **options):
        return cross_entropy_terms(hidden @ weight.T, target, weight=class_weight, **options)

    def run(loss):
        torch.manual_seed(1)
        output = compute_step_loss(
            lambda batch: batch * torch.rand_like(batch),
            x,
            target,
            terms,
            config,
            plan_step(config, 0),
            num_items=7.0,
            num_weight=3.0,
            loss=loss,
        )
        return output, torch.autograd.grad(output.loss, (x, weight))

    fused = partial(linear_cross_entropy_loss, projection=Projection(weight), weight=class_weight)
    torch.testing.assert_close(run(fused), run(None))


# --- the caller's batch --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "step"),
    [
        (RDropConfig(every_n_steps=2), 0),
        (RDropConfig(every_n_steps=2), 1),
        (RDropConfig(start_step=5), 0),
        (RDropConfig(alpha=0, num_passes=1), 0),
        (RDropConfig(passes="sequential"), 0),
        (RDropConfig(fraction=0.5), 0),
    ],
)
def test_a_layer_that_writes_into_its_input_leaves_the_callers_batch(config, step):
    model = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(FEATURES, CLASSES))
    batch, target = torch.ones(4, FEATURES), torch.tensor([0, 3, 1, 2])
    rdrop_step(model, batch, target, config=config, step=step)
    assert torch.equal(batch, torch.ones(4, FEATURES))


def test_what_is_shared_is_handed_to_one_pass_as_it_is():
    table = torch.ones(3)
    seen = []

    def forward(batch):
        seen.append(batch["table"])
        return batch["x"]

    batch = {"x": torch.randn(2, CLASSES), "table": table}
    config = RDropConfig(alpha=0, num_passes=1)
    options = {"config": config, "step": 0, "shared": "table"}
    rdrop_step(forward, batch, torch.tensor([0, 1]), **options)
    assert seen[0] is table


@pytest.mark.parametrize("is_named", [True, False])
def test_a_first_tensor_that_is_none_of_the_items_is_named(is_named):
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.Dropout(0.5))
    mask, x = torch.ones(1, 3, 3), torch.randn(4, 3, FEATURES)
    batch = {"mask": mask, "x": x} if is_named else (mask, x)
    target = torch.randint(0, CLASSES, (4, 3))

    def forward(batch):
        return model(batch["x"] if is_named else batch[1])

    options = {"config": RDropConfig(), "step": 0}
    told = "mask" if is_named else "the first Tensor"
    message = (
        rf"batch size is 1 by {told} of shape \(1, 3, 3\), but target has 4 rows, .* batch_size=4"
    )
    with pytest.raises(ValueError, match=message):
        rdrop_step(forward, batch, target, **options)
    assert rdrop_step(forward, batch, target, batch_size=4, **options).kl > 0


def test_a_target_that_is_flat_has_rows_of_its_own():
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.Dropout(0.5))
    x, target = torch.randn(4, 2, FEATURES), torch.randint(0, CLASSES, (8,))
    options = {"config": RDropConfig(), "step": 0}
    assert rdrop_step(lambda x: model(x).flatten(0, 1), x, target, **options).kl > 0
