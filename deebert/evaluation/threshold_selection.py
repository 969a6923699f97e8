"""Chooses the threshold from the logits of all exits, on one half of the samples, and reports it on the other half.

There are two ways. A target (the largest saving within a drop of the score, or the best score at a saving) gives an
estimate. A risk with a confidence gives a guarantee.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deebert.data.tasks import Task
from deebert.evaluation.all_exits import AllExits, dense_thresholds
from deebert.evaluation.metrics import primary_score
from deebert.evaluation.risk_control import controlled_threshold, lost_to_early_exit
from deebert.modeling.exit_rules import NO_EXIT
from deebert.utils.cli import InputError

PER_LAYER_CANDIDATES = 24  # thresholds that are tried for one off-ramp
BOOTSTRAP_SAMPLES = 1000  # for the 95 % intervals
ROUNDING = 1e-12  # of the difference of two scores: a target missed by less is met


@dataclass(frozen=True)
class SelectionTarget:
    """The aim of the choice; exactly one of drop, saving and risk is given.

    drop: the score may fall by this share; the threshold with the largest saving is chosen.
    saving: at least this share of the cost (see cost.py) is to be saved; the threshold with the best score is chosen.
    risk: the highest probability, with the given confidence, that early exit gets a sample wrong that the full model
        gets right. The accuracy never falls by more.
    Raises InputError for values out of range.
    """

    drop: float | None = None
    saving: float | None = None
    risk: float | None = None
    confidence: float = 0.95

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("drop", "saving", "risk") if getattr(self, name) is not None}
        if len(given) != 1:
            raise InputError("give one of --target_drop, --target_saving and --risk")
        for name, value in given.items() | {("confidence", self.confidence)}:
            if not 0 <= value < 1 or (name in ("risk", "confidence") and value == 0):
                flag = name if name in ("risk", "confidence") else f"target_{name}"
                raise InputError(f"--{flag} {value}: give a share between 0 and 1, 0.01 for one per cent")


@dataclass(frozen=True)
class OperatingPoint:
    """The score, its change against the full model, and the shares that are saved, on one set of samples.

    cost_saved: None where the operations are not known; layers are ranked in its place then.
    """

    score: float
    score_change: float
    layers_saved: float
    cost_saved: float | None
    samples: int

    @property
    def saved(self) -> float:
        """What is ranked: the cost saved, or the layers saved where the cost is not known."""
        return self.layers_saved if self.cost_saved is None else self.cost_saved


@dataclass(frozen=True)
class ThresholdChoice:
    """The chosen threshold and its results.

    threshold: one number, or one for each off-ramp, in units of the exit rule.
    chosen_on, reported_on: the results on the two disjoint halves.
    score_interval, change_interval: 95 % bootstrap intervals on the second half.
    risk_observed: the share of the second half that is lost to early exit; None for regression.
    holds: whether the second half meets the target (for a risk: the observed share is not above it).
    """

    threshold: float | list[float]
    chosen_on: OperatingPoint
    reported_on: OperatingPoint
    rule: str
    score_interval: tuple[float, float]
    change_interval: tuple[float, float]
    risk_observed: float | None
    holds: bool


def choose(task: Task, exits: AllExits, target: SelectionTarget, seed: int = 42) -> ThresholdChoice:
    """Chooses on one random half of the samples and reports on the other half.

    Raises InputError where nothing can be chosen: no labels, too few samples, a rule or risk without meaning here.
    """
    if exits.labels is None:
        raise InputError("a threshold cannot be chosen on samples without labels")
    if exits.logits.shape[2] == 1 and target.risk is not None:
        raise InputError("--risk counts wrong labels, and a regression model has none; use --target_drop")
    if not exits.exit_rule.supported:
        raise InputError(f"a threshold cannot be chosen for the rule {exits.rule} and a regression model")
    if len(exits.labels) < 4:
        raise InputError(f"a threshold cannot be chosen on {len(exits.labels)} samples; at least 4 are needed")
    fit, held_out = exits.halves(seed)
    if target.risk is not None:
        threshold = controlled_threshold(fit, target.risk, target.confidence)
    else:
        threshold = best_thresholds(task, fit, target)
    reported_on = operating_point(task, held_out, threshold)
    score_interval, change_interval = bootstrap(task, held_out, threshold, seed)
    risk_observed = None if task.num_labels == 1 else float(lost_to_early_exit(held_out, threshold).mean())
    if target.risk is not None:
        holds = risk_observed <= target.risk
    else:
        holds = surplus(reported_on, target) >= (-ROUNDING if target.drop is not None else 0)
    return ThresholdChoice(
        threshold=threshold,
        chosen_on=operating_point(task, fit, threshold),
        reported_on=reported_on,
        rule=exits.rule,
        score_interval=score_interval,
        change_interval=change_interval,
        risk_observed=risk_observed,
        holds=holds,
    )


def operating_point(task: Task, exits: AllExits, threshold: float | Sequence[float]) -> OperatingPoint:
    """The results of one threshold, or of one per layer, on these samples."""
    layers = exits.exit_layers(threshold)
    score, full_score = primary_score(task, exits.logits_at(layers), exits.labels), exits.full_score(task)
    cost = exits.cost(layers, threshold)
    return OperatingPoint(
        score=score,
        score_change=score - full_score,
        layers_saved=1 - float(layers.mean()) / exits.num_layers,
        cost_saved=None if cost is None else 1 - float(cost.mean()),
        samples=len(layers),
    )


def best_thresholds(task: Task, exits: AllExits, target: SelectionTarget) -> float | list[float]:
    """Chooses a single threshold, or one per layer where these are clearly better.

    Thresholds per layer are returned only if, on held-out samples, they beat every single threshold that saves at least
    as much.
    """
    half = len(exits.labels) // 2
    fit, held_out = exits.take(np.arange(half)), exits.take(np.arange(half, len(exits.labels)))
    per_layer = operating_point(task, held_out, fit_per_layer(task, fit, target))
    singles = [
        operating_point(task, held_out, threshold)
        for threshold in [*dense_thresholds(held_out), held_out.exit_rule.exit_all_threshold()]
    ]
    if all(per_layer.score > single.score for single in singles if single.saved >= per_layer.saved):
        thresholds = fit_per_layer(task, exits, target)
        return thresholds if len(set(thresholds)) > 1 else thresholds[0]
    return fit_single(task, exits, target)


def surplus(point: OperatingPoint, target: SelectionTarget) -> float:
    """By how much a point meets the target's drop or saving; negative where it misses it."""
    if target.drop is not None:
        return point.score_change + target.drop
    return point.saved - target.saving


