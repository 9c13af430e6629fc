"""One step of a loop of one's own: the loss by hand, schedules, accumulation, terms, warnings."""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regdrop import (
    RDropConfig,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_mse_loss,
    rdrop_step,
    repeat_batch,
    symmetric_kl,
)
from regdrop.kernels.chunked import row_blocks
from regdrop.loss import (
    ItemTerms,
    adaptive_softmax_terms,
    binary_cross_entropy_terms,
    cross_entropy_terms,
    ctc_terms,
    fraternal_terms,
    l1_terms,
    mse_terms,
    smooth_l1_terms,
)

SIZE, FEATURES, CLASSES = 6, 5, 4


def network(dropout=0.5, classes=CLASSES):
    torch.manual_seed(1)
    layers = nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, classes)
    return nn.Sequential(*layers).double()


def inputs(size=SIZE):
    return torch.randn(size, FEATURES, dtype=torch.float64)


def classes(size=SIZE):
    return torch.randint(0, CLASSES, (size,))


def seeded(function, *arguments, **options):
    torch.manual_seed(7)
    return function(*arguments, **options)


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def stacked(model, x, num_passes=2):
    return model(repeat_batch(x, num_passes))


# --- the loss is that of the stacked batch ----------------------------------------------------


@pytest.mark.parametrize("scale", ["mean", "sum"])
@pytest.mark.parametrize("num_passes", [2, 3])
@pytest.mark.parametrize(
    ("name", "function", "target"),
    [
        ("cross_entropy", rdrop_cross_entropy, torch.tensor([0, 3, -100, 1, 2, 0])),
        (
            "binary_cross_entropy",
            rdrop_binary_cross_entropy_with_logits,
            torch.arange(SIZE * CLASSES).view(SIZE, CLASSES).remainder(3).gt(0).double(),
        ),
        ("mse", rdrop_mse_loss, torch.linspace(-200, 9, SIZE * CLASSES).view(SIZE, -1).double()),
    ],
)
def test_each_named_loss_is_its_function_of_the_stacked_batch(
    name, function, target, num_passes, scale
):
    model, x = network(), inputs()
    config = RDropConfig(alpha=1.7, num_passes=num_passes, scale=scale)
    output = seeded(rdrop_step, model, x, target, config=config, step=0, loss=name)
    options = {"alpha": 1.7, "num_passes": num_passes, "scale": scale}
    expected = seeded(lambda: function(stacked(model, x, num_passes), target, **options))
    torch.testing.assert_close(tuple(output), tuple(expected))
    assert output.kl > 0
    torch.testing.assert_close(gradient(output.loss, model), gradient(expected.loss, model))


def test_options_of_the_cross_entropy_are_those_of_the_config():
    model, x, y = network().float(), inputs().float(), torch.tensor([0, 3, -1, 1, 2, -1])
    weight = (1.0, 2.0, 0.5, 4.0)
    config = RDropConfig(alpha=2.0, class_weight=weight, unlabelled_index=-1)
    output = seeded(rdrop_step, model, x, y, config=config, step=0)
    options = {"weight": torch.tensor(weight), "unlabelled_index": -1}
    logits = seeded(stacked, model, x)
    expected = rdrop_cross_entropy(logits, y, alpha=2.0, scale="mean", **options)
    torch.testing.assert_close(tuple(output), tuple(expected))
    # Labelled items alone in the likelihood; all of them in the divergence.
    labelled = y != -1
    nll = sum(
        F.cross_entropy(half[labelled], y[labelled], weight=torch.tensor(weight)) / 2
        for half in logits.chunk(2)
    )
    torch.testing.assert_close(output.nll, nll.detach())
    torch.testing.assert_close(output.kl, symmetric_kl(logits).detach())


