import builtins
import copy
import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from processes import run_in_two_processes
from regdrop import RDropConfig, rdrop_cross_entropy, rdrop_step, repeat_batch, share_prefix
from regdrop.loss import cross_entropy_terms
from regdrop.passes import run_passes, why_not_shared
from regdrop.schedule import plan_step
from steps import compute_step_loss

SIZE, CLASSES = 6, 3


class Classifier(nn.Module):
    """A convolutional trunk with frozen BatchNorm and a head with dropout."""

    def __init__(self, trunk=None):
        super().__init__()
        self.features = trunk or nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(16, CLASSES))

    def train(self, mode=True):
        super().train(mode)
        for module in self.features.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x):
        return self.head(self.features(x))


def build(trunk=None):
    torch.manual_seed(3)
    model = Classifier(trunk).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def batch(size=SIZE):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 2, 4, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def note_rows(module):
    """Note the rows of every call of a module from the inside."""
    rows = []
    module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


def result(model, run):
    """Return the outputs of a run from one random state and every gradient."""
    model.zero_grad()
    torch.manual_seed(7)
    outputs = run(model)
    weight = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    (outputs * weight).square().sum().backward()
    return [outputs.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_all_close(found, expected, tolerance=1e-12):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- equality with the plain stacked run -----------------------------------------------------


@pytest.mark.parametrize("num_passes", [2, 3])
def test_a_loop_of_ones_own_gets_the_same_outputs_and_gradients(num_passes):
    model, (x, _) = build(), batch()

    def run(model):
        return model(repeat_batch(x, num_passes))

    expected = result(model, run)
    handle = share_prefix(model, until="features", num_passes=num_passes)
    assert_all_close(result(model, run), expected)  # checked, and leaving the random state alone
    rows = note_rows(model.features[0])
    assert_all_close(result(model, run), expected)
    assert rows == [SIZE]
    handle.remove()
    assert_all_close(result(model, run), expected)
    assert rows == [SIZE, num_passes * SIZE]


def test_the_loss_of_a_whole_step_and_its_upstream_gradient():
    model, (x, y) = build(), batch()

    def gradients(model):
        model.zero_grad()
        torch.manual_seed(2)
        loss = rdrop_cross_entropy(model(repeat_batch(x)), y, alpha=2.0).loss
        (3 * loss).backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    expected = gradients(model)
    with share_prefix(model, "features", num_passes=2):
        assert_all_close(gradients(model), expected)


@pytest.mark.parametrize("items", [None, [4, 1], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("backward_passes", [None, 1, 2])
@pytest.mark.parametrize("strategy", ["stacked", "sequential"])
@pytest.mark.parametrize("num_passes", [1, 2, 3])
def test_every_way_to_run_passes_gives_the_same(num_passes, strategy, backward_passes, items):
    if backward_passes is not None and backward_passes > num_passes:
        backward_passes = num_passes
    model, (x, _) = build(), batch()
    options = {"num_passes": num_passes, "strategy": strategy, "backward_passes": backward_passes}

    def run(model):
        index = None if items is None else torch.tensor(items)
        return run_passes(model, x, items=index, **options)

    expected = result(model, run)
    with share_prefix(model, "features", check_every=1):
        assert_all_close(result(model, run), expected)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"num_passes": 2}, [SIZE]),
        ({"num_passes": 3}, [SIZE]),
        ({"num_passes": 3, "items": torch.tensor([5, 2])}, [SIZE]),
        ({"num_passes": 3, "backward_passes": 1}, [SIZE, SIZE]),
        ({"num_passes": 3, "backward_passes": 1, "items": torch.tensor([5, 2])}, [2, SIZE]),
        ({"num_passes": 2, "backward_passes": 1}, [SIZE, SIZE]),
        ({"num_passes": 2, "strategy": "sequential"}, [SIZE, SIZE]),
    ],
)
def test_rows_that_the_part_computes(options, rows):
    model, (x, _) = build(), batch()
    share_prefix(model, "features")
    run_passes(model, x, **options)  # the first forward is checked, which computes all rows too
    found = note_rows(model.features[0])
    run_passes(model, x, **options)
    assert found == rows


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_steps_of_a_config_are_the_same_and_those_of_one_pass_untouched(fraction, every_n_steps):
    config = RDropConfig(alpha=2.0, fraction=fraction, every_n_steps=every_n_steps)
    x, y = batch()

    def train(model):
        torch.manual_seed(4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(4):
            plan = plan_step(config, step)
            loss = compute_step_loss(model, x, y, cross_entropy_terms, config, plan).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    expected, model = train(build()), build()
    rows = note_rows(model.features[0])
    share_prefix(model, "features", check_every=None)
    assert_all_close(train(model), expected)
    checked = 2 * SIZE if fraction == 1 else SIZE + SIZE // 2
    assert rows == [checked, SIZE, SIZE, SIZE, SIZE]


def test_what_runs_before_the_part_runs_stacked_and_gets_its_gradient():
    model, (x, _) = build(), batch()

    def run(model):
        return model(repeat_batch(x))

    expected = result(model, run)
    share_prefix(model, "features.1", num_passes=2)
    first = note_rows(model.features[0])
    assert_all_close(result(model, run), expected)
    assert first == [2 * SIZE]


def test_a_frozen_part_and_one_without_gradient():
    model, (x, _) = build(), batch()
    model.features.requires_grad_(False)

    def run(model):
        return model(repeat_batch(x))

    expected = result(model, run)
    share_prefix(model, "features", num_passes=2)
    assert_all_close(result(model, run), expected)
    with torch.no_grad():
        torch.manual_seed(7)
        torch.testing.assert_close(run(model), expected[0])


class Nested(nn.Module):
    """A part with inputs by name, and outputs in a structure of a kind."""

    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Linear(4, 4), wrap

    def forward(self, x, *, scale=None, table=None):
        hidden = self.layer(x) * scale[:, None] + table.sum()
        return self.wrap(hidden, hidden.tanh(), table)


@dataclass
class Output:
    hidden: torch.Tensor
    other: torch.Tensor
    table: torch.Tensor


class Reader(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part, self.dropout, self.seen = part, nn.Dropout(0.5), None

    def forward(self, x):
        table = torch.ones(1, 3, dtype=x.dtype)
        self.seen = self.part(x, scale=x[:, 0], table=table)
        tensors = [t for t in leaves(self.seen) if t.shape[0] == len(x)]
        return self.dropout(torch.cat(tensors, dim=1))


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, (tuple, list)):
        value = list((value if isinstance(value, dict) else vars(value)).values())
    return [leaf for child in value for leaf in leaves(child)]


def model_output(hidden, other, table):
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden, other))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda hidden, other, table: hidden,
        lambda hidden, other, table: (hidden, (other, table)),
        lambda hidden, other, table: [hidden, other],
        lambda hidden, other, table: {"hidden": hidden, "others": [other], "table": table},
        Output,
        model_output,
    ],
    ids=["tensor", "tuple", "list", "dict", "dataclass", "ModelOutput"],
)
def test_inputs_and_outputs_of_every_structure(wrap):
    model = Reader(Nested(wrap)).double().train()
    x = torch.randn(5, 4, dtype=torch.float64)

    def run(model):
        return model(repeat_batch(x))

    expected = result(model, run)
    plain = model.seen
    share_prefix(model, "part", num_passes=2)
    assert_all_close(result(model, run), expected)
    assert type(model.seen) is type(plain)
    assert_all_close([t.detach() for t in leaves(model.seen)], [t.detach() for t in leaves(plain)])


