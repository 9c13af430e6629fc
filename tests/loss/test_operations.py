"""What the cross-entropy form costs in operations: counted, since times depend on the machine."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reference
from implementations import CPP
from regdrop import rdrop_cross_entropy

WITHOUT_MEMORY = {"detach", "empty", "empty_like", "empty_strided", "new_empty"}
ONE_A_ROW = {"gather", "scatter_", "nll_loss_forward"}


def count_operators(loss, logits):
    """Return the operators of one loss and gradient, with those that they call."""
    torch.autograd.grad(loss(logits), logits)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.autograd.grad(loss(logits), logits)
    return sum(event.name.startswith("aten::") for event in profiler.events())


class CountPasses(TorchDispatchMode):
    """Counts the reads and writes of tensors of at least a quarter of the logits, as shares."""

    def __init__(self, logits):
        super().__init__()
        self.unit = logits.numel() * 4  # of bytes: those of the logits in float32
        self.count = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.is_view or name in WITHOUT_MEMORY | ONE_A_ROW:
            return out
        read = {key: value for key, value in (kwargs or {}).items() if key != "out"}
        given = (args[1:], read) if name in ("copy_", "zero_", "fill_") else (args, read)
        for tensor in tree_leaves((given, out)):
            if isinstance(tensor, torch.Tensor) and (share := self.share(tensor)) >= 0.25:
                self.count += share
        return out

    def share(self, tensor):
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        numbers = torch.Size(size for size, stride in sizes if stride != 0).numel()
        return numbers * tensor.element_size() / self.unit


def count_passes(loss, logits):
    with CountPasses(logits) as passes:
        torch.autograd.grad(loss(logits), logits)
    return passes.count


@pytest.mark.parametrize("impl", ["auto", "chunked", CPP])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": "sum", "alpha": 5.0}, {"num_items": 17}],
    ids=str,
)
def test_small_logits_take_at_most_90_operators(impl, options):
    logits, target = torch.randn(2 * 64, 3, requires_grad=True), torch.randint(0, 3, (64,))
    options = {"alpha": 1.0, **options}

    def loss(x):
        return rdrop_cross_entropy(x, target, impl=impl, **options).loss

    assert count_operators(loss, logits) <= 90
    official = count_operators(lambda x: reference.official_loss(x, target, 1.0), logits)
    assert official > 140  # so that the count counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_ignored", [False, True])
def test_large_logits_are_copied_at_most_14_times_over(dtype, is_ignored):
    """In times of a copy in float32, a read and a write, whatever the type of the logits."""
    logits = torch.randn(2 * 16, 3000).to(dtype).requires_grad_()
    target = torch.randint(0, 3000, (16,))
    target[3] = -100 if is_ignored else target[3]
    count = count_passes(lambda x: rdrop_cross_entropy(x, target, alpha=1.0).loss, logits)
    assert 10 <= count / 2 <= 14


def test_the_count_of_copies_is_that_of_two_cross_entropies():
    """Each reads logits and writes log-probabilities; its gradient takes a target, and both."""
    logits, target = torch.randn(2 * 16, 3000, requires_grad=True), torch.randint(0, 3000, (16,))

    def loss(x):
        return sum(F.cross_entropy(part, target) for part in x.chunk(2))

    # 2 forward; 1 for the zeros of the target's gradient, 3 for the rest; 3 to join both halves.
    assert count_passes(loss, logits) == pytest.approx(9, abs=0.1)