def nodes(loss):
    """Return the names of what autograd recorded before a loss."""
    seen, found = {}, [loss.grad_fn]
    while found:
        node = found.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            found += [before for before, _ in node.next_functions]
    return set(seen.values())


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_kernel_is_the_one_that_was_asked_for(fraction):
    """The eager form is recorded operation by operation, the closed form is one node."""
    model, x, y = network(), inputs(), torch.tensor([0, 3, -100, 1, 2, 0])

    def run(impl):
        config = RDropConfig(alpha=1.7, impl=impl, fraction=fraction)
        return seeded(rdrop_step, model, x, y, config=config, step=0)

    eager, chunked = run("eager"), run("chunked")
    assert eager.kl > 0
    torch.testing.assert_close(tuple(chunked), tuple(eager), rtol=1e-12, atol=1e-12)
    assert {"LogSoftmaxBackward0", "GatherBackward0"} <= nodes(eager.loss)
    assert not {"LogSoftmaxBackward0", "GatherBackward0"} & nodes(chunked.loss)
    gradients = [gradient(output.loss, model) for output in (chunked, eager)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_fraternal_dropout_and_terms_of_the_library_with_options():
    model, x, y = network(), inputs(), classes()
    config = RDropConfig(alpha=2.0, method="fraternal")
    found = seeded(rdrop_step, model, x, y, config=config, step=0)
    smooth = partial(cross_entropy_terms, label_smoothing=0.2)
    smoothed = seeded(rdrop_step, model, x, y, config=RDropConfig(), step=0, loss=smooth)
    logits = seeded(stacked, model, x)
    terms = fraternal_terms(logits, y, num_passes=2)
    torch.testing.assert_close(found.loss, terms.nll.mean() + 2.0 / 2 * terms.kl.mean())
    expected = rdrop_cross_entropy(logits, y, alpha=1.0, scale="mean", label_smoothing=0.2)
    torch.testing.assert_close(smoothed.loss, expected.loss)


def test_the_batch_and_its_shared_names_are_those_of_repeat_batch():
    model, y = network(), classes()
    batch = {"x": inputs(), "table": torch.zeros(SIZE, FEATURES, dtype=torch.float64)}
    seen = []

    def forward(items):
        seen.append(sorted((name, len(value)) for name, value in items.items()))
        return model(items["x"])

    rdrop_step(forward, batch, y, config=RDropConfig(), step=0, shared=("table",))
    assert seen == [[("table", SIZE), ("x", 2 * SIZE)]]
    assert len(batch["x"]) == SIZE


# --- schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_steps_of_one_pass_keep_the_weight_of_the_likelihood(scale):
    model, x, y = network(), inputs(), classes()
    config = RDropConfig(alpha=1.5, every_n_steps=3, start_step=2, scale=scale)
    for step in range(9):
        output = seeded(rdrop_step, model, x, y, config=config, step=step)
        if step in (2, 5, 8):
            logits = seeded(stacked, model, x)
            expected = rdrop_cross_entropy(logits, y, alpha=3 * 1.5, scale=scale)
            assert output.kl > 0
            torch.testing.assert_close(output.loss, expected.loss)
        else:
            nll = F.cross_entropy(seeded(model, x), y)
            assert output.kl == 0
            torch.testing.assert_close(output.loss, nll * (2 if scale == "sum" else 1))
            torch.testing.assert_close(output.nll, nll.detach())


def test_alpha_follows_its_ramp():
    model, x, y = network(), inputs(), classes()
    config = RDropConfig(alpha=4.0, alpha_schedule="linear", alpha_warmup_steps=4)
    for step, alpha in enumerate([0.0, 1.0, 2.0, 3.0, 4.0, 4.0]):
        output = rdrop_step(model, x, y, config=config, step=step)
        torch.testing.assert_close(output.loss.detach(), output.nll + alpha / 2 * output.kl)


@pytest.mark.parametrize("passes", ["stacked", "sequential"])
def test_one_backward_pass_without_dropout_has_the_whole_gradient(passes):
    model, x, y = network(dropout=0.0), inputs(), classes()

    def run(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = RDropConfig(passes=passes, **options)
            return gradient(rdrop_step(model, x, y, config=config, step=0).loss, model)

    torch.testing.assert_close(run(backward_passes=1), run())


def test_a_part_of_the_batch_carries_the_divergence():
    model, x, y = network(), inputs(), classes()
    rows = []

    def forward(items):
        rows.append(len(items))
        return model(items)

    config = RDropConfig(alpha=2.0, fraction=0.5, passes="sequential")
    output = rdrop_step(forward, x, y, config=config, step=0)
    assert rows == [SIZE, SIZE // 2]
    torch.testing.assert_close(output.loss.detach(), output.nll + output.kl)


def drawn(*shape):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def lengths(transcripts):
    return {"logit_lengths": 3 + transcripts[:, 0], "target_lengths": transcripts[:, 0]}


@pytest.mark.parametrize(
    ("terms", "target", "bound"),
    [
        (mse_terms, drawn(SIZE, CLASSES), lambda y: {"mask": y > 0.4, "weight": y[:, :1]}),
        (l1_terms, drawn(SIZE, CLASSES), lambda y: {"weight": drawn(CLASSES), "mask": y > 0.4}),
        (smooth_l1_terms, drawn(SIZE, CLASSES), lambda y: {"beta": 0.1, "mask": y[:, 1:2] > 0.4}),
        (
            binary_cross_entropy_terms,
            drawn(SIZE, CLASSES),
            lambda y: {"weight": y, "pos_weight": y[:, 2:3], "mask": y > 0.4},
        ),
        (ctc_terms, torch.tensor([[1, 2], [2, 3], [2, 1], [1, 1], [1, 3], [2, 2]]), lengths),
        (cross_entropy_terms, torch.arange(SIZE) % CLASSES, lambda y: {"weight": drawn(CLASSES)}),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_what_is_bound_to_terms_is_that_of_the_part(terms, target, bound):
    """As for terms of one's own that find it in the target."""
    x = torch.randn(SIZE, *(() if terms is not ctc_terms else (7,)), FEATURES).double()
    model, config = network(), RDropConfig(alpha=2.0, fraction=0.5)

    def own(outputs, target, *, num_passes):
        return terms(outputs, target, num_passes=num_passes, **bound(target))

    found, expected = (
        seeded(rdrop_step, model, x, target, config=config, step=0, loss=loss)
        for loss in (partial(terms, **bound(target)), own)
    )
    torch.testing.assert_close(tuple(found), tuple(expected))
    torch.testing.assert_close(gradient(found.loss, model), gradient(expected.loss, model))
    assert found.kl > 0


def test_terms_of_ones_own_that_cannot_take_a_part_are_told_that_it_is_the_fraction():
    model, x, y = network(), inputs(), drawn(SIZE, CLASSES)
    weight = torch.rand(SIZE, 1).double()

    def weighted(outputs, target, *, num_passes):
        terms = mse_terms(outputs, target, num_passes=num_passes)
        return terms._replace(nll=terms.nll * weight, kl=terms.kl * weight)

    def summed(outputs, target, *, num_passes):
        terms = mse_terms(outputs, target, num_passes=num_passes)
        return terms._replace(nll=terms.nll.sum(), kl=terms.kl.sum())

    options = {"config": RDropConfig(alpha=1.0, fraction=0.5), "step": 0}
    message = "loss fails for 3 of 6 items, as fraction has it: The size of tensor .* fraction=1.0"
    with pytest.raises(ValueError, match=message):
        rdrop_step(model, x, y, loss=weighted, **options)
    message = r"loss must return one divergence an item .*, got kl of shape \(\) for 3 items"
    with pytest.raises(ValueError, match=message):
        rdrop_step(model, x, y, loss=summed, **options)


def test_terms_of_ones_own_that_lack_memory_say_so():
    model, x, y = network(), inputs(), drawn(SIZE, CLASSES)

    def filling(outputs, target, *, num_passes):
        if len(target) < SIZE:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return mse_terms(outputs, target, num_passes=num_passes)

    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator"):
        rdrop_step(model, x, y, config=RDropConfig(alpha=1.0, fraction=0.5), step=0, loss=filling)


class Loop:
    """A loop that keeps its model, as many trainers do."""

    def __init__(self, model):
        self.model = model

    def run(self, batch):
        return self.model(batch)


def run_model(batch, model):
    return model(batch)


@pytest.mark.parametrize(
    "reach",
    [
        lambda model: model,
        lambda model: lambda batch: model(batch),
        lambda model: lambda batch, inner=model: inner(batch),
        lambda model: partial(run_model, model=model),
        lambda model: Loop(model).run,
    ],
    ids=["module", "closure", "default", "partial", "method"],
)
def test_a_monitored_loop_is_bit_for_bit_the_same_loop(reach):
    """Also the statistics of a BatchNorm are; the divergence is that of two passes."""
    x, y = inputs(), classes()

    def run(monitor_steps, reach):
        model = nn.Sequential(nn.BatchNorm1d(FEATURES), network()).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = RDropConfig(alpha=0.0, num_passes=1, monitor_steps=monitor_steps)
        torch.manual_seed(3)
        outputs = []
        for step in range(4):
            outputs.append(rdrop_step(reach(model), x, y, config=config, step=step))
            optimizer.zero_grad()
            outputs[-1].loss.backward()
            optimizer.step()
        return [*model.parameters(), *model.buffers()], outputs

    (plain, _), (monitored, outputs) = run(None, reach), run(2, reach)
    assert all(map(torch.equal, plain, monitored))
    assert [bool(output.kl > 0) for output in outputs] == [True, False, True, False]


def test_monitoring_reads_several_outputs_too():
    model = two_headed()
    config = RDropConfig(alpha=0.0, num_passes=1, monitor_steps=1)
    options = {"config": config, "step": 0, "loss": sentence_terms}
    assert rdrop_step(model, inputs(), sentences(), **options).kl > 0


# --- accumulation -----------------------------------------------------------------------------


class KeyedNetwork(nn.Module):
    """A network whose mask is that of the item and of the pass, however the batch is cut."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.calls = 0
        self.double()

    def forward(self, batch):
        masks = torch.rand(2, 16, 8, generator=torch.Generator().manual_seed(5)).gt(0.5).double()
        mask = masks[self.calls % 2][batch["id"]]
        self.calls += 1
        return self.outer(torch.tanh(self.inner(batch["x"])) * mask)


@pytest.mark.parametrize("scale", ["mean", "sum"])
@pytest.mark.parametrize("class_weight", [None, (1.0, 5.0, 0.2, 3.0)])
def test_accumulation_of_unequal_micro_batches_is_one_large_batch(scale, class_weight):
    model = KeyedNetwork()
    x, y = inputs(9), torch.tensor([0, -100, 2, 1, 3, -100, -1, 2, 0])
    weight = torch.ones(CLASSES) if class_weight is None else torch.tensor(class_weight)
    config = RDropConfig(
        alpha=2.5,
        scale=scale,
        passes="sequential",
        class_weight=class_weight if class_weight is None else tuple(class_weight),
        unlabelled_index=-1,
    )
    terms = partial(cross_entropy_terms, weight=weight.double(), unlabelled_index=-1)

    def run(ids, **options):
        batch = {"x": x[ids], "id": ids}
        if class_weight is None:
            return rdrop_step(model, batch, y[ids], config=config, step=0, **options)
        own = RDropConfig(alpha=2.5, scale=scale, passes="sequential")
        return rdrop_step(model, batch, y[ids], config=own, step=0, loss=terms, **options)

    whole = run(torch.arange(9))
    totals = {
        "num_items": (y != -100).sum(),
        "num_weight": weight.double()[y[y >= 0]].sum(),
    }
    parts = [run(ids, **totals) for ids in torch.arange(9).split([2, 4, 3])]
    loss = sum(part.loss for part in parts)
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(gradient(loss, model), gradient(whole.loss, model))


# --- terms of one's own -----------------------------------------------------------------------


class TwoHeaded(nn.Module):
    """An intent for a sentence, a slot for each of its three words."""

    def __init__(self, kind, dropout):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(dropout))
        self.intent, self.slots = nn.Linear(8, CLASSES), nn.Linear(8, 3 * 2)
        self.kind = kind
        self.double()

    def forward(self, x):
        hidden = self.body(x)
        return self.kind(intent=self.intent(hidden), slots=self.slots(hidden).view(-1, 3, 2))


class TwoOutputs(NamedTuple):
    intent: torch.Tensor
    slots: torch.Tensor


def two_headed(kind=dict, dropout=0.5):
    torch.manual_seed(2)
    return TwoHeaded(kind, dropout)


def as_tuple(intent, slots):
    return intent, slots


def sentences():
    return {"intent": classes(), "slots": torch.randint(0, 2, (SIZE, 3))}


def sentence_terms(outputs, target, /, *, num_passes):
    """Return one item a sentence; nothing is known of `backward_passes` here."""
    intent, slots = outputs.values() if isinstance(outputs, dict) else outputs
    first = cross_entropy_terms(intent, target["intent"], num_passes=num_passes)
    second = cross_entropy_terms(slots, target["slots"], num_passes=num_passes)
    return ItemTerms(
        first.nll + second.nll.sum(1),
        first.kl + second.kl.sum(1),
        first.nll_count,
        first.kl_count,
    )


def own_loss(model, target, x, alpha):
    """Return the loss of two heads by torch's own functions."""
    outputs = stacked(model, x)
    intent, slots = outputs.values() if isinstance(outputs, dict) else outputs
    nll = F.cross_entropy(intent, target["intent"].repeat(2))
    slots = slots.flatten(0, 1)
    nll = nll + 3 * F.cross_entropy(slots, target["slots"].repeat(2, 1).flatten())
    kl = 0
    for logits, words in ((intent, 1), (slots, 3)):
        p, q = (half.log_softmax(-1) for half in logits.chunk(2))
        kl = kl + words * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    return nll + alpha / 2 * kl


@pytest.mark.parametrize("passes", ["stacked", "sequential"])
@pytest.mark.parametrize("kind", [dict, as_tuple, TwoOutputs])
def test_two_heads_by_terms_of_ones_own(kind, passes):
    model, x, target = two_headed(kind), inputs(), sentences()
    config = RDropConfig(alpha=1.5, passes=passes)
    options = {"config": config, "step": 0, "loss": sentence_terms}
    output = seeded(rdrop_step, model, x, target, **options)
    # Masks are drawn in the order of the rows, whether of one forward or of two.
    expected = seeded(own_loss, model, target, x, 1.5)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradient(output.loss, model), gradient(expected, model))


@pytest.mark.parametrize("num_passes", [2, 3])
@pytest.mark.parametrize("kind", [dict, as_tuple, TwoOutputs])
def test_terms_that_know_nothing_of_backward_passes_have_the_whole_gradient(kind, num_passes):
    model, x, target = two_headed(kind, dropout=0.0), inputs(), sentences()

    def run(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = RDropConfig(num_passes=num_passes, **options)
            output = rdrop_step(model, x, target, config=config, step=0, loss=sentence_terms)
        return output.loss, gradient(output.loss, model)

    torch.testing.assert_close(run(backward_passes=1), run())


def test_the_other_passes_of_own_terms_are_cut():
    """Only pass 0 has a gradient; the divergence draws it to the other, which does not move."""
    shift = torch.zeros(2 * SIZE, CLASSES, dtype=torch.float64, requires_grad=True)
    noise, y = torch.randn(2 * SIZE, CLASSES, dtype=torch.float64), classes()
    calls = []

    def forward(x):
        start = SIZE * len(calls)
        calls.append(None)
        return noise[start : start + SIZE] + shift[start : start + SIZE]

    def terms(logits, target, /, *, num_passes):
        return cross_entropy_terms(logits, target, num_passes=num_passes)

    config = RDropConfig(passes="sequential", backward_passes=1)
    rdrop_step(forward, inputs(), y, config=config, step=0, loss=terms).loss.backward()
    # The pass without a gradient runs first.
    assert (shift.grad[:SIZE] == 0).all()
    assert (shift.grad[SIZE:] != 0).all()


def test_an_adaptive_softmax():
    torch.manual_seed(4)
    body = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5))
    head = nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4, 8])
    x, y = inputs().float(), torch.randint(0, 12, (SIZE,))
    terms = partial(adaptive_softmax_terms, softmax=head)
    output = seeded(rdrop_step, body, x, y, config=RDropConfig(), step=0, loss=terms)
    hidden = seeded(stacked, body, x)
    expected = rdrop_cross_entropy(head.log_prob(hidden), y, alpha=1.0, scale="mean")
    torch.testing.assert_close(output.loss, expected.loss)


# --- warnings ---------------------------------------------------------------------------------


def warnings_of(forward, steps=5, target=None):
    x, y = inputs(), classes() if target is None else target
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            rdrop_step(forward(), x, y, config=RDropConfig(), step=step)
    return [str(w.message) for w in caught if "KL" in str(w.message)]


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_module_without_dropout_is_warned_about_once(is_wrapped):
    model = network(dropout=0.0)
    found = warnings_of(lambda: (lambda batch: model(batch)) if is_wrapped else model)
    assert len(found) == 1
    assert "no active source of dropout" in found[0]
    assert "Raise a dropout rate" in found[0]


def test_a_model_in_evaluation_mode_is_warned_about_once():
    model = network().eval()
    found = warnings_of(lambda: lambda batch: model(batch))
    assert len(found) == 1
    assert "call model.train()" in found[0]


def test_a_function_that_hides_its_model_is_warned_about_once():
    models = {"inner": network(dropout=0.0)}
    found = warnings_of(lambda: lambda batch: models["inner"](batch))
    assert len(found) == 1
    assert "exactly 0" in found[0]


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_first_divergence_of_zero_of_an_adapter_is_none_to_warn_about(is_wrapped):
    """It adds nothing yet, since its last layer is zero."""
    base = network(dropout=0.0)
    adapter = nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, CLASSES)).double()
    nn.init.zeros_(adapter[1].weight)

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.adapter = base, adapter

        def forward(self, x):
            return self.base(x) + self.adapter(x)

    model = Adapted()
    x, y = inputs(), classes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            forward = (lambda batch: model(batch)) if is_wrapped else model
            output = rdrop_step(forward, x, y, config=RDropConfig(), step=step)
            assert (output.kl > 0) == (step > 0)
            output.loss.backward()
            with torch.no_grad():
                adapter[1].weight -= adapter[1].weight.grad


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "loss", "message"),
    [
        (
            {"passes": "sequential", "dropout_rates": (0.1, 0.2)},
            "cross_entropy",
            r"dropout_rates=\(0.1, 0.2\) must hold until the backward",
        ),
        ({"method": "r3f"}, "cross_entropy", "method='r3f' .* needs RDropTrainer"),
        ({"likelihood": "model"}, "cross_entropy", "likelihood='model' is for trainers"),
        ({"class_weight": (1.0,)}, "mse", r"class_weight=\(1.0,\) is an option of loss='cross"),
        ({"unlabelled_index": -1}, "mse", "unlabelled_index=-1 is an option of loss='cross"),
        ({"impl": "eager"}, "mse", "impl='eager' is an option of loss='cross"),
        ({"method": "fraternal"}, sentence_terms, "method='fraternal' is an option of loss='cross"),
        ({}, "focal", "loss must be 'cross_entropy', .* or a function of terms, got 'focal'"),
        ({}, None, "loss must be 'cross_entropy', .* or a function of terms, got None"),
    ],
)
def test_what_a_loop_of_ones_own_cannot_do_is_refused_by_name(config, loss, message):
    with pytest.raises(ValueError, match=message):
        rdrop_step(network(), inputs(), classes(), config=RDropConfig(**config), step=0, loss=loss)