def test_items_with_several_rows_each():
    class Choices(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.dropout = nn.Linear(4, 3), nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(self.part(x.flatten(0, 1))).view(len(x), -1)

    model, x = Choices().double().train(), torch.randn(5, 2, 4, dtype=torch.float64)
    for items in (None, torch.tensor([3, 0])):

        def run(model, items=items):
            return run_passes(model, x, num_passes=2, items=items)

        expected = result(model, run)
        with share_prefix(model, "part"):
            assert_all_close(result(model, run), expected)


class Checkpointed(Classifier):
    """Recomputes the trunk in the backward."""

    def __init__(self, use_reentrant):
        # Without BatchNorm, whose frozen statistics are no matter here.
        super().__init__(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten()))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = x.requires_grad_()  # reentrant checkpointing needs it
        return self.head(checkpoint(self.features, x, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_gradient_checkpointing_of_ones_own_recomputes_what_the_forward_did(
    use_reentrant, fraction
):
    torch.manual_seed(3)
    model, (x, y) = Checkpointed(use_reentrant).double().train(), batch()
    config = RDropConfig(fraction=fraction, every_n_steps=2)

    def gradients():
        model.zero_grad()
        torch.manual_seed(2)
        for step in range(3):
            rdrop_step(model, x, y, config=config, step=step).loss.backward()
        return [p.grad for p in model.parameters()]

    expected = gradients()
    with share_prefix(model, "features"):
        assert_all_close(gradients(), expected)


def test_several_forwards_before_the_backward_that_recomputes():
    torch.manual_seed(3)
    model, (x, y) = Checkpointed(use_reentrant=False).double().train(), batch()

    def gradients(config):
        model.zero_grad()
        torch.manual_seed(2)
        steps = [rdrop_step(model, x, y, config=config, step=0).loss for _ in range(2)]
        sum(steps).backward()
        return [p.grad for p in model.parameters()]

    expected = gradients(RDropConfig())
    with share_prefix(model, "features"):
        assert_all_close(gradients(RDropConfig()), expected)
        with pytest.raises(ValueError, match="the passes enter it with different values"):
            gradients(RDropConfig(fraction=0.5))  # each with other items


# --- where it does not act -------------------------------------------------------------------


def test_evaluation_is_untouched_and_the_handles_number_of_passes_decides():
    model, (x, _) = build(), batch()
    rows = note_rows(model.features[0])
    handle = share_prefix(model, "features", num_passes=2, check_every=None)
    model.eval()
    expected = model.head(model.features(x))
    assert torch.equal(model(x), expected)
    model.train()
    handle.num_passes = 1
    model(x)
    assert set(rows) == {SIZE}
    handle.num_passes = 2
    model(repeat_batch(x))
    assert rows[-2:] == [2 * SIZE, SIZE]
    model(repeat_batch(x))
    assert rows[-1] == SIZE


def test_a_context_manager_ends_the_sharing_also_after_an_error():
    model, (x, _) = build(), batch()
    rows = note_rows(model.features[0])

    def stop():
        with share_prefix(model, "features", num_passes=2):
            model(repeat_batch(x))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    model(repeat_batch(x))
    assert rows == [2 * SIZE, SIZE, 2 * SIZE]


def test_hooks_of_the_part_see_what_they_see_without_sharing():
    model, (x, _) = build(), batch()
    seen = []

    def note(module, args, output):
        seen.append(len(output))

    model.features.register_forward_hook(note)
    share_prefix(model, "features", num_passes=2)
    model.features.register_forward_hook(note)
    model(repeat_batch(x))
    assert set(seen) == {2 * SIZE}


def test_pre_hooks_of_the_part_see_all_rows_if_they_were_there_before():
    model, (x, _) = build(), batch()
    early = note_rows(model.features)
    share_prefix(model, "features", num_passes=2)
    late = note_rows(model.features)
    model(repeat_batch(x))
    assert (early, late) == ([2 * SIZE], [SIZE])


def test_a_hook_that_changes_the_output_is_no_difference():
    model, (x, _) = build(), batch()
    model.features.register_forward_hook(lambda module, args, output: 2 * output)
    expected = result(model, lambda model: model(repeat_batch(x)))
    share_prefix(model, "features", num_passes=2)
    model.features.register_forward_hook(lambda module, args, output: output + 0)
    assert_all_close(result(model, lambda model: model(repeat_batch(x))), expected)


COPIES = [
    copy.deepcopy,
    lambda model: pickle.loads(pickle.dumps(model)),
    lambda model: AveragedModel(model).module,
]


@pytest.mark.parametrize("make_copy", COPIES)
def test_copies_of_the_model_run_plainly(make_copy):
    model, (x, _) = build(), batch()
    handle = share_prefix(model, "features", num_passes=2)
    expected = result(model, lambda model: model(repeat_batch(x)))
    other = make_copy(model)
    rows = note_rows(other.features[0])
    assert_all_close(result(other, lambda model: model(repeat_batch(x))), expected)
    other(x)  # one pass, in training mode
    with share_prefix(other, "features", num_passes=2):
        assert_all_close(result(other, lambda model: model(repeat_batch(x))), expected)
    # The copy's own sharing looks once at what a plain run gives.
    assert rows == [2 * SIZE, SIZE, 2 * SIZE, SIZE]
    rows = note_rows(model.features[0])
    model(repeat_batch(x))
    handle.remove()
    model(repeat_batch(x))
    assert rows == [SIZE, 2 * SIZE]


def test_batchnorm_of_an_average_of_weights_can_be_updated():
    layers = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, CLASSES)
    model, x = nn.Sequential(*layers), torch.randn(SIZE, 5)
    share_prefix(model, "0", num_passes=2)
    average = AveragedModel(model)
    update_bn([x], average)
    torch.testing.assert_close(average.module[1].running_mean, average.module[0](x).mean(0))


# --- refusals --------------------------------------------------------------------------------


class SparseMoeBlock(nn.Linear):
    pass


def with_config(module):
    module.config = SimpleNamespace(router_aux_loss_coef=0.01)
    return module


def checkpointed(module):
    module.gradient_checkpointing = True
    return module


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (nn.Sequential(nn.Dropout(0.1)), r"part\.0 is an active source of dropout"),
        (nn.Dropout(0.1), r"part is an active source of dropout"),
        (nn.MultiheadAttention(4, 2, dropout=0.1), r"part.dropout is an active source"),
        (nn.Sequential(nn.BatchNorm1d(4)), r"part\.0 is a BatchNorm in training mode"),
        (nn.Sequential(SparseMoeBlock(4, 4)), r"part\.0 \(SparseMoeBlock\) is a mixture"),
        (with_config(nn.Linear(4, 4)), "router_aux_loss_coef"),
        (nn.Sequential(checkpointed(nn.Linear(4, 4))), r"part\.0 uses gradient checkpointing"),
    ],
)
def test_parts_that_are_refused_leave_no_hook(part, reason):
    model = nn.ModuleDict({"part": part}).train()
    with pytest.raises(ValueError, match=rf"until='part' cannot be shared: .*{reason}"):
        share_prefix(model, "part")
    assert not part._forward_hooks
    assert not part._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "is_mixture"),
    [
        ("MoELayer", True),
        ("OlmoeSparseMoeBlock", True),
        ("moe_block", True),
        ("Top2Router", True),
        ("LocalExperts", True),
        ("ThermoEncoder", False),
        ("Thermoelement", False),
        ("MoEncoder", False),
    ],
)
def test_a_mixture_is_known_by_a_word_of_its_name(name, is_mixture):
    part = type(name, (nn.Linear,), {})(4, 4)
    reason = why_not_shared(nn.ModuleDict({"part": part}), "part")
    assert (reason is not None) is is_mixture


