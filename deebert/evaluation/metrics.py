"""The tasks' metrics, from logits and labels; scikit-learn and scipy compute them."""

from collections.abc import Callable

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import matthews_corrcoef

from deebert.data.tasks import Task


def _correlation(function: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    """A correlation that is 0 where it is undefined: for fewer than two samples, or where all values are equal."""

    def metric(labels: np.ndarray, predictions: np.ndarray) -> float:
        if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return function(labels, predictions).statistic

    return metric


# Name -> function of labels (S,) and predictions (S,). A name is a column of the result files.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    # sklearn checks its input for longer than it counts, and thresholds are chosen by thousands of scores
    "acc": lambda labels, predicted: np.mean(labels == predicted),
    "f1": lambda labels, predicted: 2 * np.sum(labels * predicted) / max(np.sum(labels) + np.sum(predicted), 1),
    "mcc": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
}


def predictions(logits: np.ndarray) -> np.ndarray:
    """The predictions (...) of logits (..., C): label indices, or the values themselves where C is 1 (regression)."""
    return logits[..., 0] if logits.shape[-1] == 1 else logits.argmax(axis=-1)


def scores(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics, the primary one first, of logits (S, C) against labels (S,)."""
    predicted = predictions(logits)
    return {name: float(METRICS[name](labels, predicted)) for name in task.metrics}


def primary_score(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """The task's primary metric, see `scores`."""
    name = task.primary_metric
    return float(METRICS[name](labels, predictions(logits)))
