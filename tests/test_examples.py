"""What the examples claim beside running, which `test_docs.py` sees to."""

import importlib.util
from itertools import chain
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from processes import run_in_two_processes
from regdrop import RDropConfig, rdrop_cross_entropy, repeat_batch

EXAMPLES = Path(__file__).parent.parent / "examples"
ALPHA = 1.5
# Sizes of the micro-batches of a window, for each process.
WINDOWS = {
    "full": [[3, 5], [2, 6]],
    "last and smaller": [[3], [6]],
}


class FadedSecondPass(nn.Module):
    """Stands for dropout: two passes differ, and always by the same."""

    def forward(self, x):
        """Shrink the second half of a stacked batch."""
        factor = torch.ones(len(x), 1, dtype=x.dtype)
        factor[len(x) // 2 :] = 0.1
        return x * factor


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), FadedSecondPass(), nn.Linear(8, 3)).double()


def windows_of(name, num_processes):
    """Return every process's window of one set of items."""
    generator = torch.Generator().manual_seed(1)
    return [
        [
            (
                torch.randn(size, 4, generator=generator, dtype=torch.float64),
                torch.randint(3, (size,), generator=generator),
            )
            for size in sizes
        ]
        for sizes in WINDOWS[name][:num_processes]
    ]


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accumulated(window):
    """Return the gradients and both terms of a window as the example adds them up."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = build()
    accumulate = load_example("accelerate_loop").accumulate
    config = RDropConfig(alpha=ALPHA)
    terms = accumulate(accelerator, accelerator.prepare(model), window, config=config, step=0)
    return [*(p.grad for p in model.parameters()), *terms]


def of_one_batch(windows):
    model = build()
    x, y = (torch.cat(part) for part in zip(*chain.from_iterable(windows), strict=True))
    output = rdrop_cross_entropy(model(repeat_batch(x)), y, alpha=ALPHA, scale="mean")
    output.loss.backward()
    return [*(p.grad for p in model.parameters()), output.nll.detach(), output.kl.detach()]


def assert_equal(found, expected):
    assert expected[-1] > 0.01
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=1e-6, atol=1e-8)


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its state for the process, where other tests train too."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("name", WINDOWS)
def test_accelerate_loop_accumulates_the_gradient_of_one_batch(name):
    windows = windows_of(name, 1)
    assert_equal(accumulated(windows[0]), of_one_batch(windows))


def _worker(rank, folder):
    for name in WINDOWS:
        found = accumulated(windows_of(name, 2)[rank])
        torch.save(found, folder / f"{name}-{rank}.pt")


@pytest.mark.slow
def test_accelerate_loop_with_two_processes_has_the_gradient_of_one_batch(tmp_path):
    run_in_two_processes(_worker, tmp_path)
    for name in WINDOWS:
        expected = of_one_batch(windows_of(name, 2))
        for rank in range(2):
            assert_equal(torch.load(tmp_path / f"{name}-{rank}.pt"), expected)
