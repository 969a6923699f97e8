"""Chooses a threshold whose risk is controlled: a guarantee on the samples that early exit gets wrong.

The risk is the probability that a sample is lost to early exit (see `lost_to_early_exit`).
Shapes: S samples.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom

from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.metrics import correct
from deebert.utils.cli import InputError


def lost_to_early_exit(exits: AllExits, threshold: float | Sequence[float]) -> np.ndarray:
    """(S,) bool: the prediction is wrong with this threshold, and right with the full model."""
    early = correct(exits.logits_at(exits.exit_layers(threshold)), exits.labels)
    return ~early & correct(exits.logits[:, -1], exits.labels)


def controlled_threshold(exits: AllExits, risk: float, confidence: float, points: int = 200) -> float:
    """The fastest threshold whose risk is shown, with this confidence, to be below `risk`.

    points: how many thresholds are tested.

    The method is Learn then Test (Angelopoulos et al., 2021) with fixed-sequence testing, as applied to early exit by
    Jazbec et al. ("Fast yet Safe: Early-Exiting with Risk Control", NeurIPS 2024). Thresholds are tested from the
    safest up. For each, the hypothesis "its risk is above `risk`" is tested at level 1 - confidence, with the
    exact binomial p-value. The result is the last threshold before the first hypothesis that is not rejected.
    The guarantee assumes that these samples and future ones are independent draws from one distribution, and that the
    tested thresholds do not depend on the samples, which is true of the rule's grid.
    Raises InputError where there are too few samples to show anything.
    """
    needed = math.ceil(math.log(1 - confidence) / math.log(1 - risk))
    if len(exits.labels) < needed:
        raise InputError(
            f"--risk {risk} --confidence {confidence}: at least {needed} samples are needed to "
            f"choose a threshold, and half of the dev set has {len(exits.labels)}; allow a larger risk"
        )
    safe = 0.0
    for threshold in exits.exit_rule.grid(points, exits.num_exits):
        lost = int(lost_to_early_exit(exits, threshold).sum())
        if binom.cdf(lost, len(exits.labels), risk) > 1 - confidence:
            break
        safe = threshold
    return safe
