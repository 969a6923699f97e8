"""Scores are the libraries' scores; a change of a score is the mean of what changes for each text."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn import metrics as sklearn_metrics

from deebert.data.tasks import TASKS
from deebert.evaluation.metrics import changes, counted_classes, metric_of, of_metric, score, scores, with_metric
from deebert.utils.errors import InputError

TWO, NUMBERS = TASKS["SST-2"], TASKS["STS-B"]
FIVE = replace(TWO, labels=tuple("abcde"))
SEVERAL = replace(FIVE, several_labels=True)
CASES = [
    *((TWO, name) for name in ("acc", "f1", "f1:0", "recall", "recall:0", "f1_macro", "mcc")),
    *((FIVE, name) for name in ("acc", "f1:c", "recall:c", "f1_macro")),
    *((SEVERAL, name) for name in ("f1_micro", "f1_macro", "f1:c", "recall:c")),
    (NUMBERS, "spearmanr"),
]


def noisy(values: np.ndarray, task, rng: np.random.Generator) -> np.ndarray:
    """The values, with errors."""
    if not task.labels:
        return np.round(values + rng.normal(scale=0.7, size=len(values)), 1)  # with ties
    wrong = rng.random(values.shape) < 0.3
    return np.where(wrong, 1 - values if task.several_labels else rng.integers(0, task.num_labels, len(values)), values)


def made_up(task, seed: int = 0, samples: int = 300) -> list[np.ndarray]:
    """Labels, full and early predictions."""
    rng = np.random.default_rng(seed)
    if task.several_labels:
        labels = (rng.random((samples, task.num_labels)) < 0.3).astype(float)
    else:
        labels = (
            rng.integers(0, task.num_labels, samples) if task.labels else np.round(rng.normal(size=samples) * 2) / 2
        )
    full = noisy(labels, task, rng)
    return [labels, full, noisy(full, task, rng)]


@pytest.mark.parametrize(("task", "name"), CASES, ids=lambda case: getattr(case, "name", case))
def test_a_change_is_the_mean_of_the_texts_changes(task, name):
    for seed in range(5):
        data = made_up(task, seed)
        task = replace(task, metrics=(name,))
        labels, full, early = (of_metric(task, name, values) for values in data)
        metric = metric_of(name)
        change = changes(task, *data)
        assert change.values.mean() == pytest.approx(metric.score(labels, early) - metric.score(labels, full))
        assert np.abs(change.values).max() <= change.largest + 1e-9


def test_no_change_of_a_rank_exceeds_the_largest():
    """A number that the full model gives to one text only is an outlier among its ranks."""
    labels = np.arange(100.0)
    change = changes(NUMBERS, labels, labels == 50, labels)
    assert 40 < np.abs(change.values).max() <= change.largest


def test_scores_are_those_of_the_libraries():
    labels, predicted, _ = made_up(FIVE)
    logits = np.eye(5)[predicted]
    each = sklearn_metrics.f1_score(labels, predicted, average=None)
    recall = sklearn_metrics.recall_score(labels, predicted, average=None)
    task = replace(FIVE, metrics=("acc", "f1_macro", "f1:d", "recall:d"))
    expected = {"acc": (labels == predicted).mean(), "f1_macro": each.mean(), "f1:d": each[3], "recall:d": recall[3]}
    assert scores(task, logits, labels) == pytest.approx(expected)
    labels, predicted, _ = made_up(SEVERAL)
    assert score(SEVERAL, "f1_micro", labels, predicted) == pytest.approx(
        sklearn_metrics.f1_score(labels, predicted, average="micro")
    )
    labels, predicted, _ = made_up(TWO)
    assert score(TWO, "mcc", labels, predicted) == pytest.approx(sklearn_metrics.matthews_corrcoef(labels, predicted))
    labels, predicted, _ = made_up(NUMBERS)
    assert score(NUMBERS, "spearmanr", labels, predicted) == spearmanr(labels, predicted).statistic


def test_a_metric_is_the_first_of_its_task_and_knows_its_class():
    assert with_metric(TASKS["MRPC"], "acc", ("0", "1")).metrics == ("acc", "f1")
    assert with_metric(FIVE, "f1:b", FIVE.labels).metrics == ("f1:b", "acc")
    swapped = with_metric(FIVE, "recall:b", ("b", "a", "c", "d", "e"))  # the order of a model's outputs
    assert of_metric(swapped, "recall:b", np.array([0, 1])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        (TWO, "bleu", "can have one of acc, recall, f1, f1_macro, mcc"),
        (FIVE, "mcc", "can have one of acc, recall, f1, f1_macro$"),
        (SEVERAL, "acc", "can have one of recall, f1, f1_micro, f1_macro"),
        (NUMBERS, "acc", "can have one of spearmanr, pearson"),
        (FIVE, "f1", "give f1:CLASS, where CLASS is one of a, b, c, d, e"),
        (FIVE, "recall:z", "give recall:CLASS"),
        (FIVE, "acc:a", "it is not about one class; give acc"),
    ],
)
def test_a_metric_that_does_not_fit_gets_one_line(task, name, message):
    with pytest.raises(InputError, match=message):
        with_metric(task, name, task.labels)


def test_classes_that_count_are_counted():
    labels = np.array([0, 0, 2, 2, 2, 4])
    for name, expected in (
        ("acc", {}),
        ("f1:c", {2: 3}),
        ("recall:b", {1: 0}),
        ("f1_macro", {0: 2, 1: 0, 2: 3, 3: 0, 4: 1}),
    ):
        assert counted_classes(replace(FIVE, metrics=(name,)), labels) == expected
