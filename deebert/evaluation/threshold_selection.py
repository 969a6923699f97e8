"""Chooses the threshold from the logits of all exits, so that unseen samples keep what it promises.

The dev set shows with a confidence (CONFIDENCE unless you say otherwise) that the promise is kept, see risk_control.py.
All of its samples are used: what is promised is about unseen samples, so that none have to be set aside to check it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from deebert.data.tasks import Task
from deebert.evaluation import risk_control
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.metrics import primary_score
from deebert.modeling.exit_rules import ExitRule
from deebert.utils.errors import InputError

CONFIDENCE = {"drop": 0.9, "risk": 0.95}  # by target, where none is given
POINTS = 200  # thresholds of the sequence that is tested
BOOTSTRAP_STEP = 4  # of these thresholds, a bootstrap tests every fourth: it computes hundreds of scores for each


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
        for name, value in given.items() | {("confidence", self.confidence)}:
            if not 0 < value < 1:
                raise InputError(f"{name} {value}: give a share between 0 and 1, 0.01 for one per cent")


@dataclass(frozen=True)
class OperatingPoint:
    """The results of one threshold on one set of samples.

    score_change: the score minus the full model's.
    exits: how many samples exit after each layer; 0: before the first one.
    changed, lost, gained: samples whose prediction differs from the full model's, is worse, is better; None for
        regression.
    """

    score: float
    score_change: float
    layers_saved: float
    cost_saved: float
    samples: int
    exits: dict[int, int]
    changed: int | None
    lost: int | None
    gained: int | None


@dataclass(frozen=True)
class ThresholdChoice:
    """The chosen threshold and its results on the samples that show its promise.

    threshold: in units of the exit rule; None where no threshold is shown to keep the promise and to save anything.
    point: None without a threshold.
    """

    threshold: float | None
    rule: str
    point: OperatingPoint | None


def choose(task: Task, exits: AllExits, target: SelectionTarget, seed: int = 42) -> ThresholdChoice:
    """Chooses the threshold. seed: of the bootstrap that metrics other than the accuracy need.

    Raises InputError (see `check_choice`).
    """
    check_choice(task, exits, target)
    threshold = shown_threshold(task, exits, target, seed)
    point = None if threshold is None else operating_point(task, exits, threshold)
    return ThresholdChoice(threshold, exits.rule, point)


def check_choice(task: Task, exits: AllExits, target: SelectionTarget) -> None:
    """Raises InputError where nothing can be chosen: no labels, too few samples, a rule or risk without meaning."""
    if exits.labels is None:
        raise InputError("a threshold cannot be chosen on samples without labels")
    if exits.logits.shape[2] == 1 and target.risk is not None:
        raise InputError("a risk counts wrong labels, and a regression model has none; give a drop of the score")
    if not exits.exit_rule.supported:
        raise InputError(f"a threshold cannot be chosen for the rule {exits.rule} and a regression model")
    if needs_bootstrap(task, target) and target.confidence > 0.99:
        raise InputError(f"confidence {target.confidence}: the bootstrap for {task.primary_metric} shows 0.99 at most")
    if len(exits.labels) < 4:
        raise InputError(f"a threshold cannot be chosen on {len(exits.labels)} samples; at least 4 are needed")


def shown_threshold(task: Task, exits: AllExits, target: SelectionTarget, seed: int) -> float | None:
    """The threshold that these samples show to keep the target; None where there is none that saves anything."""
    thresholds = candidate_thresholds(exits.exit_rule, exits.num_exits)
    if needs_bootstrap(task, target):
        thresholds = thresholds[:: BOOTSTRAP_STEP if len(thresholds) > POINTS else 1]
    threshold = risk_control.fixed_sequence(
        thresholds, broken_p_value(task, exits, target, seed), 1 - target.confidence
    )
    return threshold if threshold is not None and exits.cost(exits.exit_layers(threshold), threshold) < 1 else None


def candidate_thresholds(rule: ExitRule, num_exits: int) -> list[float]:
    """Thresholds that do not depend on the samples, the safest first, the last one so that all samples exit at once."""
    return [*rule.grid(POINTS, num_exits), rule.exit_all_threshold()]


def needs_bootstrap(task: Task, target: SelectionTarget) -> bool:
    """Whether the drop is one of another metric than the accuracy, which has an exact test."""
    return target.drop is not None and task.primary_metric != "acc"


def broken_p_value(task: Task, exits: AllExits, target: SelectionTarget, seed: int) -> Callable[[float], float]:
    """The p-value of a threshold's hypothesis "the target is not kept"."""
    if needs_bootstrap(task, target):
        bootstrap = risk_control.PairedBootstrap(task, exits, seed)
        return lambda threshold: bootstrap.p_value(threshold, target.drop)
    samples = len(exits.labels)

    def p_value(threshold: float) -> float:
        _, lost, gained = risk_control.changes(exits, exits.exit_layers(threshold))
        if target.drop is not None:
            nuisance = min(risk_control.NUISANCE, (1 - target.confidence) / 10)
            return risk_control.paired_p_value(lost, gained, samples, target.drop, nuisance)
        return risk_control.risk_p_value(lost, samples, target.risk)

    return p_value


