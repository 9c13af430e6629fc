"""Loss curves of the ways to compute the loss: the section "training" of `gpu.py`.

An encoder-decoder reads 32 words of this repository's documents and sources and says the next 32,
in bfloat16. All ways begin with the same weights and have the same batches and dropout masks; one
more run has another seed, which tells how far apart curves are anyway.
"""

import re
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench_step import Translator, stacked
from gpu_findings import Findings, UnavailableError
from recording import ROOT
from regdrop import (
    RDropOutput,
    linear_rdrop_cross_entropy,
    rdrop_cross_entropy,
    repeat_batch,
)

ALPHA, HALF, PAIRS, WIDTH, LAYERS = 1.0, 32, 64, 256, 3
LEARNING_RATE, WARMUP, STEPS = 5e-4, 50, 400
# Steps whose mean is kept; of the first and the last quarter curves are compared.
KEPT_EVERY = 10
# Means that tell anything of a curve.
FEWEST = 10
# Apart in the likelihood's term: at first, where only rounding differs, and in the end.
FIRST, LAST = 0.01, 0.03
DEFINITION, AGAIN = "eager", "eager, another seed"
Way = Callable[[Translator, Tensor, Tensor, Tensor], RDropOutput]


def explicit(
    model: Translator, source: Tensor, target: Tensor, words: Tensor, **options: Any
) -> RDropOutput:
    return rdrop_cross_entropy(stacked(model, source, target), words, alpha=ALPHA, **options)


def fused(model: Translator, source: Tensor, target: Tensor, words: Tensor) -> RDropOutput:
    hidden = model.hidden(*(repeat_batch(x, 2) for x in (source, target)))
    weight = model.embedding.weight
    return linear_rdrop_cross_entropy(hidden.flatten(0, 1), weight, words, alpha=ALPHA)


WAYS: dict[str, Way] = {
    DEFINITION: partial(explicit, impl="eager"),
    "auto, in place": partial(explicit, inplace=True),
    "fused": fused,
    AGAIN: partial(explicit, impl="eager"),
}


def run(findings: Findings) -> None:
    words = read_words()  # once: files may change
    seconds = 0.85 * findings.seconds_left / len(WAYS)
    curves: dict[str, list[float]] = {}
    for name, way in WAYS.items():
        train = partial(fit, findings, name, way, words, seconds, curves)
        findings.check(f"training, {name}", train)
    for name in WAYS:
        if name not in (DEFINITION, AGAIN):
            findings.check(f"training, {name} is as {DEFINITION}", partial(compare, curves, name))


def read_words() -> tuple[Tensor, int]:
    """Return the words of documents and sources as numbers, (n,), and how many there are."""
    files = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py")])
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    words = re.findall(r"\w+|[^\w\s]|\n", text)
    numbers = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}
    return torch.tensor([numbers[word] for word in words]), -(-len(numbers) // 64) * 64


def fit(
    findings: Findings,
    name: str,
    way: Way,
    text: tuple[Tensor, int],
    seconds: float,
    curves: dict[str, list[float]],
) -> str:
    """Train for so many steps or seconds, and keep the curve."""
    device = findings.device
    width, layers, pairs, steps = (
        (32, 1, 4, 20) if findings.quick else (WIDTH, LAYERS, PAIRS, STEPS)
    )
    words, vocabulary = text
    seed = 1 if name == AGAIN else 0
    torch.manual_seed(seed)
    model = Translator(width, layers, vocabulary).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    warmup = min(WARMUP, steps // 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / warmup))
    order = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(words) - 2 * HALF, (steps, pairs), generator=order)
    batches = words[starts[..., None] + torch.arange(2 * HALF)].to(device)
    parts: list[Tensor] = []
    for i, batch in enumerate(batches):
        source, target, said = batch[:, :HALF], batch[:, HALF - 1 : -1], batch[:, HALF:]
        with torch.autocast(device, torch.bfloat16):
            output = way(model, source, target, said.flatten())
        output.loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        parts.append(torch.stack([output.nll, output.kl]))
        if i == 0:
            parts[-1].tolist()  # the first step compiles
            start = time.monotonic()
        if i % KEPT_EVERY == KEPT_EVERY - 1:
            parts[-1].tolist()  # waits, so that the time is that of the device too
            if time.monotonic() - start > seconds:
                break
    taken = time.monotonic() - start
    means = torch.stack(parts)[: len(parts) // KEPT_EVERY * KEPT_EVERY]
    means = means.view(-1, KEPT_EVERY, 2).mean(1).cpu()
    if len(means) < (2 if findings.quick else FEWEST):
        raise UnavailableError(f"the time was enough for {len(parts)} steps alone")
    curves[name] = means[:, 0].tolist()
    findings.add(
        [
            {"variant": name, "step": (i + 1) * KEPT_EVERY, "nll": nll, "kl": kl}
            for i, (nll, kl) in enumerate(means.tolist())
        ]
    )
    assert means.isfinite().all(), "the loss is not finite"
    assert means[:, 1].min() > 0, "the passes do not differ"
    first, last = curves[name][0], curves[name][-1]
    assert last < first, f"nll went from {first:.3f} to {last:.3f}"
    return (
        f"nll {first:.3f} to {last:.3f}, kl {means[-1, 1]:.3f}, {len(parts)} steps of "
        f"{taken / max(1, len(parts) - 1) * 1e3:.1f} ms, {vocabulary:,} words"
    )


def compare(curves: dict[str, list[float]], name: str) -> str:
    """Compare a curve with that of the definition: alike at first, and no worse in the end."""
    missing = [n for n in (name, DEFINITION, AGAIN) if n not in curves]
    if missing:
        raise UnavailableError(f"there is no curve of {' and '.join(missing)}")
    length = min(map(len, curves.values()))
    own, definition, again = (torch.tensor(curves[n][:length]) for n in (name, DEFINITION, AGAIN))
    quarter = max(1, length // 4)
    first = ((own - definition) / definition)[:quarter].abs().max().item()
    last, seeds = (
        (other[-quarter:].mean() / definition[-quarter:].mean() - 1).item()
        for other in (own, again)
    )
    assert first <= FIRST, f"the first quarter is {first:.2%} apart"
    assert abs(last) <= max(LAST, 2 * abs(seeds)), f"the last quarter is {last:+.2%} apart"
    return f"first quarter {first:.3%} apart, last {last:+.2%}; another seed {seeds:+.2%}"