def test_checkpointing_around_the_part_is_refused_and_beside_it_is_not():
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(2, 2)), "b": checkpointed(nn.Sequential(nn.Linear(2, 2)))}
    )
    share_prefix(model, "a.0").remove()
    with pytest.raises(ValueError, match="b uses gradient checkpointing"):
        share_prefix(model, "b.0")


def switch_on_dropout(model):
    model.features[4].p = 0.2


def switch_on_norm(model):
    model.features[1].train()


def switch_on_checkpointing(model):
    model.features[0].gradient_checkpointing = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (switch_on_dropout, r"features\.4 is an active source of dropout"),
        (switch_on_norm, r"features\.1 is a BatchNorm in training mode"),
        (switch_on_checkpointing, r"features\.0 uses gradient checkpointing"),
    ],
)
def test_what_is_switched_on_later_is_refused_in_the_next_forward(change, reason):
    model, (x, _) = build(), batch()
    model.features.append(nn.Dropout(0.0))
    checkpointed(model.features[0]).gradient_checkpointing = False
    share_prefix(model, "features", num_passes=2)
    model(repeat_batch(x))
    change(model)
    with pytest.raises(ValueError, match=reason):
        model(repeat_batch(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"until": "nowhere"}, ValueError, "until must name a submodule of Classifier"),
        ({"until": ""}, ValueError, "until must name a submodule"),
        ({"until": 3}, TypeError, "until must be the name of a submodule, got int"),
        ({"num_passes": 0}, ValueError, "num_passes must be None or at least 1, got 0"),
        ({"num_passes": 2.0}, TypeError, "num_passes must be an integer or None, got float"),
        ({"check_every": -1}, ValueError, "check_every must be None or at least 0, got -1"),
        ({"model": 3}, TypeError, r"model must be a torch\.nn\.Module, got int"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        share_prefix(**{"model": build(), "until": "features", **arguments})


# --- what the check catches ------------------------------------------------------------------


class Noisy(nn.Module):
    """Noise that find_dropout does not know, in all rows or in the last."""

    def __init__(self, strength=0.1, is_on=True):
        super().__init__()
        self.strength, self.is_on = strength, is_on

    def forward(self, x):
        return x + self.strength * torch.randn_like(x) if self.is_on else x


class Mixing(nn.Module):
    """Rows that depend on how many there are."""

    def forward(self, x):
        return x / len(x)


class Summary(nn.Module):
    """An output without a batch dimension that depends on the batch."""

    def forward(self, x):
        return x.sum(0, keepdim=True)


@pytest.mark.parametrize("part", [Noisy(), Noisy(1e-6), Mixing(), Summary()])
def test_a_part_that_gives_something_else_is_caught_in_the_first_forward(part):
    model = nn.Sequential(part, nn.Dropout(0.5)).train()
    share_prefix(model, "0", num_passes=2)
    x = torch.randn(SIZE, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"until='0'.*gives something else.*Dropout or other"):
        model(repeat_batch(x))


@pytest.mark.parametrize(("check_every", "found_at"), [(2, 2), (3, 3), (None, None), (0, None)])
def test_later_checks_come_as_often_as_asked(check_every, found_at):
    model = nn.Sequential(Noisy(is_on=False), nn.Dropout(0.5)).train()
    share_prefix(model, "0", num_passes=2, check_every=check_every)
    x = repeat_batch(torch.randn(SIZE, 3))
    for call in range(5):
        model[0].is_on = call > 0
        if call == found_at:
            with pytest.raises(ValueError, match="gives something else"):
                model(x)
            break
        model(x)


@pytest.mark.parametrize(
    "x",
    [torch.arange(8.0).view(8, 1), torch.arange(4).repeat_interleave(2), torch.randn(8, 3)],
    ids=["one pass", "interleaved", "other"],
)
def test_rows_that_are_no_stacked_batch_are_refused_in_every_forward(x):
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.5)).train()
    share_prefix(model, "0", num_passes=2, check_every=None)
    model(repeat_batch(torch.ones(4, 1)))
    with pytest.raises(ValueError, match=r"enter it with different values.*repeat_batch"):
        model(x.float())


