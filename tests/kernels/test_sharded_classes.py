"""Classes that are spread over processes: the same loss and gradients as in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from implementations import TRITON
from processes import run_in_two_processes
from regdrop import (
    RDropConfig,
    linear_rdrop_cross_entropy,
    rdrop_cross_entropy,
    rdrop_step,
    symmetric_kl,
)
from regdrop.kernels.class_rows import Columns, RowSums, class_rows, combine_shares
from regdrop.kernels.eager import eager_terms
from regdrop.kernels.selection import select_kernel
from regdrop.kernels.sharded_classes import whole_tensor
from regdrop.kernels.target import Target

CLASSES = 7
WEIGHT = torch.linspace(0.3, 2, CLASSES, dtype=torch.float64)
CASES = [
    {},
    {"label_smoothing": 0.1, "weight": WEIGHT},
    {"reduction": "none"},
    {"reduction": "sum", "scale": "sum", "num_passes": 3, "backward_passes": 2},
    {"num_items": 11, "num_weight": 9, "unlabelled_index": -1},
    {"class_dim": 1},
    {"impl": "chunked", "inplace": True},
    {"num_passes": 1, "alpha": 0.0},
]


def numbers(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make(options, num_classes=CLASSES):
    """Return logits (num_passes * 4, 3, C), the classes where the options say, and the target."""
    logits = numbers(options.get("num_passes", 2) * 4, 3, num_classes)
    target = torch.arange(12).view(4, 3) % num_classes
    target[0, 0] = -100
    target[1, 2] = options.get("unlabelled_index", 0)
    return logits.movedim(-1, options.get("class_dim", -1)), target


@pytest.mark.parametrize("impl", ["chunked", TRITON])
@pytest.mark.parametrize("widths", [(3, 4), (3, 3, 1), (7, 0), (1, 1, 5)])
@pytest.mark.parametrize("masked", [None, slice(0, 3)])
def test_shares_of_the_classes_give_the_terms_of_all(impl, widths, masked):
    """Also where a process has no class, or only those that are masked in every pass."""
    dtype = torch.float32
    logits, classes = numbers(2, 5, CLASSES, dtype=dtype), torch.tensor([3, 6, 3, 5, 4])
    if masked is not None:
        logits[..., masked] = -torch.inf
    valid = torch.tensor([True, True, False, True, True])
    target = Target(classes, None, None, 0.0, valid)
    rows = class_rows(select_kernel("chunked", logits.device).class_rows)
    if impl == "triton":
        from regdrop.kernels.triton_rows import triton_kernel

        rows = triton_kernel(logits.device).class_rows
    shares, first = [], 0
    for part in logits.split(widths, -1):
        sums = RowSums.empty(part)
        if part.numel():
            rows.collect(Columns(part.contiguous(), first, CLASSES), target, sums, True, False)
        else:
            sums.statistics.zero_()[:2] = -torch.inf
        shares.append((part.contiguous(), first, sums.statistics.clone()))
        first += part.shape[-1]
    whole = RowSums.empty(logits)
    combine_shares([statistics for _, _, statistics in shares], target, whole)
    leaf = logits.clone().requires_grad_()
    nll, kl = eager_terms(leaf, target, backward_passes=2)
    torch.testing.assert_close(whole.nll, nll)
    torch.testing.assert_close(whole.kl, kl)
    grad_nll, grad_kl = torch.linspace(0.5, 2, 5), torch.linspace(1, -1, 5)
    (expected,) = torch.autograd.grad((nll * grad_nll + kl * grad_kl).sum(), leaf)
    for part, start, _ in shares:
        found = torch.empty_like(part)
        if part.numel():
            columns = Columns(part, start, CLASSES)
            grads = grad_nll / 2, grad_kl
            rows.write(found, columns, target, whole.statistics, grads, 2)
        torch.testing.assert_close(found, expected[..., start : start + part.shape[-1]])


def _in_both(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = {
        "losses": [_loss(mesh, options) for options in CASES],
        "one class": _loss(mesh, {}, num_classes=1),
        "model": _train(_parallel_model(mesh)),
        "refused": _refusals(mesh),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()


def _loss(mesh, options, num_classes=CLASSES):
    """Return loss, both terms and the whole gradient; those of copies in each are the same."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    logits, target = make(options, num_classes)
    options = {"alpha": 1.3, **options}
    results = []
    for placement in (Shard(options.get("class_dim", 2)), Replicate()):
        for targets in (target, distribute_tensor(target, mesh, [Replicate()])):
            leaf = distribute_tensor(logits.clone(), mesh, [placement]).detach().requires_grad_()
            output = rdrop_cross_entropy(leaf * 1, targets, **options)
            assert type(output.loss) is torch.Tensor
            output.loss.sum().backward()
            assert leaf.grad.placements == (placement,)
            results.append([*output, leaf.grad.full_tensor()])
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            torch.testing.assert_close(one, other)
    return results[0]


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, CLASSES)
        self.double()

    def forward(self, x):
        # Two passes that differ without a random number.
        shift = torch.linspace(0, 1, len(x), dtype=x.dtype)[:, None]
        return self.head((self.body(x) + shift).tanh())