def test_a_part_of_rows_that_are_no_items_is_refused():
    model = network()
    config = RDropConfig(fraction=0.5)
    with pytest.raises(ValueError, match=r"fraction=0.5 needs one row an item, got 6 rows for 12"):
        rdrop_step(
            lambda x: model(x).repeat_interleave(2, 0), inputs(), classes(12), config=config, step=0
        )
    options = {"config": config, "step": 0, "loss": sentence_terms}
    with pytest.raises(ValueError, match=r"fraction=0.5 needs a target that is one tensor"):
        rdrop_step(two_headed(), inputs(), sentences(), **options)


def test_a_config_of_another_type_is_refused():
    with pytest.raises(TypeError, match="config must be an RDropConfig, got dict"):
        rdrop_step(network(), inputs(), classes(), config={"alpha": 1}, step=0)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        rdrop_step(network(), inputs(), classes(), config=RDropConfig(), step=-1)


# --- faults that a reader found ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_items": -3}, ValueError, "num_items must be finite and above 0, got -3"),
        ({"num_items": True}, TypeError, "num_items must be a number, got bool"),
        ({"num_items": torch.tensor([3, 4])}, ValueError, "num_items must be a scalar"),
        ({"num_weight": 0}, ValueError, "num_weight must be finite and above 0, got 0"),
        ({"step": 0.5}, TypeError, "step must be an integer, got float"),
        ({"total_steps": "9"}, TypeError, "total_steps must be an integer, got str"),
        ({"alpha": "1"}, TypeError, "alpha must be a number, got str"),
        ({"alpha": "auto"}, TypeError, "got 'auto', which RDropConfig takes, for rdrop_step"),
        ({"alpha": True}, TypeError, "alpha must be a number, got bool"),
        ({"alpha": -1.0}, ValueError, "alpha must be finite and at least 0, got -1.0"),
        (
            {"alpha": 3.0, "config": RDropConfig(num_passes=1, alpha=0)},
            ValueError,
            r"alpha=3\.0 needs a config with num_passes of at least 2 .*, got num_passes=1",
        ),
    ],
)
def test_counts_and_steps_that_cannot_be_are_refused(options, error, message):
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    with pytest.raises(error, match=message):
        rdrop_step(model, x, y, **{"config": RDropConfig(), "step": 0, **options})


