"""What other implementations call alpha, in the paper's terms (docs/other-implementations.md)."""

from collections.abc import Callable
from typing import NamedTuple


class Convention(NamedTuple):
    """How one implementation weighs the KL.

    Attributes:
        loss: Its loss; CE are means over the batch where nothing else is said.
        needs: What the conversion depends on: "items" (batch size, or target tokens of the
            batch), "num_classes" (or labels), or nothing.
        to_paper: From its coefficient and that number to the paper's alpha.
        layout: How its rows are stacked, where that is not in blocks, one a pass.
        note: What else has to change.
    """

    loss: str
    needs: str | None
    to_paper: Callable[[float, float], float]
    layout: str | None = None
    note: str | None = None


_INTERLEAVED = "rows x0 x0 x1 x1: give the losses here torch.cat([logits[::2], logits[1::2]])"

CONVENTIONS = {
    "paper": Convention("CE1 + CE2 + a (KL1 + KL2)/2", None, lambda a, n: a),
    "official-translation": Convention(
        "CE1 + CE2 + a (KL1 + KL2)/2, summed, over the tokens", None, lambda a, n: a
    ),
    "official-readme": Convention(
        "(CE1 + CE2)/2 + a (KL1 + KL2)/2 summed over the batch", "items", lambda a, n: 2 * a * n
    ),
    "official-bert": Convention(
        "CE1 + CE2 + a (KL1 + KL2)/2 summed over the batch", "items", lambda a, n: a * n
    ),
    "official-vit": Convention(
        "CE1 + CE2 + a (KL1 + KL2) summed over the batch", "items", lambda a, n: 2 * a * n
    ),
    "fairseq": Convention(
        "CE1 + CE2 + a (KL1 + KL2)/2, summed, over the tokens (--rdrop-alpha)",
        None,
        lambda a, n: a,
        note="its label smoothing e is e * V / (V - 1) here, V the size of the vocabulary",
    ),
    "paddlenlp": Convention(
        "(CE1 + CE2)/2 + a (KL1 + KL2)/2 summed over the batch (RDropLoss)",
        "items",
        lambda a, n: 2 * a * n,
    ),
    "bert4keras": Convention(
        "(CE1 + CE2)/2 + a/4 (KL1 + KL2) as a mean over the batch",
        None,
        lambda a, n: a,
        _INTERLEAVED,
    ),
    "bert4torch": Convention(
        "(CE1 + CE2)/2 + a/4 (KL1 + KL2) as a mean over batch and classes",
        "num_classes",
        lambda a, n: a / n,
        _INTERLEAVED,
    ),
    "batchmean": Convention(
        "(CE1 + CE2)/2 + a (KL1 + KL2)/2 as a mean over items", None, lambda a, n: 2 * a
    ),
    "batchmean-unhalved": Convention(
        "(CE1 + CE2)/2 + a (KL1 + KL2) as a mean over items", None, lambda a, n: 4 * a
    ),
    "element-mean": Convention(
        "(CE1 + CE2)/2 + a (KL1 + KL2)/2 as a mean over items and classes",
        "num_classes",
        lambda a, n: 2 * a / n,
    ),
    "multi-label": Convention(
        "(BCE1 + BCE2)/2 as a mean over items and labels + a (KL1 + KL2)/2 summed over the labels",
        "num_classes",
        lambda a, n: 2 * a * n,
    ),
    "regression": Convention(
        "(MSE1 + MSE2)/2 + a MSE between the passes", None, lambda a, n: 2 * a
    ),
    "cr-ctc": Convention(
        "(CTC1 + CTC2)/2 + a (KL1 + KL2)/2, each KL with one side detached",
        None,
        lambda a, n: a,
        note="this alpha has about its gradient; the value of its loss is that of twice as much",
    ),
}
_WITHOUT_EQUIVALENT = {
    "official-roberta": "its loss holds half of one NLL only: no alpha gives the same loss"
}


def convert_alpha(
    value: float,
    convention: str,
    *,
    batch_size: int | None = None,
    tokens: int | None = None,
    num_classes: int | None = None,
) -> float:
    """Return the paper's alpha for another implementation's coefficient.

    Args:
        value: The coefficient in the other implementation.
        convention: Its name, one of `CONVENTIONS`.
        batch_size: Samples of its micro-batch, before they are doubled.
        tokens: Target tokens of its micro-batch, for token tasks, instead of batch_size.
        num_classes: Number of classes or labels, or vocabulary size.

    Raises:
        ValueError: For an unknown convention, one without equivalent, or a number that is
            missing or below 1.
    """
    if convention in _WITHOUT_EQUIVALENT:
        raise ValueError(f"{convention} has no equivalent: {_WITHOUT_EQUIVALENT[convention]}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {sorted(CONVENTIONS)}, got {convention!r}")
    if value < 0:
        raise ValueError(f"value must be at least 0, got {value}")
    for name, number in (
        ("batch_size", batch_size),
        ("tokens", tokens),
        ("num_classes", num_classes),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    found = CONVENTIONS[convention]
    if found.needs is None:
        return found.to_paper(value, 1)
    number = num_classes if found.needs == "num_classes" else (tokens or batch_size)
    if number is None:
        wanted = "num_classes" if found.needs == "num_classes" else "batch_size (or tokens)"
        raise ValueError(f"{convention} needs {wanted}: {found.loss}")
    return found.to_paper(value, number)