def _parallel_model(mesh):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    plan = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return parallelize_module(_Model(), mesh, {"head": plan})


def _train(model):
    """Return what three steps leave."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    x, target = numbers(5, 4, seed=3), torch.arange(5)
    for step in range(3):
        config = RDropConfig(alpha=2.0)
        rdrop_step(model, x, target, config=config, step=step).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    weights = {name: x.detach() for name, x in model.state_dict().items()}
    return {name: whole_tensor(x) for name, x in weights.items()}


def _refusals(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    spread = distribute_tensor(numbers(8, CLASSES), mesh, [Shard(1)])
    by_items = distribute_tensor(numbers(8, CLASSES), mesh, [Shard(0)])
    classes = torch.arange(4)
    probabilities = numbers(4, CLASSES).softmax(-1)
    plain = numbers(8, CLASSES)
    options = {"alpha": 1.0}
    messages = []
    for call in (
        lambda: rdrop_cross_entropy(by_items, classes, **options),
        lambda: symmetric_kl(by_items),
        lambda: rdrop_cross_entropy(spread, probabilities, **options),
        lambda: rdrop_cross_entropy(spread, classes, impl="eager", **options),
        lambda: linear_rdrop_cross_entropy(plain, by_items, classes, **options),
    ):
        try:
            messages.append(call())
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    torch.testing.assert_close(symmetric_kl(spread), symmetric_kl(numbers(8, CLASSES)))
    return messages


def test_two_processes_give_what_one_does(tmp_path):
    run_in_two_processes(_in_both, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    cases = [(CLASSES, options) for options in CASES] + [(1, {})]
    losses = zip(
        *([*found["losses"], found["one class"]] for found in (first, second)), strict=True
    )
    for (num_classes, options), found in zip(cases, losses, strict=True):
        logits, target = make(options, num_classes)
        leaf = logits.clone().requires_grad_()
        plain = {k: v for k, v in options.items() if k not in ("impl", "inplace")}
        output = rdrop_cross_entropy(leaf, target, impl="eager", **{"alpha": 1.3, **plain})
        output.loss.sum().backward()
        for process in found:
            for ours, theirs in zip(process, (*output, leaf.grad), strict=True):
                torch.testing.assert_close(ours, theirs.detach())
    expected = _train(_Model())
    for process in (first, second):
        assert process["model"].keys() == expected.keys()
        for name, weight in process["model"].items():
            torch.testing.assert_close(weight, expected[name])
        by_items, divergence, probabilities, eager, fused = process["refused"]
        assert by_items == divergence
        assert by_items.startswith("logits that are a DTensor must be a copy in every process, or")
        assert "target must hold class indices" in probabilities
        assert "impl='eager'" in eager
        assert "weight must be a plain tensor, got a DTensor" in fused
