"""Forwards that change what they are given, and models that keep state from one to the next."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

from regdrop import RDropConfig, dropout_rates, find_dropout, rdrop_step
from regdrop.diagnostics import measure_disagreement
from regdrop.passes import run_passes

WAYS = [{"passes": "sequential"}, {"backward_passes": 1}, {"passes": "sequential", "fraction": 0.5}]


class InPlace(nn.Module):
    """Scales its input in place, as `normalize(inplace=True)` does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x.sub_(1.0).div_(2.0))


@pytest.mark.parametrize("options", [*WAYS, {}])
def test_a_forward_that_writes_into_its_input_gives_every_pass_the_same(options):
    torch.manual_seed(0)
    model, x, y = InPlace(), torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    before = x.clone()
    with pytest.warns(UserWarning, match="nothing to compare"):
        output = rdrop_step(model, x, y, config=RDropConfig(**options), step=0)
    assert output.kl == pytest.approx(0, abs=1e-7)
    expected = nn.functional.cross_entropy(model.layer((before - 1) / 2), y)
    torch.testing.assert_close(output.nll, expected.detach())
    assert torch.equal(x, before)


def test_dropout_in_place_drops_as_much_in_every_pass():
    model, seen = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(5, 3)), []
    hook = lambda module, args: seen.append((args[0] == 0).float().mean())  # noqa: E731
    model[1].register_forward_pre_hook(hook)
    x, y = torch.ones(2000, 5), torch.zeros(2000, dtype=torch.long)
    for config in (RDropConfig(passes="sequential"), RDropConfig(start_step=5, monitor_steps=1)):
        rdrop_step(model, x, y, config=config, step=0)
        x.fill_(1.0)  # a step of one pass is given the caller's own tensor
    assert torch.stack(seen).tolist() == pytest.approx([0.5] * 4, abs=0.03)
    measure_disagreement(model, [(x, y)], num_masks=4)
    assert bool((x == 1).all())


@pytest.mark.parametrize("options", [{}, {"start_step": 5}, {"start_step": 5, "monitor_steps": 1}])
def test_a_forward_that_takes_its_input_out_of_the_batch(options):
    net = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5))
    batch = {"x": torch.randn(6, 5)}
    y = torch.zeros(6, dtype=torch.long)
    output = rdrop_step(lambda b: net(b.pop("x")), batch, y, config=RDropConfig(**options), step=0)
    assert output.loss.isfinite()
    assert list(batch) == ["x"]


def test_packed_sequences_are_cloned_too():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])

    def forward(sequences):
        sequences.data.mul_(2)
        return sequences.data

    found = run_passes(forward, packed, num_passes=2, strategy="sequential")
    assert bool((found == 2).all())
    assert bool((packed.data == 1).all())


def test_the_gradient_goes_through_to_inputs_that_have_one():
    x = torch.randn(4, 5, requires_grad=True)
    run_passes(lambda batch: batch * 3, x, num_passes=2, strategy="sequential").sum().backward()
    assert bool((x.grad == 6).all())


class Moving(nn.Module):
    """Keeps a mean of what it sees, as a new tensor or in the old one."""

    def __init__(self, is_in_place):
        super().__init__()
        self.is_in_place = is_in_place
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("last", None)

    def forward(self, x):
        if self.training and self.is_in_place:
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        elif self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            self.last = x
        return x - self.mean


@pytest.mark.parametrize("is_in_place", [True, False])
def test_an_extra_pass_leaves_buffers_as_they_were(is_in_place):
    torch.manual_seed(0)
    x, y, means = torch.randn(6, 5), torch.zeros(6, dtype=torch.long), []
    for monitor_steps in (None, 1):
        torch.manual_seed(1)
        model = nn.Sequential(Moving(is_in_place), nn.Dropout(0.3), nn.Linear(5, 3))
        config = RDropConfig(start_step=5, monitor_steps=monitor_steps)
        rdrop_step(model, x, y, config=config, step=0)
        means.append(model[0].mean)
    assert torch.equal(*means)


@pytest.mark.parametrize("is_in_place", [True, False])
def test_the_deployed_model_is_not_moved_by_the_masks(is_in_place):
    torch.manual_seed(0)
    model = nn.Sequential(Moving(is_in_place), nn.Dropout(0.3), nn.Linear(5, 3)).eval()
    x, y = torch.randn(6, 5) + 3, torch.zeros(6, dtype=torch.long)
    expected = nn.functional.cross_entropy(model(x), y).item()
    found = measure_disagreement(model, [(x, y), (x, y)], num_masks=8)
    assert found.deployed.nll == pytest.approx(expected, rel=1e-6)
    assert bool((model[0].mean == 0).all())
    assert model[0].last is None


def test_rates_under_a_checkpoint_around_the_model_are_refused():
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.1), nn.Linear(8, 3))
    x, y = torch.randn(6, 5), torch.zeros(6, dtype=torch.long)
    config = RDropConfig(passes="sequential")
    with dropout_rates(model, (0.1, 0.6)):
        forward = lambda b: checkpoint(model, b, use_reentrant=False)  # noqa: E731
        loss = rdrop_step(forward, x, y, config=config, step=0).loss
        with pytest.raises(ValueError, match="cannot be used with gradient checkpointing"):
            loss.backward()


def test_rates_that_no_forward_had_are_told():
    class Encoder(nn.Sequential):
        def encode(self, x):
            return self[1](self[0](x))

    model = Encoder(nn.Linear(5, 3), nn.Dropout(0.1))
    told = pytest.warns(UserWarning, match="dropout_rates changed nothing")
    with told, dropout_rates(model, (0.2, 0.6)):
        model.encode(torch.randn(2, 5))


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout_keep_prob, self.num_dropouts, self.p_drop = 0.9, 1, 0.2
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(nn.functional.dropout(x, 1 - self.dropout_keep_prob, self.training))


def test_what_is_kept_and_what_is_counted_is_no_rate():
    model = Kept()
    assert [(s.name, s.rate) for s in find_dropout(model)] == [("p_drop", 0.2)]
    with dropout_rates(model, 0.1):
        assert (model.dropout_keep_prob, model.num_dropouts, model.p_drop) == (0.9, 1, 0.1)
