"""What docs/frameworks/several-gpus.md says: two processes learn what one does."""

import re
from pathlib import Path

import torch
from torch import distributed, nn

from processes import run_in_two_processes
from regdrop import RDropConfig, linear_rdrop_cross_entropy, rdrop_step, repeat_batch

PAGE = Path(__file__).parent.parent / "docs/frameworks/several-gpus.md"
(STEP,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
RATE, CLASSES, STEPS = 0.5, 3, 4


class Network(nn.Module):
    """Its second layer takes part in every other forward, as under LayerDrop.

    Passes differ without a random number.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 5)
        self.dropout, self.head = nn.Dropout(0.0), nn.Linear(5, CLASSES)
        self.calls = 0
        self.double()

    def states(self, x):
        self.calls += 1
        states = self.dropout(self.first(x)).tanh()
        return states + self.second(states).tanh() if self.calls % 2 else states

    def forward(self, x):
        return self.head(self.states(x))


def batches(rank, number=STEPS):
    generator = torch.Generator().manual_seed(2 + rank)
    for _ in range(number):
        x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        yield x, torch.arange(4) % CLASSES


def state(module):
    return {name: x.detach().clone() for name, x in module.state_dict().items()}


def run(rank, folder):
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = {"step": take_steps(rank), "uneven": take_uneven_steps(rank)}
    torch.save({**found, "sharded": shard(rank)}, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def take_steps(rank):
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    names = {"model": model, "optimizer": optimizer, "batches": batches(rank), "world_size": 2}
    exec(STEP, names)
    return state(model)


def take_uneven_steps(rank):
    """One process has a batch more than the other."""
    model = Network()
    names = {"model": model, "optimizer": None, "batches": [], "world_size": 2}
    exec(STEP, names)
    wrapped = nn.parallel.DistributedDataParallel(
        names["Step"](model, names["config"]), find_unused_parameters=True
    )
    with wrapped.join():
        for step, (x, y) in enumerate(batches(rank, number=1 + rank)):
            wrapped(x, y, step, num_items=4).backward()
    return torch.tensor(model.calls)


def shard(rank):
    """Return the gradient of a last layer that the root shards, and of one by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, gradients = init_device_mesh("cpu", (2,)), []
    for is_apart in (False, True):
        model = Network()
        if is_apart:
            fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        x, y = next(batches(rank))
        model.forward = model.states
        hidden = model(repeat_batch(x))
        if is_apart:
            model.head.unshard()
        loss = linear_rdrop_cross_entropy(
            hidden, model.head.weight, y, bias=model.head.bias, alpha=1.0, num_items=8
        ).loss
        (2 * loss).backward()
        gradients.append(model.head.weight.grad.full_tensor())
    return gradients


def test_two_processes_learn_what_one_does(tmp_path):
    run_in_two_processes(run, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    config = RDropConfig(alpha=1.0, passes="sequential")
    pairs = zip(batches(0), batches(1), strict=True)
    for step, ((x, y), (other, labels)) in enumerate(pairs):
        optimizer.zero_grad()
        x, y = torch.cat([x, other]), torch.cat([y, labels])
        rdrop_step(model, x, y, config=config, step=step).loss.backward()
        optimizer.step()
    for found in (first, second):
        torch.testing.assert_close(found["step"], state(model))
    assert [int(found["uneven"]) for found in (first, second)] == [2, 4]

    model = Network()
    x, y = (torch.cat(parts) for parts in zip(next(batches(0)), next(batches(1)), strict=True))
    states = model.states(repeat_batch(x))
    linear_rdrop_cross_entropy(
        states, model.head.weight, y, bias=model.head.bias, alpha=1.0
    ).loss.backward()
    for found in (first, second):
        for gradient in found["sharded"]:
            torch.testing.assert_close(gradient, model.head.weight.grad)
