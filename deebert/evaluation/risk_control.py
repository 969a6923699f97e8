"""Shows on the dev set that a threshold keeps a promise for unseen samples, and searches thresholds without losing it.

The method is Learn then Test (Angelopoulos et al., 2021) with fixed-sequence testing, as applied to early exit by
Jazbec et al. ("Fast yet Safe: Early-Exiting with Risk Control", NeurIPS 2024). For each threshold the hypothesis "it
breaks the promise" is tested. It assumes that these samples and future ones are independent draws from one
distribution, and that the tested thresholds do not depend on the samples, which is true of the rule's grid.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
from scipy.stats import beta, binom

NUISANCE = 0.01  # the part of paired_p_value that covers the unknown share of changed samples
NUISANCE_POINTS = 8  # shares of changed samples that are tried


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


def nuisance(level: float) -> float:
    """The part of a test's level that covers the unknown share of changed samples."""
    return min(NUISANCE, level / 10)


def risk_p_value(lost: int, samples: int, risk: float) -> float:
    """Of "early exit makes more than this share of samples wrong", where it does so for `lost` of them; exact."""
    return float(binom.cdf(lost, samples, risk))


def drop_p_value(values: np.ndarray, largest: float, drop: float, level: float, seed: int) -> float:
    """Of "the score falls by more than `drop`", from its change as a mean of values (S,) of samples.

    largest: the largest value that a sample can have.

    Each value is rounded at random to a full loss, a full gain or none, so that its mean stays; then the test for
    losses and gains is exact, however few there are and whatever was not seen. Where all values are -1, 0 and 1, as for
    the accuracy, nothing is random.
    """
    full = np.random.default_rng(seed).random(len(values)) < np.abs(values) / largest
    lost, gained = int((full & (values < 0)).sum()), int((full & (values > 0)).sum())
    return paired_p_value(lost, gained, len(values), min(drop / largest, 1.0), nuisance(level))


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
    shares = np.linspace(drop, max(drop, most), NUISANCE_POINTS)[:, None]
    to_wrong, to_right = (shares + drop) / 2, (shares - drop) / 2
    rights = np.arange(binom.ppf(1 - 1e-12, samples, to_right[-1, 0]) + 1)  # all that can happen
    wrongs = binom.cdf(lost - gained + rights, samples - rights, np.minimum(to_wrong / (1 - to_right), 1))
    worst = (binom.pmf(rights, samples, to_right) * wrongs).sum(axis=1).max()
    return min(float(worst) + nuisance, 1.0)


def fewest_samples(p_value: Callable[[int], float], level: float, most: int = 10**7) -> int:
    """The smallest number of samples whose p-value is at most the level; `most` where it is larger.

    p_value: of a number of samples among which nothing changes; it falls with the number.
    """
    return bisect_left(range(most), True, key=lambda samples: p_value(samples) <= level)
