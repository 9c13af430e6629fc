"""What a step costs where the part of a model without dropout is computed once.

    python benchmarks/bench_shared_prefix.py            # some minutes
    python benchmarks/bench_shared_prefix.py --quick    # to see that it runs

A convolutional trunk with frozen BatchNorm, and a head with dropout: EfficientNet-Lite0 where its
package is installed, else a small network. A step is forward, loss, backward and SGD. Every way
runs in turn; ratios to the step of one pass are taken round by round.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import recording
from measuring import ratio
from recording import Row
from regdrop import rdrop_cross_entropy, repeat_batch, share_prefix
from regdrop.prefix_search import suggest_prefix

CLASSES = 100
WAYS = {"one pass": 1, "two passes": 2, "two passes, trunk once": 2}


class Trunk(nn.Module):
    """A network's features."""

    def __init__(self, network: nn.Module, extract: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.extract = network, extract

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (batch, channels, height, width)."""
        return self.extract(x)

    def train(self, mode: bool = True) -> "Trunk":
        """Set the mode; BatchNorm stays frozen."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def build() -> tuple[str, nn.Module]:
    """Return a trunk and a head, and their name."""
    torch.manual_seed(0)
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        widths = (3, 32, 64, 128, 256)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        network = nn.Sequential(*layers)
        name, channels, trunk = "small network", widths[-1], Trunk(network, network)
    else:
        network = EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0.0)
        # Its own classifier is not part of the features.
        network._dropout = network._fc = nn.Identity()
        name, channels, trunk = "EfficientNet-Lite0", 1280, Trunk(network, network.extract_features)
    head = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, CLASSES)
    )
    model = nn.Sequential()
    model.add_module("features", trunk)
    model.add_module("head", head)
    return name, model.train()


def measure(model: nn.Module, way: str, x: Tensor, y: Tensor, steps: int) -> tuple[float, float]:
    """Return the median seconds of a step, and the loss of the first."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    num_passes, times, losses = WAYS[way], [], []
    is_shared = way.endswith("once")
    handle = share_prefix(model, "features", num_passes=num_passes) if is_shared else nullcontext()
    torch.manual_seed(1)
    with handle:
        # The first step warms up, and is checked.
        for _ in range(steps + 1):
            start = time.perf_counter()
            logits = model(repeat_batch(x, num_passes))
            alpha = 1.0 if num_passes > 1 else 0.0
            loss = rdrop_cross_entropy(logits, y, alpha=alpha, num_passes=num_passes).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), losses[0]


COLUMNS = {"variant": "way", "step": "in single-pass steps", "loss": "first loss"}


def main() -> None:
    options = recording.parser(__doc__, repeats=3)
    arguments = recording.parse(options)
    steps, size = 3, 16
    if arguments.quick:
        steps, size = 1, 2
    console = Console()
    name, model = build()
    x, y = torch.randn(size, 3, 224, 224), torch.randint(CLASSES, (size,))
    suggestion = suggest_prefix(model, [x[:1]])
    if suggestion is None or suggestion.until != "features":
        raise RuntimeError(f"the trunk should be what can be shared, got {suggestion}")
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in track(range(arguments.repeats), "measuring", console=console):
        for way in WAYS:
            found[way].append(measure(model, way, x, y, steps))
    seconds = {way: [time for time, _ in pairs] for way, pairs in found.items()}
    rows: list[Row] = [
        {
            "variant": way,
            "step": ratio(seconds[way], seconds["one pass"]),
            "loss": found[way][0][1],
        }
        for way in WAYS
    ]
    recording.show(rows, COLUMNS, f"{name}, batch {size}", console)
    console.print(f"By operations the trunk computed once makes {2 - suggestion.share:.2f}x.")
    facts = {"model": name, "batch": size, "steps": steps, "share": suggestion.share}
    recording.write(rows, arguments, console, **facts)


if __name__ == "__main__":
    main()
