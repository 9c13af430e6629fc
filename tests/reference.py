"""The R-Drop loss as slow float64 loops written from the paper's formulas, and the official form.

Everything here is independent of the library, and the benchmarks compare with it too.
"""

import math
from itertools import combinations

import torch.nn.functional as F
from torch import Tensor


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    exps = [math.exp(z - top) for z in row]
    return [e / sum(exps) for e in exps]


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    log_sum = math.log(sum(math.exp(z - top) for z in row))
    return [z - top - log_sum for z in row]


def kl(p_row: list[float], q_row: list[float]) -> float:
    p, log_p, log_q = softmax(p_row), log_softmax(p_row), log_softmax(q_row)
    return sum(
        pv * (lp - lq) for pv, lp, lq in zip(p, log_p, log_q, strict=True) if lp != -math.inf
    )


def symmetric_kl(rows: list[list[float]]) -> float:
    pairs = list(combinations(rows, 2))
    return sum((kl(a, b) + kl(b, a)) / 2 for a, b in pairs) / len(pairs) if pairs else 0.0


def likelihood(row: list[float], distribution: list[float], weight: list[float]) -> float:
    log_p = log_softmax(row)
    return -sum(w * t * lp for w, t, lp in zip(weight, distribution, log_p, strict=True) if t)


def rdrop_items(
    logits: Tensor,
    target: Tensor,
    *,
    num_passes: int = 2,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    unlabelled_index: int | None = None,
    label_smoothing: float = 0.0,
) -> list[tuple[float, float, float]]:
    """Return (nll, kl, weight in the mean) of every valid item."""
    num_classes = logits.shape[-1]
    passes = logits.double().reshape(num_passes, -1, num_classes).tolist()
    weights = [1.0] * num_classes if weight is None else weight.double().tolist()
    flat = (
        target.reshape(-1, num_classes) if target.is_floating_point() else target.reshape(-1)
    ).tolist()
    items = []
    for n, item in enumerate(flat):
        if isinstance(item, list):
            distribution, item_weight = item, 1.0
        elif item == ignore_index:
            continue
        elif item == unlabelled_index:
            distribution, item_weight = [0.0] * num_classes, 0.0
        else:
            distribution = [float(v == item) for v in range(num_classes)]
            item_weight = weights[item]
        share = label_smoothing / num_classes if any(distribution) else 0.0
        smoothed = [(1 - label_smoothing) * t + share for t in distribution]
        rows = [p[n] for p in passes]
        nll = sum(likelihood(row, smoothed, weights) for row in rows) / num_passes
        items.append((nll, symmetric_kl(rows), item_weight))
    return items


def rdrop_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    num_passes: int = 2,
    reduction: str = "mean",
    scale: str = "mean",
    num_items: float | None = None,
    num_weight: float | None = None,
    **options: object,
) -> float:
    items = rdrop_items(logits, target, num_passes=num_passes, **options)  # type: ignore[arg-type]
    nll = sum(item[0] for item in items)
    divergence = sum(item[1] for item in items)
    if reduction == "mean":
        if num_weight is None:
            num_weight = sum(item[2] for item in items) if num_items is None else num_items
            num_weight = num_weight or 1.0  # nothing is labelled: a sum of 0
        nll /= num_weight
        divergence /= len(items) if num_items is None else num_items
    total = num_passes * nll + alpha * divergence
    return total / num_passes if scale == "mean" else total


def official_loss(logits: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Return the loss by `log_softmax`, `softmax` and `kl_div`, as public implementations do."""
    p, q = logits.chunk(2)
    likelihoods = F.cross_entropy(p, target) + F.cross_entropy(q, target)
    p_loss = F.kl_div(F.log_softmax(p, -1), F.softmax(q, -1), reduction="none").sum(-1)
    q_loss = F.kl_div(F.log_softmax(q, -1), F.softmax(p, -1), reduction="none").sum(-1)
    return likelihoods + alpha * (p_loss + q_loss).mean() / 2
