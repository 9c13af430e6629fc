"""Classes that are spread over processes: the same loss and gradients as in one process."""

import re

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
    rdrop_mse_loss,
    rdrop_step,
    share_prefix,
    symmetric_kl,
)
from regdrop.diagnostics import measure_disagreement
from regdrop.kernels.class_columns import Columns, RowSums
from regdrop.kernels.class_rows import class_rows, combine_shares
from regdrop.kernels.eager import eager_terms
from regdrop.kernels.selection import select_kernel
from regdrop.kernels.sharded_classes import whole_tensor
from regdrop.kernels.target import Target
from regdrop.loss import fraternal_terms

CLASSES = 7
WEIGHT = torch.linspace(0.3, 2, CLASSES, dtype=torch.float64)
CASES = [
    {},
    {"label_smoothing": 0.1, "weight": WEIGHT},
    {"reduction": "none"},
    {"reduction": "sum", "scale": "sum", "num_passes": 3, "backward_passes": 2},
    {"num_items": 11, "num_weight": 9, "unlabelled_index": -1},
    {"class_dim": 1},
    {"impl": "chunked"},
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
        "mesh of two dimensions": _loss_on_two_dimensions(),
        "model": _train(_parallel(_Model(), mesh, "head")),
        "counted": _counted(mesh),
        "disagreement": _disagreement(_parallel(_noisy(), mesh, "2")).epkl,
        "refused": _refusals(mesh, rank),
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


def _counted(mesh):
    """Return the gradient where the items are counted in a target that is a DTensor."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    logits, target = make({})
    leaf = distribute_tensor(logits, mesh, [Shard(2)]).detach().requires_grad_()
    target = distribute_tensor(target, mesh, [Replicate()])
    count = (target != -100).sum()
    rdrop_cross_entropy(leaf, target, alpha=1.3, num_items=count, num_weight=count).loss.backward()
    return leaf.grad.full_tensor()


def _loss_on_two_dimensions():
    """Return the loss where a dimension of one process is spread by items, which nothing is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    logits, target = make({})
    mesh = init_device_mesh("cpu", (1, 2))
    spread = distribute_tensor(logits, mesh, [Shard(0), Shard(2)])
    return rdrop_cross_entropy(spread, target, alpha=1.3).loss


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


def _parallel(model, mesh, head):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    plan = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return parallelize_module(model, mesh, {head: plan})


def _noisy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, CLASSES)).double()


def _disagreement(model):
    torch.manual_seed(1)
    return measure_disagreement(model, [(numbers(5, 4, seed=3), torch.arange(5))], num_masks=3)


def _share_words(mesh):
    """Share an embedding whose words are split among processes, before its output is summed."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    model = nn.Sequential(nn.Embedding(CLASSES + 1, 6), nn.Dropout(0.5), nn.Linear(6, CLASSES))
    parallelize_module(model, mesh, {"0": RowwiseParallel(**layouts)})
    with share_prefix(model, "0"):
        rdrop_step(model, torch.arange(4), torch.arange(4), config=RDropConfig(alpha=1.0), step=0)


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


def _refusals(mesh, rank):
    """Return what is said of what cannot be done, by name."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    spread = distribute_tensor(numbers(8, CLASSES), mesh, [Shard(1)])
    by_items = distribute_tensor(numbers(8, CLASSES), mesh, [Shard(0)])
    widths = 2, 5
    uneven = DTensor.from_local(
        numbers(8, widths[rank]), mesh, [Shard(1)], shape=(8, CLASSES), stride=(CLASSES, 1)
    )
    classes, numbers_of_items = torch.arange(4), numbers(4, CLASSES)
    weight = WEIGHT.clone().requires_grad_()
    options = {"alpha": 1.0}
    part = {"config": RDropConfig(alpha=1.0, fraction=0.5), "step": 0}
    calls = {
        "by items": lambda: rdrop_cross_entropy(by_items, classes, **options),
        "divergence": lambda: symmetric_kl(by_items),
        "probabilities": lambda: rdrop_cross_entropy(
            spread, numbers_of_items.softmax(-1), **options
        ),
        "eager": lambda: rdrop_cross_entropy(spread, classes, impl="eager", **options),
        "weight": lambda: rdrop_cross_entropy(spread, classes, weight=weight, **options),
        "in place": lambda: rdrop_cross_entropy(spread, classes, inplace=True, **options),
        "uneven": lambda: rdrop_cross_entropy(uneven, classes, **options),
        "targets": lambda: rdrop_cross_entropy(spread, classes + rank, **options),
        "ignored": lambda: rdrop_cross_entropy(spread, classes, ignore_index=rank, **options),
        "fused": lambda: linear_rdrop_cross_entropy(
            numbers(8, CLASSES), by_items, classes, **options
        ),
        "mse": lambda: rdrop_mse_loss(spread, numbers_of_items, **options),
        "fraternal": lambda: fraternal_terms(spread, classes, num_passes=2),
        "words": lambda: _share_words(mesh),
        "fraction": lambda: rdrop_step(lambda x: spread[:6], torch.ones(4, 2), classes, **part),
    }
    messages = {}
    for name, call in calls.items():
        try:
            messages[name] = call()
        except (TypeError, ValueError) as error:
            messages[name] = str(error)
    torch.testing.assert_close(symmetric_kl(spread), symmetric_kl(numbers(8, CLASSES)))
    return messages


SAID = {
    "by items": "logits that are a DTensor must be a copy in every process, or spread by classes",
    "divergence": "logits that are a DTensor must be a copy in every process, or spread by classes",
    "probabilities": "target must hold class indices",
    "eager": "need impl='auto', 'chunked' or 'triton', .* got eager",
    "weight": "weight must not require a gradient",
    "in place": "inplace=True needs plain logits, got a DTensor",
    "uneven": "logits must be spread over processes as torch.chunk does it, [43] of 7 classes here",
    "targets": "the processes that share the classes of logits must have the same target",
    "ignored": "the processes that share the classes of logits must have the same target",
    "fused": "weight must be a plain tensor, got a DTensor; under FSDP2 leave the last layer",
    "mse": "input must be a plain tensor, got a DTensor",
    "fraternal": "logits must be a plain tensor, got a DTensor",
    "words": "until='0' cannot be shared: its output is not summed over the processes yet",
    "fraction": "the output behind fraction must be a plain tensor, got a DTensor",
}


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
        output = rdrop_cross_entropy(leaf, target, **{"alpha": 1.3, **options, "impl": "eager"})
        output.loss.sum().backward()
        for process in found:
            for ours, theirs in zip(process, (*output, leaf.grad), strict=True):
                torch.testing.assert_close(ours, theirs.detach())
    for process in (first, second):
        torch.testing.assert_close(process["counted"], process["losses"][0][-1])
        assert process["mesh of two dimensions"] == process["losses"][0][0]
        assert process["disagreement"] == pytest.approx(_disagreement(_noisy()).epkl)
    expected = _train(_Model())
    for process in (first, second):
        assert process["model"].keys() == expected.keys()
        for name, weight in process["model"].items():
            torch.testing.assert_close(weight, expected[name])
        assert process["refused"].keys() == SAID.keys()
        for name, said in SAID.items():
            assert re.match(f".*{said}", process["refused"][name]), (name, process["refused"])
