"""The eight tasks of GLUE that the paper reports: their columns, labels, sizes and metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from regdrop.tasks.common.base import Metric
from regdrop.tasks.common.classification import LABEL, NLL, PREDICTION, accuracy, nll

MetricFunction = Callable[[np.ndarray], float]


def matthews_correlation(statistics: np.ndarray) -> float:
    """Return Matthews' correlation of labels and predictions; 0 where either are all the same.

    Of two classes it is Pearson's correlation of their numbers.
    """
    return _correlation(statistics[:, LABEL], statistics[:, PREDICTION])


def f1(statistics: np.ndarray) -> float:
    """Return the F1 of class 1; 0 where it is neither a label nor a prediction."""
    # A count, as scikit-learn's checks would take most of the time of a bootstrap.
    label, prediction = (statistics[:, column] == 1 for column in (LABEL, PREDICTION))
    either = label.sum() + prediction.sum()
    return float(2 * (label & prediction).sum() / either) if either else 0.0


def pearson(statistics: np.ndarray) -> float:
    """Return Pearson's correlation; 0 where the predictions are all the same."""
    return _correlation(statistics[:, LABEL], statistics[:, PREDICTION])


def spearman(statistics: np.ndarray) -> float:
    """Return Spearman's rank correlation; 0 where the predictions are all the same."""
    from scipy.stats import rankdata

    return _correlation(rankdata(statistics[:, LABEL]), rankdata(statistics[:, PREDICTION]))


def mean_squared_error(statistics: np.ndarray) -> float:
    """Return the mean squared difference of scores and predictions."""
    return float(statistics[:, NLL].mean())


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE.

    Attributes:
        title: Its name as papers write it.
        sentences: Columns of its text: one sentence or a pair.
        labels: Names of the classes, in the order of the hub's numbers; none for a score.
        metrics: How its metrics are computed from rows of label, prediction and loss; the first
            selects checkpoints.
        train_size: Examples of its training split.
        batch_size: Batch of the paper.
        tests: From the names of tested splits to those of the data set.
    """

    title: str
    sentences: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: Mapping[str, MetricFunction]
    train_size: int
    batch_size: int
    tests: Mapping[str, str]

    @property
    def is_regression(self) -> bool:
        """Whether it predicts a score."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Number of the model's outputs."""
        return max(1, len(self.labels))


METRICS = {
    "matthews_correlation": Metric("Matthews", greater_is_better=True, percent=True),
    "accuracy": Metric("accuracy (%)", greater_is_better=True, percent=True),
    "f1": Metric("F1", greater_is_better=True, percent=True),
    "pearson": Metric("Pearson", greater_is_better=True, percent=True),
    "spearman": Metric("Spearman", greater_is_better=True, percent=True),
    "nll": Metric("NLL", greater_is_better=False),
    "mse": Metric("MSE", greater_is_better=False),
}

_MATTHEWS = {"matthews_correlation": matthews_correlation, "accuracy": accuracy, "nll": nll}
_ACCURACY = {"accuracy": accuracy, "nll": nll}
_F1 = {"accuracy": accuracy, "f1": f1, "nll": nll}
_SCORE = {"pearson": pearson, "spearman": spearman, "mse": mean_squared_error}
_PAIR = ("sentence1", "sentence2")
# GLUE keeps the labels of its test splits: what is reported is the validation split.
_TEST = {"test": "validation"}
_MNLI_TESTS = {"test": "validation_matched", "mismatched": "validation_mismatched"}

_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")

GLUE = {
    "cola": GlueTask(
        "CoLA", ("sentence",), ("unacceptable", "acceptable"), _MATTHEWS, 8_551, 16, _TEST
    ),
    "mnli": GlueTask("MNLI", ("premise", "hypothesis"), _MNLI, _ACCURACY, 392_702, 32, _MNLI_TESTS),
    "mrpc": GlueTask("MRPC", _PAIR, ("not_equivalent", "equivalent"), _F1, 3_668, 16, _TEST),
    "qnli": GlueTask("QNLI", ("question", "sentence"), _ENTAILMENT, _ACCURACY, 104_743, 32, _TEST),
    "qqp": GlueTask(
        "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), _F1, 363_846, 32, _TEST
    ),
    "rte": GlueTask("RTE", _PAIR, _ENTAILMENT, _ACCURACY, 2_490, 8, _TEST),
    "sst2": GlueTask(
        "SST-2", ("sentence",), ("negative", "positive"), _ACCURACY, 67_349, 32, _TEST
    ),
    "stsb": GlueTask("STS-B", _PAIR, (), _SCORE, 5_749, 16, _TEST),
}
