"""Shows on the dev set that a threshold keeps a promise for unseen samples, and searches thresholds without losing it.

The method is Learn then Test (Angelopoulos et al., 2021) with fixed-sequence testing, as applied to early exit by
Jazbec et al. ("Fast yet Safe: Early-Exiting with Risk Control", NeurIPS 2024). For each threshold the hypothesis "it
breaks the promise" is tested. It assumes that these samples and future ones are independent draws from one
distribution, and that the tested thresholds do not depend on the samples, which is true of the rule's grid.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
from scipy.stats import beta, binom

from deebert.data.tasks import Task
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.metrics import correct, predictions, primary_score

NUISANCE = 0.01  # the part of paired_p_value that covers the unknown share of changed samples
NUISANCE_POINTS = 8  # shares of changed samples that are tried
RESAMPLES = 200  # of a paired bootstrap
WORST_CANDIDATES = 200  # exits that are tried as the worst one


def fixed_sequence(thresholds: Iterable[float], p_value: Callable[[float], float], level: float) -> float | None:
    """The last threshold before the first whose hypothesis is not rejected at this level; None where the first is not.

    thresholds: the ones that keep the promise most surely come first.
    p_value: of the hypothesis that a threshold breaks the promise.

    The probability that the result breaks it is at most `level`, however many thresholds there are: that takes a wrong
    rejection of the first true hypothesis of the sequence, which is one test.
    """
    chosen = None
    for threshold in thresholds:
        if not p_value(threshold) <= level:  # NaN is no evidence
            break
        chosen = threshold
    return chosen


def changes(exits: AllExits, exit_layers: np.ndarray) -> tuple[int, int, int]:
    """How many predictions differ from the full model's, are worse, are better, for samples that exit there (S,).

    Where a sample may have several labels, its prediction is right if it is right about all of them.
    """
    early, full, labels = exits.logits_at(exit_layers), exits.logits[:, -1], exits.labels
    differ = predictions(early, exits.several_labels) != predictions(full, exits.several_labels)
    changed = differ.any(axis=-1) if exits.several_labels else differ
    early_correct, full_correct = correct(early, labels), correct(full, labels)
    return int(changed.sum()), int((~early_correct & full_correct).sum()), int((early_correct & ~full_correct).sum())


def risk_p_value(lost: int, samples: int, risk: float) -> float:
    """Of "early exit makes more than this share of samples wrong", where it does so for `lost` of them; exact."""
    return float(binom.cdf(lost, samples, risk))


@lru_cache(maxsize=10_000)
def paired_p_value(lost: int, gained: int, samples: int, drop: float, nuisance: float = NUISANCE) -> float:
    """Of "the accuracy falls by more than `drop`", where `lost` samples become wrong and `gained` ones become right.

    The p-value is the probability of a difference lost - gained as small as this one, if the accuracy falls by exactly
    `drop`. It depends on the unknown share of samples that change, so it is the largest one over a confidence interval
    of this share (Berger and Boos, "P Values Maximized Over a Confidence Set for the Nuisance Parameter", JASA 1994).
    No normal approximation is made: with few changed samples it would be too sure.

    nuisance: the probability that the interval misses the share; the p-value is never below it.
    """
    changed = lost + gained
    most = float(beta.ppf(1 - nuisance, changed + 1, samples - changed)) if changed < samples else 1.0
    worst = 0.0
    for share in np.linspace(drop, max(drop, most), NUISANCE_POINTS):
        to_wrong, to_right = (share + drop) / 2, (share - drop) / 2
        rights = np.arange(binom.ppf(1 - 1e-12, samples, to_right) + 1)  # all that can happen
        wrongs = binom.cdf(lost - gained + rights, samples - rights, to_wrong / (1 - to_right))
        worst = max(worst, float(binom.pmf(rights, samples, to_right) @ wrongs))
    return min(worst + nuisance, 1.0)


class PairedBootstrap:
    """p-values of "the score falls by more than `drop`" for any metric: F1, correlations.

    Samples are drawn with replacement, each with both of its predictions. A bootstrap cannot draw what it has not seen:
    where early exit changes few predictions it would be too sure. So one more sample is added that loses much: it gets
    the logits of another sample's off-ramp. An exact binomial bound counts one more event than was seen, too.
    """

    def __init__(self, task: Task, exits: AllExits, seed: int):
        self.task, self.exits = task, exits
        rng = np.random.default_rng(seed)
        sample, self.added = self._worst_exit(rng)
        self.labels = np.concatenate([exits.labels, exits.labels[sample][None]])
        self.draws = rng.integers(0, len(self.labels), (RESAMPLES, len(self.labels)))
        self.full_scores = self._scores(np.concatenate([exits.logits[:, -1], exits.logits[sample, -1][None]]))

    def p_value(self, threshold: float, drop: float) -> float:
        """The share of resamples in which the score falls by `drop` or more."""
        early = np.concatenate([self.exits.logits_at(self.exits.exit_layers(threshold)), self.added])
        missed = int((self.full_scores - self._scores(early) >= drop).sum())
        return (1 + missed) / (1 + RESAMPLES)

    def _scores(self, logits: np.ndarray) -> np.ndarray:
        return np.array([primary_score(self.task, logits[draw], self.labels[draw]) for draw in self.draws])

    def _worst_exit(self, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """A sample, and logits (1, C) of another one's off-ramp: the most harmful pair of some for the full model."""
        logits, labels = self.exits.logits, self.exits.labels
        samples, others = rng.integers(0, len(labels), (2, WORST_CANDIDATES))
        early = logits[others, rng.integers(0, logits.shape[1] - 1, WORST_CANDIDATES)]  # of any off-ramp

        def harm(i: int) -> float:
            with_it = np.concatenate([labels, labels[samples[i]][None]])
            full_score, early_score = (
                primary_score(self.task, np.concatenate([logits[:, -1], added[None]]), with_it)
                for added in (logits[samples[i], -1], early[i])
            )
            return full_score - early_score

        worst = max(range(WORST_CANDIDATES), key=harm)
        return samples[worst], early[worst][None]
