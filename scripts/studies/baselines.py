"""What early exit is worth: its score at each cost, beside smaller models and other ways to choose a sample's exit.

Everything is compared in the same way. Whatever can be run (a threshold, a model, an exit) has predictions and costs.
On one half of the dev set the best of these are chosen: the corners of the upper hull of score over cost. They are
scored on the other half; then the halves change places. Between two corners a share of the samples can go to either.
Shapes: S samples, N layers; M candidates, of which P are chosen; R resamples; G costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from comparison import mean_and_deviation
from scipy.stats import t as student

from deebert.data.tasks import Task
from deebert.evaluation.all_exits import AllExits, dense_thresholds
from deebert.evaluation.metrics import predictions, score
from deebert.evaluation.tables import markdown
from deebert.modeling.exit_rules import NO_EXIT

THRESHOLDS = 100  # on an even grid, and as many quantiles of what the samples have
COSTS = np.linspace(0, 1, 101)  # (G,) shares of the full model's cost at which scores are compared
AT, HALF = (25, 50, 75), 50  # those of them that the tables show, in per cent
RESAMPLES = 500


@dataclass(frozen=True)
class Candidates:
    """What one setting with one seed can run.

    predictions: (M, S). operations: (M, S). full: (S,), the operations of the full model.
    """

    predictions: np.ndarray
    operations: np.ndarray
    full: np.ndarray

    @classmethod
    def of(cls, exits: AllExits, layers: Sequence[np.ndarray], thresholds: Sequence) -> "Candidates":
        """Samples that exit at layers (S,) with a threshold, for each of M."""
        pairs = list(zip(layers, thresholds, strict=True))
        return cls(
            np.stack([predictions(exits.logits_at(layer)) for layer in layers]),
            np.stack([exits.operations(layer, threshold) for layer, threshold in pairs]),
            exits.costs.full,
        )

    def costs(self, samples: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(M,) the cost on these samples: a ratio of sums."""
        return self.operations[:, samples].sum(axis=1) / self.full[samples].sum()


def early_exit(exits: AllExits) -> Candidates:
    """One candidate for each threshold."""
    thresholds = dense_thresholds(exits, THRESHOLDS)
    return Candidates.of(exits, [exits.exit_layers(threshold) for threshold in thresholds], thresholds)


def random_exit(exits: AllExits, seed: int = 0) -> Candidates:
    """As many samples exit at each layer as with each threshold, but which ones is drawn at random."""
    rng, thresholds = np.random.default_rng(seed), dense_thresholds(exits, THRESHOLDS)
    return Candidates.of(exits, [rng.permutation(exits.exit_layers(threshold)) for threshold in thresholds], thresholds)


def own_exits(exits: AllExits) -> Candidates:
    """Each exit as a model of its own, without the off-ramps before it."""
    exits = replace(exits, rule="confidence")  # by patience no sample could exit at one off-ramp alone
    number = exits.logits.shape[1]
    alone = [[np.inf if i == exit else NO_EXIT for i in range(number - 1)] for exit in range(number)]
    return Candidates.of(exits, [exits.exit_layers(thresholds) for thresholds in alone], alone)


def static_models(models: Sequence[AllExits], full: AllExits) -> Candidates:
    """Models without exits, and the full model, whose cost is 1."""
    return Candidates(
        np.stack([predictions(model.logits[:, -1]) for model in (*models, full)]),
        np.stack([model.costs.full for model in (*models, full)]),
        full.costs.full,
    )


def upper_hull(cost: np.ndarray, score: np.ndarray) -> list[int]:
    """The corners of the upper hull of points (M,), by rising cost, from the cheapest to the best of them."""
    corners: list[int] = []
    for i in np.lexsort((-score, cost)):
        if corners and score[i] <= score[corners[-1]]:
            continue  # another one is cheaper and no worse
        while len(corners) > 1 and _below(cost, score, corners[-2], corners[-1], i):
            corners.pop()
        corners.append(int(i))
    return corners