@dataclass
class NestedOutput:
    logits: torch.Tensor


def test_an_alpha_of_0_is_that_of_one_pass():
    model, x, y = network(), inputs(), classes()
    config = RDropConfig(num_passes=1, alpha=0.0)
    found = seeded(rdrop_step, model, x, y, config=config, step=0, alpha=0.0)
    torch.testing.assert_close(found.loss, F.cross_entropy(seeded(model, x), y))


def test_an_output_that_is_no_tensor_is_refused_with_the_way_out():
    layer, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    for kind, place in (
        (lambda logits: {"n": 1, "out": logits}, r"\['out'\]"),
        (lambda logits: (logits, logits), r"\[0\]"),
        (lambda logits: NestedOutput(logits), r"\.logits"),
    ):
        message = (
            rf"forward=lambda batch: model\(batch\){place} \(of .* model\(\*\*batch\)\.logits\), "
            r"or as loss a function of terms, .* \(docs/recipes\.md, two heads\)"
        )
        with pytest.raises(TypeError, match=message):
            rdrop_step(lambda x, kind=kind: kind(layer(x)), x, y, config=RDropConfig(), step=0)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", cross_entropy_terms])
@pytest.mark.parametrize("num_passes", [1, 2])
def test_a_model_that_returns_its_loss_is_told_so(num_passes, loss):
    layer, config = nn.Linear(4, 3), RDropConfig(alpha=num_passes - 1.0, num_passes=num_passes)
    with pytest.raises(
        ValueError, match=r"forward must return logits, .* got one number, as a .*squeeze"
    ):
        rdrop_step(
            lambda x: layer(x).mean(),
            torch.ones(6, 4),
            torch.ones(6),
            config=config,
            step=0,
            loss=loss,
        )