def objective(point: OperatingPoint, target: SelectionTarget) -> float:
    """The number to maximise: the saving (or score) of a point that meets the target, else the surplus, below -1."""
    if surplus(point, target) < -ROUNDING:
        return surplus(point, target) - 1
    return point.saved if target.drop is not None else point.score


def fit_single(task: Task, exits: AllExits, target: SelectionTarget) -> float:
    """The best of many thresholds; of equally good ones the safest."""
    return max(
        dense_thresholds(exits), key=lambda threshold: objective(operating_point(task, exits, threshold), target)
    )


def fit_per_layer(task: Task, exits: AllExits, target: SelectionTarget) -> list[float]:
    """Coordinate ascent from the best single threshold: each off-ramp in turn gets its best, until none improves."""
    thresholds = [fit_single(task, exits, target)] * (exits.num_exits - 1)
    best = objective(operating_point(task, exits, thresholds), target)
    improved = True
    while improved:
        improved = False
        for i in range(len(thresholds)):
            for candidate in layer_candidates(exits, i):
                trial = [*thresholds[:i], candidate, *thresholds[i + 1 :]]
                value = objective(operating_point(task, exits, trial), target)
                if value > best + 1e-9:
                    best, thresholds, improved = value, trial, True
    return thresholds


def layer_candidates(exits: AllExits, off_ramp: int) -> list[float]:
    """Thresholds to try for one off-ramp (from 0), from "no sample exits there" to "all do"."""
    rule = exits.exit_rule
    if rule.stateful:
        between = rule.grid(PER_LAYER_CANDIDATES, exits.num_exits)
    else:
        between = np.quantile(exits.uncertainties[:, off_ramp], np.linspace(0, 1, PER_LAYER_CANDIDATES)).tolist()
    return [NO_EXIT, *between, rule.exit_all_threshold()]


def bootstrap(
    task: Task, exits: AllExits, threshold: float | Sequence[float], seed: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """95 % percentile intervals of the score and of its change against the full model on the same samples."""
    rng = np.random.default_rng(seed)
    early, full = exits.logits_at(exits.exit_layers(threshold)), exits.logits[:, -1]
    values = []
    for _ in range(BOOTSTRAP_SAMPLES):
        rows = rng.integers(0, len(early), len(early))
        score, full_score = (primary_score(task, x[rows], exits.labels[rows]) for x in (early, full))
        values.append((score, score - full_score))
    low, high = np.quantile(values, [0.025, 0.975], axis=0).tolist()
    return (low[0], high[0]), (low[1], high[1])


def report(choice: ThresholdChoice, target: SelectionTarget) -> str:
    """The choice and its results in words, in per cent and points."""
    name = "thresholds" if isinstance(choice.threshold, list) else "threshold"
    thresholds = " ".join(f"{threshold:.4g}" for threshold in np.atleast_1d(choice.threshold))
    low, high = choice.change_interval
    unit = "nats" if choice.rule == "entropy" else f"({choice.rule})"
    first_half = f"{choice.chosen_on.samples} samples (there: {describe(choice.chosen_on)})"
    lines = [
        f"chosen {name}: {thresholds} {unit}, on {first_half}",
        f"on {choice.reported_on.samples} other samples: {describe(choice.reported_on)}",
        f"95 % intervals there: change {100 * low:+.2f} to {100 * high:+.2f} points, "
        f"score {100 * choice.score_interval[0]:.2f} to {100 * choice.score_interval[1]:.2f} %",
    ]
    if target.risk is not None:
        lines.append(
            f"with {100 * target.confidence:g} % confidence at most {100 * target.risk:g} % of all samples are lost by "
            f"exiting early; {100 * choice.risk_observed:.2f} % of the other samples were"
        )
    else:
        aim = describe_target(target, choice.reported_on)
        lines.append(f"the target, a {aim}, {verdict(choice, target)} on the other samples")
    return "\n".join(lines)


def describe(point: OperatingPoint) -> str:
    """The point in words: the score, its change, and the cost and layers saved."""
    score = f"score {100 * point.score:.2f} % ({100 * point.score_change:+.2f})"
    cost = "" if point.cost_saved is None else f"{100 * point.cost_saved:.1f} % of the cost and "
    return f"{score}, {cost}{100 * point.layers_saved:.1f} % of the layers saved"


def describe_target(target: SelectionTarget, point: OperatingPoint) -> str:
    """A target with a drop or a saving in words; the point shows what is counted."""
    if target.drop is not None:
        return f"drop of at most {100 * target.drop:g} points"
    return f"saving of {100 * target.saving:g} % of the {'layers' if point.cost_saved is None else 'cost'}"


def verdict(choice: ThresholdChoice, target: SelectionTarget) -> str:
    """Whether the samples that the threshold was not chosen on meet the target."""
    return "holds" if choice.holds else f"is missed by {-100 * surplus(choice.reported_on, target):.2f} points"
