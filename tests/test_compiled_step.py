"""A whole step inside torch.compile: few graphs, and none for the steps that follow."""

import pytest
import torch
from torch import nn

from graphs import count_graphs
from regdrop import RDropConfig, rdrop_step

pytestmark = pytest.mark.slow


class Break(nn.Module):
    """What torch.compile cannot follow."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return x


def small_model(*more):
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), *more, nn.Linear(8, 5))


def graphs_of_steps(config, count=5, model=None, fullgraph=True, first=0, move=0, **options):
    """Return the graphs after each of some steps, from `first` on by `move`."""
    torch.manual_seed(0)
    model = small_model() if model is None else model
    batch, target = torch.randn(4, 6), torch.randint(0, 5, (4,))

    def loss(batch, target, step):
        return rdrop_step(model, batch, target, config=config, step=step, **options).loss

    calls = [(batch, target, first + i * move) for i in range(count)]
    return count_graphs(loss, calls, fullgraph=fullgraph)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"passes": "sequential"},
        {"backward_passes": 1},
        {"num_passes": 3},
        {"fraction": 0.5},
    ],
)
def test_a_step_is_one_graph(options):
    assert graphs_of_steps(RDropConfig(**options)) == [1] * 5


def test_steps_that_are_counted_make_one_more():
    config = RDropConfig(alpha_warmup_steps=10, alpha_schedule="linear")
    assert graphs_of_steps(config, move=1) == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("options", [{}, {"passes": "sequential"}, {"fraction": 0.5}])
def test_sizes_of_the_batch_make_one_more(options):
    model, config = small_model(), RDropConfig(**options)
    calls = [(torch.randn(size, 6), torch.randint(0, 5, (size,))) for size in (4, 7, 6, 9)]
    found = count_graphs(
        lambda batch, target: rdrop_step(model, batch, target, config=config, step=0).loss,
        calls,
        fullgraph=True,
    )
    assert found == [1, 2, 2, 2]


def test_steps_of_one_pass_and_of_two_are_graphs_of_their_own():
    assert graphs_of_steps(RDropConfig(every_n_steps=2), count=6, move=1)[2:] == [3] * 4


def test_a_model_that_breaks_the_graph_does_so_once():
    found = graphs_of_steps(RDropConfig(), model=small_model(Break()), fullgraph=False)
    assert found == [found[0]] * 5


def test_monitored_steps_break_the_graph_and_settle():
    config = RDropConfig(start_step=100, monitor_steps=2)
    found = graphs_of_steps(config, count=6, fullgraph=False, move=1)
    assert found[3:] == [found[3]] * 3


def test_a_monitored_step_measures_as_without_compilation():
    torch.manual_seed(0)
    model, config = small_model(), RDropConfig(start_step=100, monitor_steps=1)
    batch, target = torch.randn(4, 6), torch.randint(0, 5, (4,))

    def step():
        return rdrop_step(model, batch, target, config=config, step=0)

    torch._dynamo.reset()
    found = []
    for function in (step, torch.compile(step, backend="eager")):
        torch.manual_seed(1)
        found.append((*function(), torch.rand(())))
    torch.testing.assert_close(found[1], found[0])
    assert found[0][2] > 0


def test_a_step_has_the_gradient_that_it_has_without_compilation():
    torch.manual_seed(0)
    model, batch, target = small_model(), torch.randn(4, 6), torch.randint(0, 5, (4,))

    def loss(batch):
        return rdrop_step(model, batch, target, config=RDropConfig(), step=0).loss

    torch._dynamo.reset()
    gradients = []
    for function in (loss, torch.compile(loss, backend="eager", fullgraph=True)):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(function(batch), list(model.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0])
