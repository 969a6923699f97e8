"""Choosing the threshold from the answers of all exits: chosen on one part of the samples, reported on the other.

Two ways: a target (the largest saving within a drop of the score, or the best score at a saving), which is a good
guess, and a risk with a confidence, which is a guarantee.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from deebert.data.tasks import Task
from deebert.evaluation.all_exits import AllExits, dense_thresholds
from deebert.evaluation.metrics import predictions, scores
from deebert.modeling.exit_rules import NO_EXIT
from deebert.utils.cli import InputError

PER_LAYER_CANDIDATES = 24
BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class Target:
    """What is asked for; exactly one of drop, saving and risk is given.

    drop: the score may fall by this much; the largest saving is looked for.
    saving: at least this share of the layers is to be saved; the best score is looked for.
    risk: the probability that a sample is answered wrongly which the full model answers rightly is to stay below this,
        with the given confidence. The drop in accuracy is never larger than that.
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
class Measured:
    """Score, its change against the full model and the share of layers saved, on one set of samples."""

    score: float
    score_change: float
    layers_saved: float
    samples: int


@dataclass(frozen=True)
class Choice:
    """The thresholds chosen (one number, or one for each off-ramp), in units of the exit rule, and what they give.

    chosen_on and reported_on are disjoint. score_interval and change_interval: 95 % bootstrap intervals of the latter.
    holds: whether the target is met on the samples it was not chosen on (for a risk: the observed rate is below it).
    """

    threshold: float | list[float]
    chosen_on: Measured
    reported_on: Measured
    rule: str
    score_interval: tuple[float, float]
    change_interval: tuple[float, float]
    risk_observed: float | None
    holds: bool


def choose(task: Task, exits: AllExits, target: Target, seed: int = 42) -> Choice:
    """Chooses on a seeded half of the samples and reports on the other. Raises InputError where that can't be done."""
    if exits.labels is None:
        raise InputError("a threshold cannot be chosen on samples without labels")
    if exits.logits.shape[2] == 1 and target.risk is not None:
        raise InputError("--risk counts wrong answers, and a regression model has none: ask for a --target_drop")
    if not exits.exit_rule.supported:
        raise InputError(f"a threshold cannot be chosen for the rule {exits.rule} and a regression model")
    if len(exits.labels) < 4:
        raise InputError(f"a threshold cannot be chosen on {len(exits.labels)} samples; at least 4 are needed")
    fit, report = exits.halves(seed)
    threshold = controlled_threshold(fit, target) if target.risk is not None else best_thresholds(task, fit, target)
    chosen_on, reported_on = measure(task, fit, threshold), measure(task, report, threshold)
    score_interval, change_interval = bootstrap(task, report, threshold, seed)
    risk = None if task.num_labels == 1 else float(harmed(report, threshold).mean())
    holds = {
        "drop": target.drop is not None and reported_on.score_change >= -target.drop - 1e-12,
        "saving": target.saving is not None and reported_on.layers_saved >= target.saving,
        "risk": target.risk is not None and risk <= target.risk,
    }
    return Choice(
        threshold, chosen_on, reported_on, exits.rule, score_interval, change_interval, risk, any(holds.values())
    )


def measure(task: Task, exits: AllExits, threshold: float | Sequence[float]) -> Measured:
    """What the thresholds give on these samples."""
    layers = exits.exit_layers(threshold)
    score, full = (
        scores(task, logits, exits.labels)[task.primary_metric]
        for logits in (exits.answers(layers), exits.logits[:, -1])
    )
    return Measured(score, score - full, 1 - float(layers.mean()) / exits.num_layers, len(layers))


def best_thresholds(task: Task, exits: AllExits, target: Target) -> float | list[float]:
    """A single threshold, or one for each off-ramp where those are better on samples that they were not fitted to.

    Better: they beat every single threshold that saves as much, even the one that is best on just these samples.
    """
    half = len(exits.labels) // 2
    fit, held_out = exits.take(np.arange(half)), exits.take(np.arange(half, len(exits.labels)))
    several = measure(task, held_out, fit_per_layer(task, fit, target))
    singles = [
        measure(task, held_out, threshold)
        for threshold in [*dense_thresholds(held_out), held_out.exit_rule.exit_all_threshold()]
    ]
    if all(several.score > m.score for m in singles if m.layers_saved >= several.layers_saved):
        thresholds = fit_per_layer(task, exits, target)
        return thresholds if len(set(thresholds)) > 1 else thresholds[0]
    return fit_single(task, exits, target)


def rank(found: Measured, target: Target) -> float:
    """What is to be made large: the saving (or score) of what meets the target; below that, how nearly it is met."""
    if target.drop is not None:
        met, worth = found.score_change + target.drop, found.layers_saved
    else:
        met, worth = found.layers_saved - target.saving, found.score
    return worth if met >= -1e-12 else met - 1  # 1e-12: rounding of the difference of two scores


def fit_single(task: Task, exits: AllExits, target: Target) -> float:
    """The best of a dense row of thresholds; of equals the safest."""
    return max(dense_thresholds(exits), key=lambda threshold: rank(measure(task, exits, threshold), target))


