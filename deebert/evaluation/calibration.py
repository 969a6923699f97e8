"""Temperature scaling of every exit (Guo et al., 2017, section 4.2): an exit's logits are divided by its own number.

Off-ramps differ in how sure of themselves they are; calibrated, one threshold means the same behind each.
"""

from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional

from deebert.evaluation.all_exits import AllExits
from deebert.utils.cli import InputError

LIMITS = (0.05, 20.0)  # of a temperature: an exit that is always right would have it go to 0


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """The mean over samples, in nats, of logits (S, C) / temperature against labels (S,)."""
    scaled = torch.from_numpy(logits).double() / temperature
    return functional.cross_entropy(scaled, torch.from_numpy(labels)).item()


def fit_temperatures(exits: AllExits) -> list[float]:
    """The N temperatures that make each exit's negative log-likelihood smallest. Raises InputError for regression."""
    if exits.logits.shape[2] == 1:
        raise InputError("--calibrate scales probabilities, and a regression model has none")
    if exits.labels is None:
        raise InputError("--calibrate needs samples with labels")
    low, high = np.log(LIMITS)
    return [
        # convex in 1 / T, so that there is one minimum
        float(
            np.exp(
                minimize_scalar(
                    lambda t, z=z: negative_log_likelihood(z, exits.labels, np.exp(t)), bounds=(low, high)
                ).x
            )
        )
        for z in exits.logits.swapaxes(0, 1)
    ]


def calibrated(exits: AllExits, temperatures: list[float]) -> AllExits:
    """What the exits answer with these temperatures."""
    return replace(exits, logits=exits.logits / np.array(temperatures, np.float32)[:, None])


def report(before: AllExits, after: AllExits) -> str:
    """The likelihoods on samples that the temperatures were not fitted to, in one line."""
    losses = [
        " ".join(f"{negative_log_likelihood(z, exits.labels):.3f}" for z in exits.logits.swapaxes(0, 1))
        for exits in (before, after)
    ]
    where = f"negative log-likelihood of the exits on {len(before.logits)} other samples"
    return f"{where}: {losses[0]}; calibrated: {losses[1]}"
