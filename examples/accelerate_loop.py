"""R-Drop with Accelerate: accumulation windows of all processes count as one batch, exactly.

python examples/accelerate_loop.py          # or: accelerate launch examples/accelerate_loop.py
"""

from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from regdrop import RDropConfig, rdrop_step


def accumulate(accelerator: Any, model: Any, window: list[Any], **options: Any) -> Any:
    """Add the gradients of a window of micro-batches; return its NLL and KL in all processes."""
    count = sum(len(y) for _, y in window)
    num_items = accelerator.reduce(torch.tensor(count, device=accelerator.device))
    # DDP averages over processes, and `backward` divides by the accumulation steps.
    factor = accelerator.num_processes * accelerator.gradient_accumulation_steps
    terms = torch.zeros(2, device=accelerator.device)
    for number, (x, y) in enumerate(window, 1):
        with nullcontext() if number == len(window) else accelerator.no_sync(model):
            loss, *parts = rdrop_step(model, x, y, num_items=num_items, **options)
            accelerator.backward(loss * factor)
        terms += torch.stack(parts) * len(y) / num_items
    return accelerator.reduce(terms)


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x, test_x, y, test_y = train_test_split(x.float() / 16, y, train_size=300, random_state=0)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    config, step = RDropConfig(alpha=1.0), 0
    for _ in range(40):
        batches = iter(loader)
        while window := list(islice(batches, accelerator.gradient_accumulation_steps)):
            nll, kl = accumulate(accelerator, model, window, config=config, step=step)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    model.eval()  # one pass, no dropout
    with torch.no_grad():
        right = model(test_x.to(accelerator.device)).argmax(-1).cpu() == test_y
    accelerator.print(f"nll {nll:.3f} kl {kl:.3f} test accuracy {right.float().mean():.3f}")


if __name__ == "__main__":
    main()
