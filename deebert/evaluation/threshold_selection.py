"""Chooses the threshold from the logits of all exits, so that unseen samples keep what it promises.

The dev set shows with a confidence (CONFIDENCE unless you say otherwise) that the promise is kept, see risk_control.py.
All of its samples are used: what is promised is about unseen samples, so that none have to be set aside to check it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deebert.data.tasks import Task
from deebert.evaluation import risk_control
from deebert.evaluation.all_exits import AllExits, sweep
from deebert.evaluation.metrics import changes, correct, counted_classes, predictions, primary_score
from deebert.evaluation.results import SweepRow
from deebert.modeling.exit_rules import ExitRule
from deebert.utils.arrays import confidence, shares
from deebert.utils.cli import check_numbers
from deebert.utils.errors import InputError

CONFIDENCE = {"drop": 0.9, "risk": 0.95}  # by target, where none is given
POINTS = 200  # thresholds of the sequence that is tested
ANSWERED_SURE = 0.9  # with which the accuracy among answered texts is promised
MIN_CONFIDENCES = [round(1 - 10.0**x, 4) for x in np.linspace(-4, 0, POINTS)]  # the safest first; 0: all is answered
SURE = 0.95  # with which an off-ramp is called better than the final classifier


@dataclass(frozen=True)
class SelectionTarget:
    """What the threshold has to keep for unseen samples; exactly one of drop and risk is given.

    drop: the largest fall of the score against the full model. The fastest threshold that keeps it is chosen.
    risk: the highest probability that early exit gets a sample wrong that the full model gets right. The accuracy never
        falls by more. The fastest threshold that keeps it is chosen.
    confidence: the probability, over dev sets, that the promise is kept; None: that of CONFIDENCE, never None later.
    Raises InputError for values out of range.
    """

    drop: float | None = None
    risk: float | None = None
    confidence: float | None = None

    def __post_init__(self):
        given = {name: getattr(self, name) for name in CONFIDENCE if getattr(self, name) is not None}
        if len(given) != 1:
            raise InputError("a threshold is chosen for a risk or for a drop of the score: give one of them")
        if self.confidence is None:
            object.__setattr__(self, "confidence", CONFIDENCE[next(iter(given))])
        check_numbers(self, "drop", "risk", above=0, at_most=0.999)
        check_numbers(self, "confidence", above=0, at_most=1 - 1e-9)


@dataclass(frozen=True)
class ThresholdChoice:
    """The chosen threshold, and its results on the samples that show its promise.

    threshold: in units of the exit rule; None where no threshold is shown to keep the promise and to save anything.
    refusal: why none was searched; "" where one was.
    """

    threshold: float | None
    point: SweepRow | None
    refusal: str = ""


def choose(task: Task, exits: AllExits, target: SelectionTarget, seed: int = 42) -> ThresholdChoice:
    """Chooses the threshold. seed: of the random rounding that metrics other than the accuracy need.

    Raises InputError where nothing can be chosen: no labels, or a rule or a risk without meaning.
    """
    if exits.labels is None:
        raise InputError("a threshold cannot be chosen on samples without labels")
    if exits.logits.shape[2] == 1 and target.risk is not None:
        raise InputError("a risk counts wrong labels, and a regression model has none; give a drop of the score")
    if not exits.exit_rule.supported:
        raise InputError(f"a threshold cannot be chosen for the rule {exits.rule} and a regression model")
    refusal = too_few(task, exits.labels, predictions(exits.logits[:, -1], task.several_labels), target)
    better = None if refusal else better_exit(task, exits, seed)
    if better is not None:
        refusal = f"the off-ramp after layer {better} scores more than the final classifier, by more than chance"
    threshold = None if refusal else shown_threshold(task, exits, target, seed)
    point = None if threshold is None else sweep(task, exits, [threshold])[0]
    return ThresholdChoice(threshold, point, refusal)


def too_few(task: Task, labels: np.ndarray, full: np.ndarray, target: SelectionTarget) -> str:
    """Why these samples cannot show the target even if early exit changes nothing; "" where they can.

    full: the full model's predictions.
    """
    level, counts, rare = 1 - target.confidence, counted_classes(task, labels), None
    samples = counted = len(labels)
    if target.risk is not None:
        needed = risk_control.fewest_samples(lambda n: risk_control.risk_p_value(0, n, target.risk), level)
    else:
        for index in [i for i, count in counts.items() if count == 0]:  # as if there were one, classified rightly
            label = np.eye(task.num_labels)[index] if task.several_labels else index
            labels, full = np.concatenate([labels, [label]]), np.concatenate([full, [label]])
        change = changes(task, labels, full, full)
        if change is None:
            return f"the change of {task.primary_metric} cannot be tested on these predictions"
        share, nuisance = min(target.drop / change.largest, 1.0), risk_control.nuisance(level)
        needed = risk_control.fewest_samples(lambda n: risk_control.paired_p_value(0, 0, n, share, nuisance), level)
        samples = len(change.values)
        rare = min(counts, key=counts.get, default=None)
    if rare is not None:  # the number of texts of this class that so many texts would have
        needed, counted = math.ceil(needed * max(counts[rare], 1) / samples), counts[rare]
    if counted >= needed:
        return ""
    of = "" if rare is None else f" of the class {task.labels[rare]!r}"
    return f"{counted:,} dev texts{of} are too few, at least {needed:,} are needed; give more, or weaken the target"


def better_exit(task: Task, exits: AllExits, seed: int = 42) -> int | None:
    """The layer of the best off-ramp that scores more than the final classifier by more than chance, if there is one.

    The test is paired, at level 1 - SURE for all off-ramps together.
    """
    if 0 in counted_classes(task, exits.labels).values():
        return None
    level = (1 - SURE) / max(exits.num_exits - 1, 1)
    full = predictions(exits.logits[:, -1], task.several_labels)
    better = {}
    for layer, logits in zip(exits.layers[:-1], exits.logits.swapaxes(0, 1), strict=False):
        change = changes(task, exits.labels, full, predictions(logits, task.several_labels))
        if change is not None and risk_control.drop_p_value(*change, 0.0, level, seed) <= level:
            better[layer] = primary_score(task, logits, exits.labels)
    return max(better, key=better.get, default=None)


def shown_threshold(task: Task, exits: AllExits, target: SelectionTarget, seed: int) -> float | None:
    """The threshold that these samples show to keep the target; None where there is none that saves anything."""
    threshold = risk_control.fixed_sequence(
        candidate_thresholds(exits.exit_rule, exits.num_exits),
        broken_p_value(task, exits, target, seed),
        1 - target.confidence,
    )
    return threshold if threshold is not None and exits.cost(exits.exit_layers(threshold), threshold) < 1 else None


def candidate_thresholds(rule: ExitRule, num_exits: int) -> list[float]:
    """Thresholds that do not depend on the samples, the safest first, the last one so that all samples exit at once.

    They have few decimals, so that the printed threshold is the tested one.
    """
    return [round(threshold, 4) for threshold in (*rule.grid(POINTS, num_exits), rule.exit_all_threshold())]


def broken_p_value(task: Task, exits: AllExits, target: SelectionTarget, seed: int) -> Callable[[float], float]:
    """The p-value of a threshold's hypothesis "the target is not kept"."""
    if target.risk is not None:
        return lambda threshold: risk_control.risk_p_value(
            changed_texts(exits, exits.exit_layers(threshold))[1], len(exits.labels), target.risk
        )
    level = 1 - target.confidence
    full = predictions(exits.logits[:, -1], task.several_labels)

    def p_value(threshold: float) -> float:
        early = predictions(exits.logits_at(exits.exit_layers(threshold)), task.several_labels)
        change = changes(task, exits.labels, full, early)
        return 1.0 if change is None else risk_control.drop_p_value(*change, target.drop, level, seed)

    return p_value