def test_dropout_before_the_part_is_caught():
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 8), nn.Dropout(0.1)).train()
    share_prefix(model, "1")
    with pytest.raises(ValueError, match=r"different values.*dropout acts before it"):
        run_passes(model, torch.randn(SIZE, 8), num_passes=2)


@pytest.mark.parametrize("rows", [0, 5])
def test_rows_that_do_not_divide(rows):
    model, (x, _) = build(), batch()
    share_prefix(model, "features", num_passes=2)
    message = f"has {rows} rows, which must be a positive multiple of 2, num_passes"
    with pytest.raises(ValueError, match=message):
        model(x[:rows])


def test_an_input_without_batch_dimension_is_shared_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Nested(lambda hidden, other, table: hidden)

        def forward(self, x):
            # As long as the stacked batch by chance.
            return self.part(x, scale=x[:, 0], table=torch.arange(8.0)[:, None])

    model, x = Model().train(), repeat_batch(torch.randn(4, 4))
    expected = model(x)
    with (
        share_prefix(model, "part", num_passes=2),
        pytest.raises(ValueError, match="name it in shared"),
    ):
        model(x)
    with share_prefix(model, "part", num_passes=2, shared="table"):
        torch.testing.assert_close(model(x), expected)


def test_a_part_that_changes_its_input_in_place_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Dropout(0.5)).train()
    share_prefix(model, "1", num_passes=2)
    with pytest.raises(ValueError, match="changes its input in place"):
        model(repeat_batch(torch.randn(4, 2)))


