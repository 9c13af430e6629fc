"""The lines of docs/frameworks/fabric-and-pipelines.md are the plain loop."""

import re
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from processes import run_in_two_processes
from regdrop import rdrop_cross_entropy, repeat_batch

PAGE = Path(__file__).parent.parent / "docs/frameworks/fabric-and-pipelines.md"
FABRIC, PIPELINE, CHUNKS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
RATE = 0.1


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3))


def batch(size=8):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size, 6, generator=generator), torch.arange(size) % 3


def plain_loss(model, x, y):
    return rdrop_cross_entropy(model(repeat_batch(x)), y, alpha=1.0).loss


def test_fabrics_lines():
    ours, theirs, (x, y) = network(), network(), batch()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(theirs.parameters(), RATE)
    exec(FABRIC, {"model": theirs, "optimizer": optimizer, "batches": batches})
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(ours.parameters(), RATE)
    for x, y in batches:
        optimizer.zero_grad()
        plain_loss(ours, x, y).backward()
        optimizer.step()
    torch.testing.assert_close(theirs.state_dict(), ours.state_dict())


def run_pipeline(rank, folder):
    model, (x, y) = network(), batch()
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    names = {"rank": rank, "first_half": model[:3], "second_half": model[3:], "x": x, "y": y}
    torch.manual_seed(3)
    exec(PIPELINE, names)
    torch.save([p.grad for p in names["stage"].submod.parameters()], f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
def test_the_pipelines_lines(tmp_path):
    run_in_two_processes(run_pipeline, tmp_path)
    model, (x, y) = network(), batch()
    torch.manual_seed(3)
    for part, labels in zip(x.chunk(2), y.chunk(2), strict=True):
        (plain_loss(model, part, labels) / 2).backward()
    found = [gradient for rank in range(2) for gradient in torch.load(tmp_path / f"{rank}.pt")]
    torch.testing.assert_close(found, [p.grad for p in model.parameters()])


def test_the_lines_of_logits_in_chunks():
    layers = nn.Embedding(9, 6), nn.Dropout(0.4), nn.Linear(6, 9)
    model, words = nn.Sequential(*layers), torch.randint(0, 9, (4, 10))
    labels = torch.randint(0, 9, (4, 10))
    labels[0, 3:] = -100

    def language_model(words):
        return model(words).tensor_split(3, dim=1)

    names = {"language_model": language_model, "words": words, "labels": labels}
    torch.manual_seed(3)
    exec(CHUNKS, names)
    torch.manual_seed(3)
    torch.testing.assert_close(names["loss"], plain_loss(model, words, labels))