def _below(cost: np.ndarray, score: np.ndarray, left: int, middle: int, right: int) -> bool:
    """Whether the point in the middle is on or below the line between the others."""
    rise, run = score[right] - score[left], cost[right] - cost[left]
    return (score[middle] - score[left]) * run <= rise * (cost[middle] - cost[left])


def resampled_scores(task: Task, predicted: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The primary metric (R, P) of predictions (P, S), where each sample is there as often as counts (R, S) say."""
    metric = task.primary_metric
    if metric == "acc":  # at once
        return counts @ (predicted == labels).T / counts.sum(axis=1, keepdims=True)
    rows = [np.repeat(np.arange(len(labels)), count) for count in counts.astype(int)]
    return np.array([[score(task, metric, labels[r], values[r]) for values in predicted] for r in rows])


def scores_at_costs(
    task: Task, candidates: Candidates, labels: np.ndarray, halves: Sequence[np.ndarray], counts: Sequence[np.ndarray]
) -> np.ndarray:
    """(1 + R, G) the score at each of COSTS, observed and resampled: the mean of the two halves.

    halves: the samples' indices. counts: how often each of them is drawn, (1 + R, S / 2) for each half.
    """
    values = []
    for fit, scored, drawn in zip(halves[::-1], halves, counts, strict=True):
        scores = resampled_scores(task, candidates.predictions[:, fit], labels[fit], np.ones((1, len(fit))))[0]
        chosen = upper_hull(candidates.costs(fit), scores)
        cost = candidates.costs(scored)[chosen]
        chosen = np.array(chosen)[np.argsort(cost, kind="stable")]
        shares = np.stack([np.interp(COSTS, np.sort(cost), corner) for corner in np.eye(len(chosen))])  # (P, G)
        values.append(
            resampled_scores(task, candidates.predictions[np.ix_(chosen, scored)], labels[scored], drawn) @ shares
        )
    return np.mean(values, axis=0)


class Frontier:
    """The scores at COSTS of every setting and seed, on the same samples and resamples, so that differences are paired.

    scores: by setting, (seeds, 1 + R, G), NaN below the lowest cost that all of them can run at.
    """

    def __init__(self, task: Task, candidates: dict[str, list[Candidates]], labels: np.ndarray, resamples: int):
        rng = np.random.default_rng(0)
        halves = np.array_split(rng.permutation(len(labels)), 2)
        counts = []
        for half in halves:
            drawn = rng.multinomial(len(half), np.full(len(half), 1 / len(half)), resamples)
            counts.append(np.concatenate([np.ones((1, len(half))), drawn]))
        self.scores = {
            name: np.stack([scores_at_costs(task, one, labels, halves, counts) for one in of_seeds])
            for name, of_seeds in candidates.items()
        }
        lowest = max(one.costs().min() for of_seeds in candidates.values() for one in of_seeds)
        self.scores = {name: np.where(lowest <= COSTS, scores, np.nan) for name, scores in self.scores.items()}

    def curve(self, name: str) -> np.ndarray:
        """(G,) the mean over the seeds, NaN below the lowest cost."""
        return self.scores[name][:, 0].mean(axis=0)

    def score(self, name: str, cost: int) -> float:
        """The mean over the seeds at COSTS[cost]."""
        return float(self.curve(name)[cost])

    def gain(self, name: str, other: str, cost: int) -> tuple[float, tuple[float, float] | None]:
        """By how much the score at COSTS[cost] is above another setting's, and its `interval`."""
        difference = (self.scores[name] - self.scores[other])[..., cost]  # (seeds, 1 + R)
        return float(difference[:, 0].mean()), interval(difference)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """The interval of a mean over seeds and texts, from values (seeds, 1 + R): observed, and of resampled texts.

    Its half is the root of two squares: half of Student's interval over the seeds, and half of the bootstrap's over the
    texts. It holds for any ratio of the two spreads (tests/scripts/test_baselines.py), and is wide with two seeds. None
    from one seed, which does not show how much seeds differ.
    """
    seeds, tail = len(values), (1 - level) / 2
    if seeds < 2:
        return None
    mean = values[:, 0].mean()
    of_seeds = student.ppf(1 - tail, seeds - 1) * values[:, 0].std(ddof=1) / np.sqrt(seeds)
    low, high = np.quantile(values[:, 1:].mean(axis=0), [tail, 1 - tail])
    return float(mean - np.hypot(mean - low, of_seeds)), float(mean + np.hypot(high - mean, of_seeds))


STATIC = "static models"


def frontier(task: Task, early: dict[str, list[AllExits]], static: dict[str, list[AllExits]]) -> Frontier:
    """Early exit of each setting and, where there are static models, the best of these."""
    candidates = {name: [early_exit(exits) for exits in of_seeds] for name, of_seeds in early.items()}
    first = next(iter(early.values()))
    if static:
        seeds = zip(*static.values(), strict=True)
        candidates[STATIC] = [static_models(models, full) for models, full in zip(seeds, first, strict=True)]
    return Frontier(task, candidates, first[0].labels, RESAMPLES)


def frontier_table(lines: Frontier) -> str:
    """A Markdown table, in per cent and points: scores at shares of the cost, and gains with their intervals."""
    names = [name for name in lines.scores if name != STATIC]
    others = [STATIC] * (STATIC in lines.scores) + names[:1]
    rows = [["setting", *(f"at {share} %" for share in AT), *(f"over {other} at {HALF} %" for other in others)]]
    for name in lines.scores:
        scores = [lines.score(name, cost) for cost in AT]
        gains = ["" if name == other else gain_cell(lines.gain(name, other, HALF)) for other in others]
        rows.append([name, *("-" if np.isnan(score) else f"{100 * score:.1f}" for score in scores), *gains])
    return markdown(rows)


def gain_cell(gain: tuple[float, tuple[float, float] | None]) -> str:
    """In points, such as "+2.3 (+1.7 to +3.0)"."""
    mean, ends = gain
    return f"{100 * mean:+.1f}" + (f" ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})" if ends else "")


def about_intervals(samples: int, seeds: int) -> str:
    """What a reader of `frontier_table` has to know, as a paragraph."""
    how = f"Thresholds and models are chosen on one half of the {samples:,} samples and scored on the other. "
    if seeds < 2:
        return how + "One seed: no intervals, because it does not show how much seeds differ."
    return how + (
        f"In brackets: 95 % intervals for other seeds and other texts, by Student's t over the {seeds} seeds and a "
        "bootstrap of the texts together."
    )


def rivals_table(task: Task, early: dict[str, list[AllExits]]) -> str:
    """A Markdown table, in per cent: early exit of each model beside other ways to choose its samples' exits."""
    ways = {"early exit": early_exit, "random exits": random_exit, "one exit for all": own_exits}
    rows = [["setting", *(f"{way} at {HALF} %" for way in ways)]]
    for name, of_seeds in early.items():
        candidates = {way: [make(exits) for exits in of_seeds] for way, make in ways.items()}
        lines = Frontier(task, candidates, of_seeds[0].labels, resamples=0)
        rows.append([name, *(f"{100 * lines.score(way, HALF):.1f}" for way in ways)])
    return markdown(rows)


def static_points(
    task: Task, static: dict[str, list[AllExits]], full: AllExits
) -> dict[str, tuple[float, list[float]]]:
    """The cost of each static model, and its score with each seed."""
    points = {}
    for name, of_seeds in static.items():
        cost = float(static_models(of_seeds, full).costs()[0])
        points[name] = (cost, [exits.full_score(task) for exits in of_seeds])
    return points


def static_table(points: dict[str, tuple[float, list[float]]]) -> str:
    """A Markdown table of `static_points`, in per cent."""
    rows = [[name, f"{100 * cost:.1f}", mean_and_deviation(scores)] for name, (cost, scores) in points.items()]
    return markdown([["static model", "cost", "score"], *rows])