@pytest.mark.filterwarnings("ignore:R-Drop has nothing to compare")
@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_part_of_the_batch_beside_several_outputs(kind):
    """A part that is all of it is the whole; the parts' mean gradient is tested for one output."""
    layer, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.randint(3, (6,))

    def terms(outputs, target, *, num_passes):
        first, second = outputs.values() if kind is dict else outputs
        one = cross_entropy_terms(first, target, num_passes=num_passes)
        other = cross_entropy_terms(second, target, num_passes=num_passes)
        return one._replace(nll=one.nll + other.nll, kl=one.kl + other.kl)

    def forward(x):
        both = {"a": layer(x), "b": -layer(x)}
        return both if kind is dict else tuple(both.values())

    def loss(fraction):
        config = RDropConfig(alpha=1.0, fraction=fraction)
        return rdrop_step(forward, x, y, config=config, step=0, loss=terms).loss

    torch.testing.assert_close(loss(0.5), loss(1.0))  # without dropout the KL is 0 in any part


def test_a_model_in_a_list_or_behind_attributes_is_found_and_kept():
    norm = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    nets = [norm]

    class Holder:
        pass

    holder = Holder()
    holder.inner = Holder()
    holder.inner.net = norm
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    config = RDropConfig(alpha=0.0, num_passes=1, monitor_steps=1)
    for forward in (lambda b: nets[0](b), lambda b: holder.inner.net(b)):
        before = norm[0].num_batches_tracked.item()
        assert rdrop_step(forward, x, y, config=config, step=0).kl > 0
        assert norm[0].num_batches_tracked.item() == before + 1
    with pytest.raises(ValueError, match="monitor_steps needs the model"):
        rdrop_step(torch.neg, torch.randn(6, 3), y, config=config, step=0)


