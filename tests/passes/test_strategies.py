import pytest
import torch
from torch import nn

from regdrop.passes import run_passes
from regdrop.passes.strategies import stacked_rows

STRATEGIES = ["stacked", "sequential"]
SIZE = 3


def make():
    return {"x": torch.randn(SIZE, 2, dtype=torch.float64)}


class Recorder:
    """A linear model that notes what each of its forwards saw."""

    def __init__(self):
        self.layer = nn.Linear(2, 4, dtype=torch.float64)
        self.calls = []
        self.has_graph = []

    def __call__(self, batch):
        output = self.layer(batch["x"])
        self.calls.append((len(batch["x"]), torch.is_grad_enabled()))
        self.has_graph.append(output.grad_fn is not None)
        return output

    def gradient(self, output):
        loss = output.square().sum()
        return torch.autograd.grad(loss, self.layer.weight, retain_graph=True)[0]


@pytest.mark.parametrize("num_passes", [1, 2, 3])
@pytest.mark.parametrize("backward_passes", [None, 1])
@pytest.mark.parametrize("items", [None, [2, 0]])
def test_strategies_agree_where_nothing_is_random(num_passes, backward_passes, items):
    batch, forward = make(), Recorder()
    index = None if items is None else torch.tensor(items)
    options = {"num_passes": num_passes, "backward_passes": backward_passes, "items": index}
    stacked, sequential = (run_passes(forward, batch, strategy=s, **options) for s in STRATEGIES)
    torch.testing.assert_close(stacked, sequential)
    torch.testing.assert_close(forward.gradient(stacked), forward.gradient(sequential))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_passes", [1, 2, 3])
def test_outputs_are_those_of_the_model_pass_after_pass(strategy, num_passes):
    batch, forward = make(), Recorder()
    outputs = run_passes(forward, batch, num_passes=num_passes, strategy=strategy)
    torch.testing.assert_close(outputs, forward.layer(batch["x"]).repeat(num_passes, 1))


@pytest.mark.parametrize(
    ("strategy", "num_passes", "backward_passes", "calls"),
    [
        ("stacked", 1, None, [(3, True)]),
        ("stacked", 2, None, [(6, True)]),
        ("stacked", 2, 2, [(6, True)]),
        ("stacked", 2, 1, [(3, False), (3, True)]),
        ("stacked", 3, 1, [(6, False), (3, True)]),
        ("stacked", 3, 2, [(3, False), (6, True)]),
        ("sequential", 2, None, [(3, True), (3, True)]),
        ("sequential", 2, 1, [(3, False), (3, True)]),
        ("sequential", 3, 1, [(3, False), (3, False), (3, True)]),
        ("sequential", 3, 2, [(3, False), (3, True), (3, True)]),
    ],
)
def test_forwards_their_rows_and_their_grad_mode(strategy, num_passes, backward_passes, calls):
    forward = Recorder()
    run_passes(
        forward,
        make(),
        num_passes=num_passes,
        strategy=strategy,
        backward_passes=backward_passes,
    )
    assert forward.calls == calls
    assert forward.has_graph == [graded for _, graded in calls]
    assert torch.is_grad_enabled()


