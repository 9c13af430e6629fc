"""What classifiers of images and of text share: dropout rates, statistics of examples, metrics."""

from typing import Any

import numpy as np

LABEL, PREDICTION, NLL = range(3)


def dropout_names(config: Any) -> list[str]:
    """Return the names of the dropout rates of a Hugging Face configuration.

    Those of whole paths, stochastic depth, count where there is no other.
    """
    rates = [
        name
        for name, value in vars(config).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    of_units = [name for name in rates if "dropout" in name or name.endswith("pdrop")]
    return of_units or [name for name in rates if "drop_path" in name]


def set_dropout(config: Any, rate: float) -> None:
    """Set every dropout rate of a Hugging Face configuration.

    Raises:
        ValueError: If it has none and `rate` is above 0.
    """
    names = dropout_names(config)
    if not names and rate > 0:
        raise ValueError(
            f"{type(config).__name__} has no dropout rate to set to {rate}; "
            "R-Drop needs a model with dropout"
        )
    for name in names:
        setattr(config, name, rate)


def classification_statistics(prediction: Any) -> np.ndarray:
    """Return label, predicted class and NLL of each example, (N, 3)."""
    from scipy.special import log_softmax

    logits = prediction.predictions
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float64)
    labels = np.asarray(prediction.label_ids, dtype=np.int64)
    log_p = log_softmax(logits, axis=-1)
    return np.stack([labels, logits.argmax(-1), -log_p[np.arange(len(labels)), labels]], axis=1)


def accuracy(statistics: np.ndarray) -> float:
    """Return the part of the examples whose prediction is their label."""
    return float((statistics[:, PREDICTION] == statistics[:, LABEL]).mean())


def nll(statistics: np.ndarray) -> float:
    """Return the mean NLL, in nats."""
    return float(statistics[:, NLL].mean())
