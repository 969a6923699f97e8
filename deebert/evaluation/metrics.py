"""The metrics, by name: how they score predictions, and what early exit changes in them, text by text.

A change of a score is the mean of one value for each text, so that tests about means apply to every metric
(risk_control.py). For the accuracy a text's value is -1, 0 or 1. For the others the identities are exact, with weights
that are estimated from the same samples. Shapes: S samples, K classes that count, C labels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.stats import pearsonr, rankdata, spearmanr
from sklearn.metrics import matthews_corrcoef

from deebert.data.label_values import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from deebert.data.tasks import Task
from deebert.utils.errors import InputError


class Changes(NamedTuple):
    """The change of a score, as the mean of values (S,) of the texts that count, none of which exceeds +-largest."""

    values: np.ndarray
    largest: float


def _correlation(function: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    """A correlation that is 0 where it is undefined: for fewer than two samples, or where all values are equal."""

    def metric(labels: np.ndarray, predicted: np.ndarray) -> float:
        if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predicted) == 0:
            return 0.0
        return function(labels, predicted).statistic

    return metric


def _columns(values: np.ndarray, classes: int) -> np.ndarray:
    """(S, K) of 0 and 1: a column for each class, from indices (S,), or as they are."""
    return values if values.ndim == 2 else np.eye(classes)[values]


def _pooled_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """F1 over all entries of arrays of 0 and 1: of one class (S,), or micro F1 of several labels (S, C)."""
    return 2 * np.sum(labels * predicted) / max(np.sum(labels) + np.sum(predicted), 1)


def _macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """The mean of the F1 of each class that occurs or is predicted."""
    classes = 1 + max(labels.max(initial=0), predicted.max(initial=0))
    labels, predicted = _columns(labels, classes), _columns(predicted, classes)
    sizes = (labels + predicted).sum(axis=0)
    each = 2 * (labels * predicted).sum(axis=0)[sizes > 0] / sizes[sizes > 0]
    return each.mean() if len(each) else 0.0


def _f1_changes(labels: np.ndarray, full: np.ndarray, early: np.ndarray, most: int) -> Changes | None:
    """Of the mean F1 of K classes, from arrays (S, K) of 0 and 1. most: how many of the K a text can change.

    F1' - F1 = E[(early - full) (2 label - F1)] / E[early + label], for each class.
    """
    sizes = (early + labels).mean(axis=0)
    if not labels.any(axis=0).all():
        return None
    f1 = 2 * (labels * full).sum(axis=0) / (labels + full).sum(axis=0)
    values = ((early - full) * (2 * labels - f1) / sizes).mean(axis=1)
    return Changes(values, np.sort((2 - f1) / sizes)[-most:].sum() / len(sizes))


def _macro_f1_changes(labels: np.ndarray, full: np.ndarray, early: np.ndarray) -> Changes | None:
    classes = 1 + max(values.max() for values in (labels, full, early))
    most = 2 if labels.ndim == 1 else labels.shape[1]  # a text leaves one class for another, or changes every label
    return _f1_changes(*(_columns(values, classes) for values in (labels, full, early)), most)


def _pooled_f1_changes(labels: np.ndarray, full: np.ndarray, early: np.ndarray) -> Changes | None:
    change = _f1_changes(*(each.reshape(-1, 1) for each in (labels, full, early)), most=1)
    return change and Changes(change.values.reshape(len(labels), -1).mean(axis=1), change.largest)


def _matthews_changes(labels: np.ndarray, full: np.ndarray, early: np.ndarray) -> Changes | None:
    """M' - M = E[(early - full) (label - tilt)] / (s s'), with the standard deviations of labels and predictions."""
    (share, spread), (before, spread_full), (after, spread_early) = ((x.mean(), x.std()) for x in (labels, full, early))
    if spread_early == 0:  # all texts get one label: M' is 0 by definition
        return None
    tilt = share + matthews_corrcoef(labels, full) * spread * (1 - before - after) / (spread_full + spread_early)
    values = (early.astype(float) - full) * (labels - tilt) / (spread * spread_early)
    return Changes(values, max(tilt, 1 - tilt) / (spread * spread_early))


def _spearman_changes(labels: np.ndarray, full: np.ndarray, early: np.ndarray) -> Changes | None:
    """Of standardised ranks r the correlation is 1 - E[(r - r')^2] / 2."""
    if np.ptp(early) == 0:
        return None
    ranks = [rankdata(values) for values in (labels, full, early)]
    label, before, after = ranks = [(r - r.mean()) / max(r.std(), 1e-12) for r in ranks]  # standardised
    largest = np.ptp(ranks) ** 2 / 2  # no two ranks are further apart, whichever of the three they are of
    return Changes(((before - label) ** 2 - (after - label) ** 2) / 2, largest)


@dataclass(frozen=True)
class Metric:
    """A score of predictions.

    score: of labels and predictions, both (S,) or (S, C), see `predictions`; of one class, (S,) of 0 and 1.
    changes: of labels, the full model's and the early predictions, where each class that counts occurs: the change of
        the score as the mean of a value for each text; None where it is undefined.
    problems: the problem types of tasks that have this metric.
    of_class: whether it is about one class; its name is followed by a colon and the class, as in "recall:urgent".
    all_classes: whether every class counts, so that a rare one needs texts enough.
    most_labels: the most labels that a task may have.
    """

    score: Callable[[np.ndarray, np.ndarray], float]
    changes: Callable[[np.ndarray, np.ndarray, np.ndarray], Changes | None]
    problems: tuple[str, ...]
    of_class: bool = False
    all_classes: bool = False
    most_labels: float = np.inf


METRICS = {
    "acc": Metric(
        lambda labels, predicted: np.mean(labels == predicted),
        lambda labels, full, early: Changes(0.0 + (early == labels) - (full == labels), 1.0),
        (SINGLE_LABEL,),
    ),
    "recall": Metric(
        lambda labels, predicted: np.sum(labels * predicted) / max(np.sum(labels), 1),
        lambda labels, full, early: Changes((early - full)[labels > 0], 1.0),
        (SINGLE_LABEL, MULTI_LABEL),
        of_class=True,
    ),
    "f1": Metric(_pooled_f1, _pooled_f1_changes, (SINGLE_LABEL, MULTI_LABEL), of_class=True),
    "f1_micro": Metric(_pooled_f1, _pooled_f1_changes, (MULTI_LABEL,)),
    "f1_macro": Metric(_macro_f1, _macro_f1_changes, (SINGLE_LABEL, MULTI_LABEL), all_classes=True),
    "mcc": Metric(matthews_corrcoef, _matthews_changes, (SINGLE_LABEL,), all_classes=True, most_labels=2),
    "spearmanr": Metric(_correlation(spearmanr), _spearman_changes, (REGRESSION,)),
    "pearson": Metric(_correlation(pearsonr), lambda labels, full, early: None, (REGRESSION,)),
}


def metric_of(name: str) -> Metric:
    """The metric of a name that may end with a class."""
    return METRICS[name.partition(":")[0]]


def with_metric(task: Task, name: str, labels: tuple[str, ...]) -> Task:
    """The task with this metric as its primary one. labels: the task's in the order of the model's outputs.

    Raises InputError where the task cannot have it.
    """
    base, _, label = name.partition(":")
    fitting = {key: m for key, m in METRICS.items() if task.problem_type in m.problems and len(labels) <= m.most_labels}
    if base not in fitting:
        raise InputError(f"metric {name}: {task.name} can have one of {', '.join(fitting)}")
    metric = fitting[base]
    if label and not metric.of_class:
        raise InputError(f"metric {name}: it is not about one class; give {base}")
    if metric.of_class and label not in (labels if label or len(labels) != 2 else ("",)):
        raise InputError(f"metric {name}: give {base}:CLASS, where CLASS is one of {', '.join(labels)}")
    return replace(task, labels=labels, metrics=(name, *(metric for metric in task.metrics if metric != name)))


def class_of(task: Task, name: str) -> int | None:
    """The index of the class that a metric is about, None where it is about all; of two, the second by default."""
    if not metric_of(name).of_class:
        return None
    _, _, label = name.partition(":")
    return task.labels.index(label) if label else 1


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


def of_metric(task: Task, name: str, values: np.ndarray) -> np.ndarray:
    """Labels or predictions as a metric's functions take them: of one class, (S,) of 0 and 1, else as they are."""
    index = class_of(task, name)
    if index is None:
        return values
    return (values == index).astype(float) if values.ndim == 1 else values[:, index]


def score(task: Task, name: str, labels: np.ndarray, predicted: np.ndarray) -> float:
    """One metric of labels and predictions, both (S,) or (S, C)."""
    return float(metric_of(name).score(*(of_metric(task, name, x) for x in (labels, predicted))))


def scores(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics, the primary one first, of logits (S, C) against labels (S,) or (S, C)."""
    predicted = predictions(logits, task.several_labels)
    return {name: score(task, name, labels, predicted) for name in task.metrics}


def primary_score(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """The task's primary metric, of arrays as for `scores`."""
    return score(task, task.primary_metric, labels, predictions(logits, task.several_labels))


def changes(task: Task, labels: np.ndarray, full: np.ndarray, early: np.ndarray) -> Changes | None:
    """What early exit changes in the task's primary metric, from labels and predictions, see `Metric.changes`."""
    name = task.primary_metric
    return metric_of(name).changes(*(of_metric(task, name, x) for x in (labels, full, early)))


def counted_classes(task: Task, labels: np.ndarray) -> dict[int, int]:
    """How many samples have each class whose frequency matters to the primary metric; {} where none does."""
    index, all_classes = class_of(task, task.primary_metric), metric_of(task.primary_metric).all_classes
    counted = range(task.num_labels) if all_classes else [] if index is None else [index]
    return {i: int(np.sum(labels[:, i] if labels.ndim == 2 else labels == i)) for i in counted}


def class_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each class (C,), NaN for those that neither occur nor are predicted.

    Arguments as for `correct`.
    """
    each = (_columns(values, logits.shape[1]) for values in (labels, predictions(logits, labels.ndim == 2)))
    labels, predicted = each
    right, texts, sizes = (values.sum(axis=0) for values in (labels * predicted, labels, predicted))
    counted = np.where(texts + sizes > 0, right, np.nan)
    shares = {"precision": sizes, "recall": texts, "f1": (texts + sizes) / 2}
    return {name: counted / np.where(total > 0, total, 1) for name, total in shares.items()}


def majority(labels: np.ndarray) -> tuple[int, float]:
    """The most frequent label of (S,) or (S, C), and the score of always predicting it: accuracy, or micro F1."""
    counts = np.bincount(labels) if labels.ndim == 1 else labels.sum(axis=0)
    label = int(counts.argmax())
    return label, float(2 * counts[label] / (counts.sum() + len(labels)))  # with one label a text F1 is the accuracy


def exits_at_chance(logits: np.ndarray, labels: np.ndarray) -> list[int]:
    """The exits, from 0, of logits (S, E, C), that score no better than always predicting the most frequent label."""
    _, chance = majority(labels)
    name = "acc" if labels.ndim == 1 else "f1_micro"
    each = [METRICS[name].score(labels, predictions(logits[:, i], labels.ndim == 2)) for i in range(logits.shape[1])]
    return [i for i, score in enumerate(each) if score <= chance]
