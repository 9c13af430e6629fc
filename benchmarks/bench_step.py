"""What a whole training step of R-Drop costs, in steps of one pass.

    python benchmarks/bench_step.py            # a few minutes
    python benchmarks/bench_step.py --quick    # a small model, to see that it runs

An encoder-decoder of 3 + 3 layers, 256 wide, on 64 pairs of 30 random tokens each, 10,000 words,
dropout 0.1; on a GPU three models of 49 to 356 million parameters. A step is forward, loss,
backward and fused Adam, without a Trainer around it. The step of one pass has the loss that
everyone has, `F.cross_entropy`; beside it stands one with this project's loss at no KL, since a
part of what R-Drop seems to save is the baseline's loss. Every way runs in turn; ratios are taken
round by round, in float32 and under bfloat16's autocast.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recording
from bench_loss import reference
from measuring import (
    can_build_cpp,
    peak_bytes,
    ratio,
    split_working,
    spread,
    time_interleaved,
)
from recording import Row
from regdrop import linear_rdrop_cross_entropy, rdrop_cross_entropy, repeat_batch
from regdrop.kernels import Implementation

ONE_PASS = "one pass"
ALPHA = 1.0


@dataclass(frozen=True)
class Size:
    """A model and a batch: layers on each side, pairs of sentences and the tokens of each."""

    width: int
    layers: int
    words: int
    pairs: int
    length: int


SMALLEST = Size(width=64, layers=1, words=500, pairs=4, length=5)
SIZES = {
    "cpu": [Size(width=256, layers=3, words=10_000, pairs=64, length=30)],
    # The first is as large as the paper's IWSLT model and batch, and leaves a large card idle.
    "cuda": [
        Size(width=512, layers=6, words=10_000, pairs=130, length=32),
        Size(width=768, layers=6, words=32_000, pairs=256, length=64),
        Size(width=1024, layers=11, words=32_000, pairs=256, length=64),
    ],
}


class Translator(nn.Module):
    """A Transformer whose output layer is its embedding."""

    def __init__(self, width: int, layers: int, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.body = nn.Transformer(
            width, width // 64 or 1, layers, layers, 4 * width, dropout=0.1, batch_first=True
        )
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def hidden(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the decoder's states, (batch, length, width)."""
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], source.device)
        embedded = self.embedding(source), self.embedding(target)
        return self.body(*embedded, tgt_mask=mask, tgt_is_causal=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits, (batch x length, words)."""
        return F.linear(self.hidden(source, target), self.embedding.weight).flatten(0, 1)


Loss = Callable[[Translator, Tensor, Tensor, Tensor], Tensor]


def stacked(model: Translator, source: Tensor, target: Tensor) -> Tensor:
    return model(*(repeat_batch(x, 2) for x in (source, target)))


def one_backward(
    model: Translator, source: Tensor, target: Tensor, words: Tensor, impl: Implementation = "auto"
) -> Tensor:
    """The second pass keeps nothing for a backward: the KL's gradient flows through the first."""
    with torch.no_grad():
        second = model(source, target)
    logits = torch.cat([model(source, target), second])
    return ours(logits, words, impl=impl, backward_passes=1)


def fused(
    model: Translator, source: Tensor, target: Tensor, words: Tensor, impl: Implementation = "auto"
) -> Tensor:
    """The last layer and the loss in one."""
    hidden = model.hidden(*(repeat_batch(x, 2) for x in (source, target)))
    return fused_loss(model, hidden, words, impl=impl)


def one_backward_fused(
    model: Translator, source: Tensor, target: Tensor, words: Tensor, impl: Implementation = "auto"
) -> Tensor:
    """One backward pass, and the last layer and the loss in one."""
    with torch.no_grad():
        second = model.hidden(source, target)
    hidden = torch.cat([model.hidden(source, target), second])
    return fused_loss(model, hidden, words, impl=impl, backward_passes=1)


def fused_loss(model: Translator, hidden: Tensor, words: Tensor, **options: Any) -> Tensor:
    weight = model.embedding.weight
    hidden = hidden.flatten(0, 1)
    return linear_rdrop_cross_entropy(
        hidden, weight, words, alpha=ALPHA, scale="sum", **options
    ).loss


def ours(logits: Tensor, words: Tensor, **options: Any) -> Tensor:
    return rdrop_cross_entropy(
        logits, words, alpha=ALPHA, scale="sum", inplace=True, **options
    ).loss


def official(logits: Tensor, words: Tensor) -> Tensor:
    return reference.official_loss(logits, words, ALPHA)


WAYS: dict[str, Loss] = {
    ONE_PASS: lambda model, x, y, words: F.cross_entropy(model(x, y), words),
    "one pass, our loss": lambda model, x, y, words: (
        rdrop_cross_entropy(model(x, y), words, alpha=0.0, num_passes=1, inplace=True).loss
    ),
    "official form, stacked": lambda model, x, y, words: official(stacked(model, x, y), words),
    "exact, stacked": lambda model, x, y, words: ours(stacked(model, x, y), words),
    "exact, fused with the last layer": fused,
    "one backward": one_backward,
    "one backward, fused with the last layer": one_backward_fused,
}
WAYS_IN_CPP: dict[str, Loss] = {
    "exact, stacked, C++": lambda model, x, y, words: ours(stacked(model, x, y), words, impl="cpp"),
    "exact, fused with the last layer, C++": partial(fused, impl="cpp"),
    "one backward, C++": partial(one_backward, impl="cpp"),
    "one backward, fused with the last layer, C++": partial(one_backward_fused, impl="cpp"),
}


def step(
    loss: Loss, model: Translator, optimizer: torch.optim.Optimizer, batch: list[Tensor], half: bool
) -> None:
    """Train by one step."""
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=half):
        value = loss(model, *batch)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(
    size: Size, half: bool, device: str, repeats: int, ways: Mapping[str, Loss] = WAYS
) -> list[Row]:
    """Measure ways of training one model."""
    torch.manual_seed(0)
    model = Translator(size.width, size.layers, size.words).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    shape = size.pairs, size.length
    batch = [torch.randint(size.words, shape, device=device) for _ in range(2)]
    batch.append(torch.randint(size.words, (size.pairs * size.length,), device=device))
    calls, failed = split_working(
        {name: partial(step, way, model, optimizer, batch, half) for name, way in ways.items()}
    )
    times = time_interleaved(calls, repeats, device)
    facts: Row = {
        **asdict(size),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "bfloat16 autocast" if half else "float32",
    }
    rows: list[Row] = []
    for name, seconds in times.items():
        row: Row = {**facts, "variant": name}
        if ONE_PASS in times:
            row["step"] = ratio(seconds, times[ONE_PASS])
        row["milliseconds"] = spread(seconds, 1e3)
        if device == "cuda":
            row["peak_mebibytes"] = peak_bytes(calls[name], device) / 2**20
        rows.append(row)
    return rows + [{**facts, "variant": name, "failed": why} for name, why in failed.items()]


COLUMNS = {
    "variant": "way",
    "step": "in single-pass steps",
    "milliseconds": "milliseconds",
    "failed": "does not run here",
}


def main() -> None:
    from rich.console import Console
    from rich.progress import track

    options = recording.parser(__doc__, repeats=3)
    arguments = recording.parse(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [SMALLEST] if arguments.quick else SIZES[device]
    ways = {**WAYS, **(WAYS_IN_CPP if can_build_cpp() else {})}
    console = Console()
    rows: list[Row] = []
    cases = [(size, half) for size in sizes for half in (False, True)]
    for size, half in track(cases, "measuring", console=console):
        found = measure(size, half, device, arguments.repeats, ways)
        title = "a training step of {parameters:,} parameters, {dtype}".format(**found[0])
        recording.show(found, COLUMNS, title, console)
        rows += found
    recording.write(rows, arguments, console)


if __name__ == "__main__":
    main()