def test_stacked_is_the_default():
    forward = Recorder()
    run_passes(forward, make(), num_passes=4)
    assert forward.calls == [(4 * SIZE, True)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backward_passes", [1, 2])
def test_passes_without_gradient_give_none(strategy, backward_passes):
    forward = Recorder()
    batch = make()
    outputs = run_passes(
        forward, batch, num_passes=3, strategy=strategy, backward_passes=backward_passes
    )
    assert forward.gradient(outputs[backward_passes * SIZE :]).abs().max() == 0
    graded = forward.layer(batch["x"]).repeat(backward_passes, 1)
    torch.testing.assert_close(forward.gradient(outputs), forward.gradient(graded))


@pytest.mark.parametrize("backward_passes", [1, 2])
def test_passes_without_gradient_have_no_part_in_the_backward(backward_passes):
    class Counted(torch.autograd.Function):
        rows = 0

        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            Counted.rows += len(grad)
            return grad * 2

    x = torch.randn(SIZE, 2, requires_grad=True)
    Counted.rows = 0
    run_passes(Counted.apply, x, num_passes=3, backward_passes=backward_passes).sum().backward()
    assert Counted.rows == backward_passes * SIZE


@pytest.mark.parametrize(
    ("backward_passes", "order"), [(None, [0, 1, 2]), (1, [2, 0, 1]), (2, [1, 2, 0])]
)
def test_passes_with_gradient_run_last_and_stand_first(backward_passes, order):
    calls = iter(range(3))
    outputs = run_passes(
        lambda x: x * 0 + next(calls),
        torch.ones(SIZE),
        num_passes=3,
        strategy="sequential",
        backward_passes=backward_passes,
    )
    assert outputs.view(3, SIZE).tolist() == [[call] * SIZE for call in order]


def test_no_graph_where_the_caller_wants_none():
    forward = Recorder()
    with torch.no_grad():
        outputs = run_passes(forward, make(), num_passes=2, backward_passes=1)
        assert not torch.is_grad_enabled()
    assert not outputs.requires_grad


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backward_passes", [None, 1, 2])
def test_passes_after_the_first_see_the_chosen_items(strategy, backward_passes):
    x, items = torch.arange(4.0), torch.tensor([3, 1])
    outputs = run_passes(
        lambda batch: batch * 1,
        x,
        num_passes=3,
        strategy=strategy,
        backward_passes=backward_passes,
        items=items,
    )
    assert outputs.tolist() == [0, 1, 2, 3, 3, 1, 3, 1]


def test_stacked_passes_of_chosen_items_are_one_forward():
    forward = Recorder()
    run_passes(forward, make(), num_passes=3, items=torch.tensor([0]))
    assert forward.calls == [(SIZE + 2, True)]


@pytest.mark.parametrize("items", [None, torch.tensor([1])])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_size_and_shared_names_reach_the_stacking(items, strategy):
    table = torch.randn(SIZE, SIZE)
    batch = {"first": torch.ones(5), "table": table, "x": torch.randn(SIZE, 2)}
    seen = []

    def forward(batch):
        seen.append(batch)
        return batch["x"]

    options = {"num_passes": 2, "strategy": strategy, "batch_size": SIZE, "shared": iter(["table"])}
    outputs = run_passes(forward, batch, items=items, **options)
    assert len(outputs) == SIZE + (SIZE if items is None else 1)
    assert all(b["table"] is table and torch.equal(b["first"], batch["first"]) for b in seen)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_callers_batch_is_untouched(strategy):
    batch = make()
    x, copied = batch["x"], batch["x"].clone()
    run_passes(Recorder(), batch, num_passes=2, strategy=strategy, items=torch.tensor([1, 2]))
    assert list(batch) == ["x"]
    assert batch["x"] is x
    assert torch.equal(x, copied)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_pass_draws_masks_of_its_own(strategy):
    dropout = nn.Dropout(0.5)
    passes = run_passes(dropout, torch.ones(8, 64), num_passes=3, strategy=strategy).view(3, -1)
    kept = passes != 0
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert 0.3 < (kept[a] ^ kept[b]).float().mean() < 0.7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_passes": 1}, [None]),
        ({"num_passes": 3}, [(4, 12, None)]),
        ({"num_passes": 2, "backward_passes": 1}, [None, None]),
        ({"num_passes": 2, "strategy": "sequential"}, [None, None]),
        ({"num_passes": 3, "items": [3, 1]}, [(4, 8, [0, 1, 2, 3, 3, 1, 3, 1])]),
        ({"num_passes": 3, "items": [3, 1], "backward_passes": 1}, [(2, 4, None), None]),
    ],
)
def test_a_forward_can_learn_how_it_is_stacked(options, expected):
    seen = []

    def forward(x):
        rows = stacked_rows()
        origin = None if rows is None or rows.origin is None else rows.origin.tolist()
        seen.append(rows and (rows.first, rows.total, origin))
        return x

    if "items" in options:
        options = {**options, "items": torch.tensor(options["items"])}
    run_passes(forward, torch.arange(4.0), **options)
    assert seen == expected
    assert stacked_rows() is None


def test_a_forward_that_fails_leaves_no_trace():
    def fail(batch):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run_passes(fail, torch.ones(4), num_passes=2)
    assert stacked_rows() is None