def fit_per_layer(task: Task, exits: AllExits, target: Target) -> list[float]:
    """Coordinate ascent from the best single threshold: each off-ramp in turn gets its best, until none gains."""
    thresholds = [fit_single(task, exits, target)] * (exits.num_layers - 1)
    best = rank(measure(task, exits, thresholds), target)
    rule, gained = exits.exit_rule, True
    while gained:
        gained = False
        for i in range(len(thresholds)):
            if rule.stateful:
                candidates = rule.grid(PER_LAYER_CANDIDATES, exits.num_layers)
            else:
                candidates = np.quantile(exits.uncertainties[:, i], np.linspace(0, 1, PER_LAYER_CANDIDATES)).tolist()
            for candidate in [NO_EXIT, *candidates, rule.exit_all_threshold()]:
                trial = [*thresholds[:i], candidate, *thresholds[i + 1 :]]
                value = rank(measure(task, exits, trial), target)
                if value > best + 1e-9:
                    best, thresholds, gained = value, trial, True
    return thresholds


def harmed(exits: AllExits, threshold: float | Sequence[float]) -> np.ndarray:
    """(S,) bool: the sample is answered wrongly at these thresholds, and rightly by the full model."""
    early = predictions(exits.answers(exits.exit_layers(threshold)))
    return (early != exits.labels) & (predictions(exits.logits[:, -1]) == exits.labels)


def controlled_threshold(exits: AllExits, target: Target, points: int = 200) -> float:
    """The fastest threshold shown, with the given confidence, to have a risk below target.risk.

    Learn then Test (Angelopoulos et al., 2021) with fixed-sequence testing, as applied to early exits by Jazbec et al.
    ("Fast yet Safe: Early-Exiting with Risk Control", NeurIPS 2024). From the safest threshold up, the hypothesis "its
    risk is above the limit" is tested at level 1 - confidence, with the exact binomial p-value; taken is the last
    threshold before the first whose hypothesis is not rejected. Assumes that these samples and those to come are
    independent draws of one distribution, whatever it is, and that the thresholds tried do not depend on them: they
    are the rule's grid.
    Raises InputError where there are too few samples to show anything.
    """
    needed = math.ceil(math.log(1 - target.confidence) / math.log(1 - target.risk))
    if len(exits.labels) < needed:
        raise InputError(
            f"--risk {target.risk} --confidence {target.confidence}: at least {needed} samples are needed to "
            f"choose on, and the dev set's half has {len(exits.labels)}; allow a larger risk"
        )
    safe = 0.0
    for threshold in exits.exit_rule.grid(points, exits.num_layers):
        wrong = int(harmed(exits, threshold).sum())
        if binom.cdf(wrong, len(exits.labels), target.risk) > 1 - target.confidence:
            break
        safe = threshold
    return safe


def bootstrap(
    task: Task, exits: AllExits, threshold: float | Sequence[float], seed: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """95 % percentile intervals of the score and of its change against the full model on the same samples."""
    rng = np.random.default_rng(seed)
    early, full = exits.answers(exits.exit_layers(threshold)), exits.logits[:, -1]
    drawn = []
    for _ in range(BOOTSTRAP_SAMPLES):
        rows = rng.integers(0, len(early), len(early))
        score, full_score = (scores(task, x[rows], exits.labels[rows])[task.primary_metric] for x in (early, full))
        drawn.append((score, score - full_score))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0).tolist()
    return (low[0], high[0]), (low[1], high[1])


def report(choice: Choice, target: Target) -> str:
    """The choice in words, in per cent and points."""
    found, name = choice.reported_on, "thresholds" if isinstance(choice.threshold, list) else "threshold"
    thresholds = " ".join(f"{threshold:.4g}" for threshold in np.atleast_1d(choice.threshold))
    low, high = choice.change_interval
    unit = "nats" if choice.rule == "entropy" else f"({choice.rule})"
    lines = [
        f"chosen {name}: {thresholds} {unit}, on {choice.chosen_on.samples} samples (there: {show(choice.chosen_on)})",
        f"on {found.samples} other samples: {show(found)}",
        f"95 % intervals there: change {100 * low:+.2f} to {100 * high:+.2f} points, "
        f"score {100 * choice.score_interval[0]:.2f} to {100 * choice.score_interval[1]:.2f} %",
    ]
    if target.drop is not None:
        missed = -found.score_change - target.drop
        lines.append(verdict(choice, f"drop of at most {100 * target.drop:g} points", f"{100 * missed:.2f} points"))
    elif target.saving is not None:
        missed = target.saving - found.layers_saved
        lines.append(
            verdict(choice, f"saving of {100 * target.saving:g} % of the layers", f"{100 * missed:.2f} points")
        )
    else:
        lines.append(
            f"with {100 * target.confidence:g} % confidence at most {100 * target.risk:g} % of all samples are lost by "
            f"exiting early; {100 * choice.risk_observed:.2f} % of the other samples were"
        )
    return "\n".join(lines)


def show(found: Measured) -> str:
    score = f"score {100 * found.score:.2f} % ({100 * found.score_change:+.2f})"
    return f"{score}, {100 * found.layers_saved:.1f} % of the layers saved"


def verdict(choice: Choice, target: str, missed: str) -> str:
    return f"the target, a {target}, {'holds' if choice.holds else f'is missed by {missed}'} on the other samples"