def changed_texts(exits: AllExits, exit_layers: np.ndarray) -> tuple[int, int, int]:
    """How many predictions differ from the full model's, are worse, are better, for samples that exit there (S,).

    Where a sample may have several labels, its prediction is right if it is right about all of them.
    """
    early, full, labels = exits.logits_at(exit_layers), exits.logits[:, -1], exits.labels
    differ = predictions(early, exits.several_labels) != predictions(full, exits.several_labels)
    changed = differ.any(axis=-1) if exits.several_labels else differ
    early_correct, full_correct = correct(early, labels), correct(full, labels)
    return int(changed.sum()), int((~early_correct & full_correct).sum()), int((early_correct & ~full_correct).sum())


def certainty(exits: AllExits, threshold: float | Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(S,) each: how sure the predictions at the threshold are, and whether they are right."""
    logits = exits.logits_at(exits.exit_layers(threshold))
    return confidence(shares(logits, exits.several_labels), exits.several_labels), correct(logits, exits.labels)


def choose_confidence(exits: AllExits, threshold: float | Sequence[float], accuracy: float) -> float | None:
    """The lowest `min_confidence` with which these samples show this accuracy among answered ones; None: there is none.

    Two sequences share the level. The first begins where so many samples are answered that half of the errors that are
    allowed would do, the second at half of the samples. These numbers depend on no label.
    """
    risk, level = 1 - accuracy, (1 - ANSWERED_SURE) / 2
    fewest = risk_control.fewest_samples(lambda n: risk_control.risk_p_value(n * risk // 2, n, risk), level)
    sure, right = certainty(exits, threshold)

    def p_value(value: float) -> float:
        return risk_control.risk_p_value(int((~right & (sure >= value)).sum()), int((sure >= value).sum()), risk)

    starts = (fewest, max(fewest, len(sure) // 2))
    sequences = [[value for value in MIN_CONFIDENCES if (sure >= value).sum() >= start] for start in starts]
    shown = [risk_control.fixed_sequence(sequence, p_value, level) for sequence in sequences]
    return min((value for value in shown if value is not None), default=None)


def answered(exits: AllExits, threshold: float | Sequence[float], min_confidence: float) -> tuple[int, int]:
    """How many samples are answered, and how many of them rightly."""
    sure, right = certainty(exits, threshold)
    return int((sure >= min_confidence).sum()), int((right & (sure >= min_confidence)).sum())


def report_confidence(chosen: float | None, accuracy: float, dev_samples: int) -> str:
    """The result of `choose_confidence` in words."""
    sure = describe_confidence(ANSWERED_SURE)
    aim = f"at least {100 * accuracy:g} % of the unseen texts that are answered get the right label"
    if chosen is not None:
        return f"chosen min_confidence: {chosen:g}; {sure} {aim}"
    return f"no min_confidence is chosen: {dev_samples:,} dev texts do not show {sure} that {aim}"


def single_exit(task: Task, exits: AllExits, score: float) -> tuple[int, float, float]:
    """The off-ramp that is the best only exit: its layer, its score and the share of the cost that it saves.

    Of those that score no less than `score` the cheapest, and where there is none, the one that scores most.
    """
    options = []
    for i, layer in enumerate(exits.layers[:-1]):
        ran = exits.costs.of(np.full(len(exits.logits), layer), [j == i for j in range(exits.num_exits - 1)])
        saved = 1 - float(ran.sum() / exits.costs.full.sum())
        options.append((layer, primary_score(task, exits.logits[:, i], exits.labels), saved))
    good = [option for option in options if option[1] >= score]
    return max(good, key=lambda option: option[2]) if good else max(options, key=lambda option: option[1])


def verdict(task: Task, exits: AllExits, row: SweepRow, time_saved: float) -> str:
    """What early exit saves at the threshold of this row, and what the best single exit would save, in one sentence."""
    layer, score, saved = single_exit(task, exits, row.score)
    shown = " ".join(f"{value:g}" for value in np.atleast_1d(row.threshold))
    savings = f"{100 * row.cost_saved:.0f} % of the cost and {100 * time_saved:.0f} % of the time"
    change = 100 * (score - exits.full_score(task))
    return (
        f"early exit at {shown} saves {savings} for {100 * row.score_change:+.1f} points; "
        f"the best single exit, layer {layer}, would save {100 * saved:.0f} % at {change:+.1f}"
    )


def report(choice: ThresholdChoice, target: SelectionTarget, dev_samples: int) -> str:
    """The choice in words."""
    sure, aim = describe_confidence(target.confidence), describe_target(target)
    if choice.refusal:
        return f"no threshold is chosen to promise, {sure}, that {aim}: {choice.refusal}"
    if choice.threshold is None:
        shown = f"{dev_samples:,} dev texts do not show {sure} that {aim}"
        return f"no threshold is chosen: {shown}; more of them may, or a weaker target"
    unit = "nats" if choice.point.rule == "entropy" else f"({choice.point.rule})"
    return f"chosen threshold: {choice.threshold:g} {unit}; {sure} {aim}"


def describe(task: Task, exits: AllExits, row: SweepRow) -> str:
    """What a threshold does with these samples: score, savings, how many exit early, how many predictions change.

    row: of `sweep` over the same samples.
    """
    *early, _ = row.exits.values()
    saved = f"{100 * row.cost_saved:.1f} % of the cost and {100 * row.layers_saved:.1f} % of the layers saved"
    text = f"score {100 * row.score:.2f} % ({100 * row.score_change:+.2f}), {saved}; of {len(exits.logits):,} texts "
    text += f"{sum(early):,} exit early"
    if not task.labels:
        return text
    changed, lost, gained = changed_texts(exits, exits.exit_layers(row.threshold))
    text += f", and {changed:,} predictions change, {lost:,} for the worse and {gained:,} for the better"
    return text + (f"; the other {others:,} are wrong with both" if (others := changed - lost - gained) else "")


def describe_confidence(share: float) -> str:
    return f"with {100 * share:g} % confidence"


def describe_target(target: SelectionTarget) -> str:
    """What is promised for unseen texts, in words."""
    if target.drop is not None:
        points = f"{100 * target.drop:g} point{'' if target.drop == 0.01 else 's'}"
        return f"the score of unseen texts falls by at most {points}"
    return f"at most {100 * target.risk:g} % of unseen texts become wrong by early exit"
