"""How often is the promise of a chosen threshold broken? A simulation where it is hardest to keep.

In each population early exit lowers the score by just more than the limit, at every threshold, so that whatever is
chosen breaks the promise. Many dev sets are drawn from it. The tables say for how many per cent of them a threshold was
chosen: the largest number over three kinds of changes, and over shares of the rarer class from 50 to 1 %. It should be
no more than the promise allows, up to chance. "refused": all dev sets are too small, whatever the changes; with the
share of the class, where there is one. The next table is of the full search over thresholds, in two populations: each
threshold is a test of its own, or few texts exit at each off-ramp, so that most dev sets use none of some off-ramps.
The last one is of the texts that are handed over: for how many per cent of the dev sets the chosen `min_confidence`
leaves a lower accuracy among the texts of the population that are answered.
"""

import argparse
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from deebert.data.tasks import TASKS, Task
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.metrics import changes, metric_of, of_metric
from deebert.evaluation.risk_control import drop_p_value, risk_p_value
from deebert.evaluation.tables import markdown
from deebert.evaluation.threshold_selection import (
    ANSWERED_SURE,
    SelectionTarget,
    answered,
    choose,
    choose_confidence,
    describe_target,
    too_few,
)
from deebert.experiment.monitor import standard_error
from deebert.modeling.exit_rules import NO_EXIT
from deebert.utils import cli
from deebert.utils.cli import positive

TEXTS = 100_000  # of a population
EPOCHS = 4  # whose weights a dev set picks from
LAYERS = (6, 12, 24)
DEV_TEXTS = (50, 200, 1000, 5000)
SHARES = (0.5, 0.2, 0.05, 0.03, 0.01)  # of the texts that have class 1
KINDS = ("losses", "losses and gains", "false alarms")
BINARY, NUMBERS = TASKS["SST-2"], TASKS["STS-B"]
TEN = replace(BINARY, labels=tuple("abcdefghij"), metrics=("f1_macro",))
SEVERAL = replace(BINARY, labels=tuple("abcde"), metrics=("f1_micro",), several_labels=True)
BY_SHARE = [(replace(BINARY, metrics=(name,)), SHARES) for name in ("f1", "recall:1", "mcc", "f1_macro")]
TASKS_AND_SHARES = [(BINARY, (0.5,)), *BY_SHARE, (TEN, (0.1,)), (SEVERAL, (0.2,)), (NUMBERS, (0.5,))]