def operating_point(task: Task, exits: AllExits, threshold: float | list[float]) -> OperatingPoint:
    """The results of one threshold on these samples."""
    layers = exits.exit_layers(threshold)
    score = primary_score(task, exits.logits_at(layers), exits.labels)
    changed, lost, gained = (None, None, None) if task.num_labels == 1 else risk_control.changes(exits, layers)
    return OperatingPoint(
        score=score,
        score_change=score - exits.full_score(task),
        layers_saved=1 - float(layers.mean()) / exits.num_layers,
        cost_saved=1 - exits.cost(layers, threshold),
        samples=len(layers),
        exits={layer: int((layers == layer).sum()) for layer in exits.layers},
        changed=changed,
        lost=lost,
        gained=gained,
    )


def report(choice: ThresholdChoice, target: SelectionTarget, dev_samples: int) -> str:
    """The choice and its results in words, in per cent, points and texts."""
    sure, aim = f"with {100 * target.confidence:g} % confidence", describe_target(target)
    if choice.threshold is None:
        return (
            f"no threshold is chosen: {dev_samples:,} dev samples do not show {sure} that {aim}; more of them may, "
            "or a weaker target"
        )
    unit = "nats" if choice.rule == "entropy" else f"({choice.rule})"
    return "\n".join(
        [
            f"chosen threshold: {choice.threshold:.4g} {unit}; {sure} {aim}",
            f"on the {dev_samples:,} dev samples that show it: {describe(choice.point)}",
            describe_texts(choice.point),
        ]
    )


def describe(point: OperatingPoint) -> str:
    """The point in words: the score, its change, and the cost and layers saved."""
    score = f"score {100 * point.score:.2f} % ({100 * point.score_change:+.2f})"
    saved = f"{100 * point.cost_saved:.1f} % of the cost and {100 * point.layers_saved:.1f} % of the layers saved"
    return f"{score}, {saved}"


def describe_texts(point: OperatingPoint) -> str:
    """The point in texts: how many exit early, and how many predictions change."""
    early = point.samples - point.exits[max(point.exits)]
    text = f"of the {point.samples:,} texts {early:,} exit early"
    if point.changed is None:
        return text
    changes = f"{point.lost:,} for the worse and {point.gained:,} for the better"
    return f"{text}; {point.changed:,} predictions change, {changes}"


def describe_target(target: SelectionTarget) -> str:
    """What is promised for unseen texts, in words."""
    if target.drop is not None:
        points = f"{100 * target.drop:g} point{'' if target.drop == 0.01 else 's'}"
        return f"the score of unseen texts falls by at most {points}"
    return f"at most {100 * target.risk:g} % of unseen texts become wrong by early exit"