def test_a_check_leaves_buffers_and_random_states_alone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            torch.rand(3)
            return x

    model = nn.Sequential(Counting(), nn.Dropout(0.5)).train()
    x = repeat_batch(torch.ones(4, 50))
    torch.manual_seed(1)
    expected = model(x)
    share_prefix(model, "0", num_passes=2)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)
    assert model[0].calls == 2


def test_values_that_are_not_finite_are_not_taken_for_a_difference():
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.5)).train()
    share_prefix(model, "0", num_passes=2)
    x = torch.tensor([[1.0, torch.nan, torch.inf], [-torch.inf, 2.0, 3.0]])
    model(repeat_batch(x))
    with pytest.raises(ValueError, match="different values"):
        model(torch.cat([x, x.nan_to_num()]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_its_gradients_and_rounding_is_no_difference(dtype):
    torch.manual_seed(0)
    trunk = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)])
    model = nn.Sequential(trunk, nn.Dropout(0.3), nn.Linear(64, 3)).train()
    x = torch.randn(33, 64)

    def run(model):
        with torch.autocast("cpu", dtype):
            return model(repeat_batch(x)).float()

    expected = result(model, run)
    share_prefix(model, "0", num_passes=2, check_every=1)
    found = result(model, run)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.slow
def test_a_compiled_model_shares_and_stays_right(monkeypatch):
    # `exec` leaves this behind in the namespace that it runs in.
    monkeypatch.setitem(vars(builtins), "__builtins__", vars(builtins))
    model, (x, _) = build(), batch()
    expected = result(model, lambda model: run_passes(model, x, num_passes=2))
    share_prefix(model, "features")
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        assert_all_close(
            result(model, lambda model: run_passes(compiled, x, num_passes=2))[1:], expected[1:]
        )
    compiled.eval()
    assert_all_close([compiled(x)], [model.head(model.features(x))])