def test_callables_of_any_kind_and_batches_in_which_nothing_counts_are_watched_quietly():
    layer = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))

    @dataclass
    class Forward:
        net: nn.Module

        def __call__(self, x):
            return self.net(x)

    class Slotted:
        __slots__ = ("net",)

        def __init__(self, net):
            self.net = net

        def __call__(self, x):
            return self.net(x)

    x = torch.randn(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for forward in (Forward(layer), Slotted(layer), torch.nn.functional.relu):
            inputs = x if forward is not torch.nn.functional.relu else torch.randn(6, 3)
            ignored = torch.full((6,), -100)
            for step in range(3):
                rdrop_step(forward, inputs, ignored, config=RDropConfig(), step=step)


# --- what a step costs -------------------------------------------------------------------------


@pytest.mark.parametrize("num_items", [None, 11])
def test_the_softmax_of_large_logits_is_computed_once(num_items):
    with torch.profiler.profile() as profiler:
        x, y = torch.randn(64, FEATURES).double(), torch.randint(0, 5000, (64,))
        model, config = network(classes=5000), RDropConfig(alpha=1.0)
        loss = rdrop_step(model, x, y, config=config, step=0, num_items=num_items).loss
        loss.backward()
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["aten::_log_softmax"] == len(row_blocks(torch.empty(2, 64, 5000))) == 2


def test_what_is_bound_to_terms_gives_way_to_the_step():
    model, x, y = network(), inputs(), classes()
    bound = partial(cross_entropy_terms, num_passes=3, backward_passes=1, label_smoothing=0.1)
    plain = partial(cross_entropy_terms, label_smoothing=0.1)
    found, expected = (
        seeded(rdrop_step, model, x, y, config=RDropConfig(alpha=1.0), step=0, loss=loss)
        for loss in (bound, plain)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_passes", [1, 2])
def test_labels_of_one_logit_are_sent_to_the_binary_loss(num_passes):
    model, x, labels = network(classes=1), inputs(), torch.randint(0, 2, (SIZE, 1)).double()
    config = RDropConfig(alpha=1.0) if num_passes == 2 else RDropConfig(num_passes=1, alpha=0.0)
    with pytest.raises(ValueError, match="of rdrop_step loss='binary_cross_entropy'"):
        rdrop_step(model, x, labels, config=config, step=0)
    found = rdrop_step(model, x, labels, config=config, step=0, loss="binary_cross_entropy")
    assert found.loss > 0


def test_contrastive_scores_of_one_pair_are_computed():
    encoder = network()
    config = RDropConfig(alpha=1.0, passes="sequential")
    found = rdrop_step(
        lambda x: encoder(x) @ encoder(x).T, inputs(1), torch.zeros(1).long(), config=config, step=0
    )
    assert found.loss == found.kl == 0


def test_a_second_gradient_needs_the_eager_form_of_the_config():
    model, x, y = network(), inputs(), classes()

    def penalty(impl):
        loss = rdrop_step(model, x, y, config=RDropConfig(alpha=1.0, impl=impl), step=0).loss
        (gradient,) = torch.autograd.grad(loss, model[0].weight, create_graph=True)
        return gradient.square().sum()

    with pytest.raises(RuntimeError, match=r"RDropConfig\(impl='eager'\)"):
        penalty("auto").backward()
    penalty("eager").backward()
    assert model[0].weight.grad.abs().sum() > 0