def full_model(task: Task, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and a full model's predictions: it misses 10 % of class 1 and calls as many others so."""
    if not task.labels:
        labels = rng.normal(size=TEXTS)
        return labels, labels + 0.3 * rng.normal(size=TEXTS)
    if task.several_labels:
        labels = (rng.random((TEXTS, task.num_labels)) < share).astype(float)
        return labels, np.where(rng.random(labels.shape) < 0.02, 1 - labels, labels)
    if task.num_labels > 2:  # the rarest class has a tenth of the texts of the most frequent one
        frequencies = np.linspace(1, 0.1, task.num_labels)
        labels = rng.choice(task.num_labels, TEXTS, p=frequencies / frequencies.sum())
        return labels, np.where(rng.random(TEXTS) < 0.1, rng.permutation(labels), labels)
    labels = (np.arange(TEXTS) < share * TEXTS).astype(int)
    wrong = rng.random(TEXTS) < np.where(labels == 1, 0.1, 0.1 * share / (1 - share))
    return labels, np.where(wrong, 1 - labels, labels)


def early_predictions(
    task: Task, target: SelectionTarget, kind: str, labels: np.ndarray, full: np.ndarray, rng: np.random.Generator
) -> np.ndarray | None:
    """Predictions that break the target by no more than one text; None where such changes cannot break it."""
    early, wrong = full.copy(), full != labels
    if kind == "losses and gains":  # four in ten errors of the full model are mended
        mended = wrong & (rng.random(wrong.shape) < 0.4)
        early[mended] = labels[mended]
    if kind == "false alarms":
        victims = np.flatnonzero((labels == 0) & (full == 0)) if task.num_labels == 2 else np.arange(len(labels))
    elif task.num_labels == 2 and task.metrics[0] not in ("acc", "mcc"):
        victims = np.flatnonzero((labels == 1) & (full == 1))
    else:
        victims = np.arange(len(labels)) if wrong.ndim > 1 or not task.labels else np.flatnonzero(~wrong)
    victims = rng.permutation(victims)
    if not task.labels:
        other = rng.normal(size=len(labels))
    elif task.several_labels:
        other = 1 - labels
    else:
        other = (labels + 1) % task.num_labels

    def breaks(changed: int) -> bool:
        now = early.copy()
        now[victims[:changed]] = other[victims[:changed]]
        if target.risk is not None:
            return np.mean((now != labels) & ~wrong) > target.risk
        name = task.primary_metric
        score, scored = metric_of(name).score, of_metric(task, name, labels)
        return score(scored, of_metric(task, name, full)) - score(scored, of_metric(task, name, now)) > target.drop

    low, high = 0, len(victims)
    if not breaks(high):
        return None
    while high - low > 1:
        changed = (low + high) // 2
        low, high = (low, changed) if breaks(changed) else (changed, high)
    early[victims[:high]] = other[victims[:high]]
    return early


def as_exits(
    layers: int, labels: np.ndarray, full: np.ndarray, early: np.ndarray, rng: np.random.Generator
) -> AllExits:
    """Two labels: each text exits with its early prediction at an off-ramp of its own, changed ones at any threshold.

    The others need thresholds of their own, so that each threshold is a test of its own.
    """
    outputs = np.zeros((len(labels), layers, 2), np.float32)
    margins = np.where(early == full, rng.uniform(0.1, 6, len(labels)), 9)
    at = rng.integers(0, layers - 1, len(labels))
    outputs[np.arange(len(labels)), at] = margins[:, None] * np.eye(2)[early]
    outputs[:, -1] = 9 * np.eye(2)[full]
    return AllExits(outputs, labels)


def p_value(task: Task, target: SelectionTarget, data: list[np.ndarray], rng: np.random.Generator) -> float:
    """Of one test, on labels, full and early predictions."""
    labels, full, early = data
    if target.risk is not None:
        return risk_p_value(int(((full == labels) & (early != labels)).sum()), len(labels), target.risk)
    change, seed = changes(task, *data), int(rng.integers(2**32))
    return 1.0 if change is None else drop_p_value(*change, target.drop, 1 - target.confidence, seed)


def broken(task: Task, target: SelectionTarget, share: float, kind: str, texts: int, dev_sets: int) -> float | None:
    """The share of the dev sets for which a threshold is chosen; None where all of them are too small."""
    rng = np.random.default_rng(texts)
    labels, full = full_model(task, share, rng)
    early = early_predictions(task, target, kind, labels, full, rng)
    chosen = []
    for _ in range(dev_sets if early is not None else 0):
        rows = rng.integers(0, TEXTS, texts)
        data = [values[rows] for values in (labels, full, early)]
        if not too_few(task, *data[:2], target):
            chosen.append(p_value(task, target, data, rng) <= 1 - target.confidence)
    return sum(chosen) / dev_sets if chosen else None


def rare_exits(layers: int, texts: int, target: SelectionTarget, rng: np.random.Generator) -> AllExits:
    """One text in `texts` exits at each off-ramp but the last, where it would be wrong; all others exit at the last."""
    last, limit = layers - 2, target.drop or target.risk
    labels, group = rng.integers(0, 2, TEXTS), rng.integers(0, texts, TEXTS)
    at = np.minimum(group, last)
    lost = rng.permutation(TEXTS) <= limit * TEXTS
    predicted, margins = np.repeat(labels[:, None], layers, axis=1), np.full((TEXTS, layers), 0.05)
    predicted[:, last] = np.where(at < last, 1 - labels, labels)
    predicted[lost, at[lost]] = 1 - labels[lost]
    margins[np.arange(TEXTS), at] = margins[:, last] = 9
    return AllExits((margins[..., None] * np.eye(2)[predicted]).astype(np.float32), labels)


def broken_by_depth(target: SelectionTarget, layers: int, rare: bool, texts: int, dev_sets: int) -> float:
    """As `broken`, for the full search over thresholds of a model of this many layers."""
    rng = np.random.default_rng(layers)
    if rare:
        world = rare_exits(layers, texts, target, rng)
    else:
        labels, full = full_model(BINARY, 0.5, rng)
        world = as_exits(layers, labels, full, early_predictions(BINARY, target, KINDS[1], labels, full, rng), rng)
    rows = (rng.integers(0, TEXTS, texts) for _ in range(dev_sets))
    return np.mean([choose(BINARY, world.take(each), target).threshold is not None for each in rows])


def broken_by_weights(target: SelectionTarget, kind: str, texts: int, dev_sets: int) -> float:
    """As `broken` for the accuracy, where the same dev set also picks one of EPOCHS equally good full models.

    As in a training (experiment/monitor.py): the last one whose score is not below the best by a standard error.
    """
    rng, chosen = np.random.default_rng(texts), []
    labels, first = full_model(BINARY, 0.5, rng)
    fulls = [first, *(np.where(rng.permutation(first != labels), 1 - labels, labels) for _ in range(EPOCHS - 1))]
    earlies = [early_predictions(BINARY, target, kind, labels, full, rng) for full in fulls]
    for _ in range(dev_sets):
        rows, best, kept = rng.integers(0, TEXTS, texts), 0.0, 0
        for epoch, full in enumerate(fulls):
            score = np.mean(full[rows] == labels[rows])
            if score >= best - standard_error(best, texts):
                best, kept = max(best, score), epoch
        data = [values[rows] for values in (labels, fulls[kept], earlies[kept])]
        chosen.append(p_value(BINARY, target, data, rng) <= 1 - target.confidence)
    return float(np.mean(chosen))


def sure_texts(risk: float, informative: bool, rng: np.random.Generator) -> AllExits:
    """Six layers. Each text is sure at an off-ramp of its own; its prediction there and the full model's may be wrong.

    informative: the less sure a prediction, the more often it is wrong, from never to four times `risk`, in the mean
    twice that; otherwise a share `risk` of the predictions is wrong, however sure they are.
    """
    labels, margins = rng.integers(0, 2, TEXTS), rng.uniform(0.1, 9, (TEXTS, 2))  # of the off-ramp, of the full model
    if informative:
        wrong = rng.random((TEXTS, 2)) < 4 * risk * (9 - margins) / 8.9
    else:  # exactly this share, however sure the texts are
        wrong = margins.argsort(axis=0).argsort(axis=0) % round(1 / risk) == 0
    predicted = np.where(wrong, 1 - labels[:, None], labels[:, None])
    outputs = np.zeros((TEXTS, 6, 2), np.float32)
    outputs[np.arange(TEXTS), rng.integers(0, 5, TEXTS)] = margins[:, :1] * np.eye(2)[predicted[:, 0]]
    outputs[:, -1] = margins[:, 1:] * np.eye(2)[predicted[:, 1]]
    return AllExits(outputs, labels)


def broken_answers(
    accuracy: float, informative: bool, target: SelectionTarget | None, texts: int, dev_sets: int
) -> float:
    """The share of the dev sets whose `min_confidence` breaks the promise. target: of a threshold, chosen before."""
    rng = np.random.default_rng(texts)
    world, broken = sure_texts(1 - accuracy, informative, rng), 0
    for _ in range(dev_sets):
        dev = world.take(rng.integers(0, TEXTS, texts))
        threshold = (target and choose(BINARY, dev, target).threshold) or NO_EXIT
        chosen = choose_confidence(dev, threshold, accuracy)
        if chosen is not None:
            answers, right = answered(world, threshold, chosen)
            broken += not informative or right < accuracy * answers
    return broken / dev_sets


def cell(task: Task, target: SelectionTarget, shares: tuple[float, ...], texts: int, dev_sets: int) -> str:
    """The largest share of `broken` in per cent, and the shares of class 1 with which all dev sets are too small."""
    largest, refused = 0.0, []
    for share in shares:
        values = [broken(task, target, share, kind, texts, dev_sets) for kind in KINDS]
        known = [value for value in values if value is not None]
        largest = max([largest, *known])
        if not known:
            refused.append(f"{100 * share:g}")
        print(task.primary_metric, describe_target(target), share, texts, known, file=sys.stderr, flush=True)
    if len(refused) == len(shares):
        return "refused"
    return f"{100 * largest:.1f}" + (f" (refused: {', '.join(refused)} %)" if refused else "")


def table(target: SelectionTarget, tasks: list[tuple[Task, tuple[float, ...]]], dev_sets: int) -> str:
    """One row for each metric, one column for each number of dev texts."""
    rows = [["metric", *(f"{texts:,} texts" for texts in DEV_TEXTS)]]
    for task, shares in tasks:
        classes = "" if task.num_labels == 2 or not task.labels else f", {task.num_labels} labels"
        cells = [cell(task, target, shares, texts, dev_sets) for texts in DEV_TEXTS]
        rows.append([f"{task.primary_metric}{classes}", *cells])
    return markdown(rows)


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dev_sets", type=positive, default=999, help="for each population and number of texts")
    parser.add_argument(
        "--drops", type=float, nargs="*", default=[0.01, 0.05], help="promises about the score, but for answered texts"
    )
    parser.add_argument("--risks", type=float, nargs="*", default=[0.05], help="likewise, about single texts")
    parser.add_argument("--confidence", type=float, help="of these promises")
    args = parser.parse_args()
    half = max(1, args.dev_sets // 2)  # of the dev sets, where a threshold is searched in each
    targets = [SelectionTarget(risk=risk, confidence=args.confidence) for risk in args.risks]
    targets += [SelectionTarget(drop=drop, confidence=args.confidence) for drop in args.drops]
    for target in targets:
        print(f"\n{describe_target(target)}; allowed: {100 * (1 - target.confidence):.3g} %\n")
        tasks = TASKS_AND_SHARES if target.risk is None else [(BINARY, (0.5,))]
        print(table(target, tasks, args.dev_sets), flush=True)
    print("\nthe full search over thresholds, by depth; accuracy\n")
    rows = [["promise", "texts exit", "layers", *(f"{texts:,} texts" for texts in DEV_TEXTS[1:3])]]
    for target, rare, layers in product(targets, (False, True), LAYERS):
        cells = [broken_by_depth(target, layers, rare, texts, half) for texts in DEV_TEXTS[1:3]]
        where = "few at each off-ramp" if rare else "anywhere"
        rows.append([describe_target(target), where, str(layers), *(f"{100 * cell:.1f}" for cell in cells)])
    print(markdown(rows))
    print(f"\nthe dev set also picks the weights of one of {EPOCHS} epochs; accuracy\n")
    rows = [["promise", "changes", *(f"{texts:,} texts" for texts in DEV_TEXTS[1:])]]
    for target, kind in product(targets, KINDS[:2]):
        cells = [broken_by_weights(target, kind, texts, args.dev_sets) for texts in DEV_TEXTS[1:]]
        rows.append([describe_target(target), kind, *(f"{100 * cell:.1f}" for cell in cells)])
    print(markdown(rows))
    print(f"\naccuracy among answered texts; allowed: {100 * (1 - ANSWERED_SURE):.3g} %\n")
    sizes = (300, *DEV_TEXTS[2:])
    rows = [["accuracy", "threshold", "wrong predictions", *(f"{texts:,} texts" for texts in sizes)]]
    for accuracy, target, informative in product((0.95, 0.98), (None, SelectionTarget(drop=0.05)), (False, True)):
        sets = args.dev_sets if target is None else half
        cells = [broken_answers(accuracy, informative, target, texts, sets) for texts in sizes]
        how = "never exits" if target is None else "chosen on the same dev set"
        wrong = "less sure" if informative else "as sure as others"
        rows.append([f"{100 * accuracy:g} %", how, wrong, *(f"{100 * cell:.1f}" for cell in cells)])
    print(markdown(rows))


if __name__ == "__main__":
    cli.run(main)