def test_a_forward_without_a_graph_inside_a_backward_is_no_recomputation():
    model, (x, _) = build(), batch()
    share_prefix(model, "features")
    seen = []

    def look(grad):
        with torch.no_grad():
            seen.append(model(x[:5]).shape)

    output = run_passes(model, x, num_passes=2)
    output.register_hook(look)
    output.sum().backward()
    assert seen == [(5, CLASSES)]


# --- several processes -----------------------------------------------------------------------


def gradients_of_rank(rank, folder, shares):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model, (x, _) = build(), batch(8)
    if shares:
        share_prefix(model, "features", check_every=2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for step in range(3):
        model.zero_grad()
        torch.manual_seed(10 * rank + step)
        run_passes(wrapped, x[4 * rank : 4 * rank + 4], num_passes=2).square().sum().backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], folder / f"{shares}.pt")


def test_an_empty_batch_has_nothing_to_share():
    """One process of several may have it, and the others wait for that one."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)).train()
    batch, target = torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)
    with share_prefix(model, "0"):
        loss = rdrop_step(model, batch, target, config=RDropConfig(alpha=1.0), step=0).loss
    loss.backward()
    assert loss == 0


@pytest.mark.slow
def test_two_processes_get_the_gradients_of_the_plain_run(tmp_path):
    for shares in (True, False):
        run_in_two_processes(gradients_of_rank, tmp_path, shares)
    found, expected = (torch.load(tmp_path / f"{shares}.pt") for shares in (True, False))
    assert_all_close(found, expected)
