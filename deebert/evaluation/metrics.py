"""The tasks' metrics, from logits and labels; scikit-learn and scipy compute them."""

from collections.abc import Callable

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from deebert.data.tasks import Task


def _correlation(function: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    """A correlation that is 0 where it is undefined: for fewer than two samples, or where all values are equal."""

    def metric(labels: np.ndarray, predictions: np.ndarray) -> float:
        if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return function(labels, predictions).statistic

    return metric


def _micro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """F1 over all labels of all samples, (S, C) of 0 and 1; 0 where there are none. Fast, as `acc` is."""
    count = labels.sum() + predicted.sum()
    return 2 * np.sum(labels * predicted) / count if count else 0.0


def _macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """The mean of the F1 of each label that occurs or is predicted."""
    if labels.ndim == 1:
        return f1_score(labels, predicted, average="macro", zero_division=0)
    present = np.flatnonzero(labels.any(axis=0) | predicted.any(axis=0))
    return f1_score(labels[:, present], predicted[:, present], average="macro", zero_division=0) if len(present) else 0


# Name -> function of labels and predictions, both (S,) or (S, C). A name is a column of the result files.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    # sklearn checks its input for longer than it counts, and thresholds are chosen by thousands of scores
    "acc": lambda labels, predicted: np.mean(labels == predicted),
    "f1": lambda labels, predicted: 2 * np.sum(labels * predicted) / max(np.sum(labels) + np.sum(predicted), 1),
    "f1_micro": _micro_f1,
    "f1_macro": _macro_f1,
    "mcc": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
}


def predictions(logits: np.ndarray, several_labels: bool = False) -> np.ndarray:
    """The predictions (...) of logits (..., C): label indices, or the values themselves where C is 1 (regression).

    several_labels: (..., C) of 0 and 1, where a sample has the labels with a probability above 0.5.
    """
    if several_labels:
        return (logits > 0).astype(np.float32)
    return logits[..., 0] if logits.shape[-1] == 1 else logits.argmax(axis=-1)


def correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(S,) bool of logits (S, C) and labels (S,); of several labels, (S, C), all have to be right."""
    right = predictions(logits, labels.ndim == 2) == labels
    return right.all(axis=-1) if labels.ndim == 2 else right


def scores(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics, the primary one first, of logits (S, C) against labels (S,) or (S, C)."""
    predicted = predictions(logits, task.several_labels)
    return {name: float(METRICS[name](labels, predicted)) for name in task.metrics}


def primary_score(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """The task's primary metric, see `scores`."""
    name = task.primary_metric
    return float(METRICS[name](labels, predictions(logits, task.several_labels)))


def class_f1(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """F1 of each class (C,), 0 for those that neither occur nor are predicted, and macro F1, the mean of the others.

    Arguments as for `correct`.
    """
    predicted = predictions(logits, labels.ndim == 2)
    each = f1_score(labels, predicted, labels=np.arange(logits.shape[1]), average=None, zero_division=0)
    return each, float(METRICS["f1_macro"](labels, predicted))


def majority(labels: np.ndarray) -> tuple[int, float]:
    """The most frequent label of (S,) or (S, C), and the score of always predicting it: accuracy, or micro F1."""
    if labels.ndim == 1:
        counts = np.bincount(labels)
        return int(counts.argmax()), float(counts.max() / len(labels))
    label = int(labels.sum(axis=0).argmax())
    constant = np.zeros_like(labels)
    constant[:, label] = 1
    return label, float(_micro_f1(labels, constant))


def exits_at_chance(logits: np.ndarray, labels: np.ndarray) -> list[int]:
    """The exits, from 0, of logits (S, E, C), that score no better than always predicting the most frequent label."""
    _, chance = majority(labels)
    name = "acc" if labels.ndim == 1 else "f1_micro"
    each = [METRICS[name](labels, predictions(logits[:, i], labels.ndim == 2)) for i in range(logits.shape[1])]
    return [i for i, score in enumerate(each) if score <= chance]
