"""What early exit is worth: its score at each cost, beside smaller models and other ways to choose a sample's exit.

Everything is compared in the same way. Whatever can be run (a threshold, a model, an exit) has predictions and costs.
On one half of the dev set the best of these are chosen: the corners of the upper hull of score over cost. They are
scored on the other half; then the halves change places. Between two corners a share of the samples can go to either.
Shapes: S samples, N layers; M candidates, of which P are chosen; R resamples; G costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from comparison import all_thresholds, mean_and_deviation
from sklearn.metrics import roc_auc_score

from deebert.data.tasks import Task
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.metrics import predictions, score
from deebert.evaluation.tables import markdown
from deebert.modeling.exit_rules import NO_EXIT

THRESHOLDS = 200  # that are candidates
COSTS = np.linspace(0, 1, 101)  # (G,) shares of the full model's cost at which scores are compared
AT = (25, 50, 75)  # those of them that the table shows, in per cent
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
    thresholds = all_thresholds(exits, THRESHOLDS)
    return Candidates.of(exits, [exits.exit_layers(threshold) for threshold in thresholds], thresholds)


def random_exit(exits: AllExits, seed: int = 0) -> Candidates:
    """As many samples exit at each layer as with each threshold, but which ones is drawn at random."""
    rng, thresholds = np.random.default_rng(seed), all_thresholds(exits, THRESHOLDS)
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
    rows, metric = [np.repeat(np.arange(len(labels)), count) for count in counts.astype(int)], task.primary_metric
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

    scores: by setting, (seeds, 1 + R, G). lowest: the smallest cost that all of them can run at.
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
        self.lowest = max(one.costs().min() for of_seeds in candidates.values() for one in of_seeds)
        can_run = self.lowest <= COSTS
        self.scores = {name: np.where(can_run, of_seeds, np.nan) for name, of_seeds in self.scores.items()}
        seeds = len(next(iter(candidates.values())))
        self.drawn_seeds = rng.integers(0, seeds, (resamples, seeds))

    @property
    def usual(self) -> np.ndarray:
        """The indices of the costs that all settings can run at: their mean is a setting's mean score."""
        return np.flatnonzero(self.lowest <= COSTS)

    def curve(self, name: str) -> np.ndarray:
        """(G,) the mean over the seeds, NaN below the lowest cost."""
        return self.scores[name][:, 0].mean(axis=0)

    def score(self, name: str, costs: np.ndarray | int) -> float:
        """The mean over these indices of COSTS and over the seeds."""
        return float(self.scores[name][:, 0][:, np.atleast_1d(costs)].mean())

    def gain(self, name: str, other: str, costs: np.ndarray | int) -> tuple[float, float, float]:
        """By how much the score is above another setting's, and the 95 % interval over samples and seeds."""
        difference = (self.scores[name] - self.scores[other])[..., np.atleast_1d(costs)].mean(axis=-1)  # (seeds, 1 + R)
        resampled = difference[self.drawn_seeds, 1 + np.arange(len(self.drawn_seeds))[:, None]].mean(axis=1)
        return float(difference[:, 0].mean()), *np.quantile(resampled, [0.025, 0.975]).tolist()


def oracle(exits: AllExits, wanted: np.ndarray) -> tuple[np.ndarray, float]:
    """Samples exit at the first exit that predicts what is wanted (S,), or at the first of all where none does.

    Returns the predictions (S,) and the cost, without off-ramps.
    """
    right = predictions(exits.logits) == wanted[:, None]
    layers = right.argmax(axis=1) + exits.first_layer  # argmax gives the first; 0 where there is none
    operations = exits.costs.of(layers, [False] * (exits.num_exits - 1))
    return predictions(exits.logits_at(layers)), float(operations.sum() / exits.costs.full.sum())


def error_auroc(exits: AllExits) -> list[float]:
    """How well the uncertainty after each off-ramp finds its errors, (N-1,): 0.5 is chance; NaN where there is none."""
    wrong = predictions(exits.logits[:, :-1]) != exits.labels[:, None]
    columns = zip(wrong.T, exits.uncertainties.T, strict=True)
    return [float(roc_auc_score(w, u)) if 0 < w.sum() < len(w) else float("nan") for w, u in columns]


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
    lowest = f"{100 * COSTS[lines.usual[0]]:.0f}"
    header = ["setting", *(f"at {share} %" for share in AT), f"mean from {lowest} %"]
    for other in others:
        header += [f"over {other} at {AT[1]} %", f"over {other}, mean"]
    rows = [header]
    for name in lines.scores:
        scores = [lines.score(name, costs) for costs in (*AT, lines.usual)]
        row = [name, *("-" if np.isnan(score) else f"{100 * score:.1f}" for score in scores)]
        for other in others:
            gains = [lines.gain(name, other, costs) for costs in (AT[1], lines.usual)]
            row += [
                "" if name == other else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in g)) for g in gains
            ]
        rows.append(row)
    return markdown(rows)


def rivals_table(task: Task, early: dict[str, list[AllExits]]) -> str:
    """A Markdown table, in per cent: early exit of each model beside other ways to choose its samples' exits."""
    header = ["setting", *(f"{way} at {AT[1]} %" for way in ("early exit", "random exit", "its exits, static"))]
    rows = [[*header, "label oracle: score, cost", "full model's label: cost", "AUROC of errors, by exit"]]
    for name, of_seeds in early.items():
        ways = {way.__name__: [way(exits) for exits in of_seeds] for way in (early_exit, random_exit, own_exits)}
        lines = Frontier(task, ways, of_seeds[0].labels, resamples=0)
        row = [name, *(f"{100 * lines.score(way, AT[1]):.1f}" for way in ways)]
        by_label = [oracle(exits, exits.labels) for exits in of_seeds]
        scores = [resampled_scores(task, p[None], of_seeds[0].labels, np.ones((1, len(p)))).item() for p, _ in by_label]
        by_full = [oracle(exits, predictions(exits.logits[:, -1]))[1] for exits in of_seeds]
        auroc = np.mean([error_auroc(exits) for exits in of_seeds], axis=0)
        row.append(f"{100 * np.mean(scores):.1f}, {100 * np.mean([cost for _, cost in by_label]):.1f}")
        rows.append([*row, f"{100 * np.mean(by_full):.1f}", " ".join(f"{100 * value:.0f}" for value in auroc)])
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
